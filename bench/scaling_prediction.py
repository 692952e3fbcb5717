"""The prediction of `python -m bench scaling`: an update on several devices as computation and communication.

The formula is in docs/scaling.md.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np

from backends.shape import Shape
from bench.contenders import DistillationJob
from bench.distill import model_flops
from general_distill.estimate import expected_maximum

PASSES = 32
"""How often an element of a relation matrix is read or written where tensor operations compute it."""
MESSAGES = 20
"""Small gatherings of a step with gathered samples: lengths, masks, shares and sums."""
SIDES = 3
"""Q, K, V; as many pairs of them are related."""
TRIALS = 50
ENOUGH = 0.8
"""The efficiency down to which a job is said to scale."""


@dataclass(frozen=True)
class Link:
    """A connection of two workers of a ring."""

    bandwidth: float
    """Bytes a second that a worker sends while it receives as many."""
    latency: float
    """Seconds a message."""


@dataclass(frozen=True)
class Cluster:
    """Devices, by nodes, and what connects them."""

    devices_a_node: int
    inside: Link
    between: Link
    """Of a whole node."""
    overlap: float
    """Share of the gradients' all-reduce that can go on beside the backward pass."""
    flops: float
    """A second of the models' products, reached."""
    float32_flops: float
    """A second of the relation loss' products, reached."""
    memory_bandwidth: float
    """Bytes a second of the loss' elementwise work, reached."""


@dataclass(frozen=True)
class ObjectiveTraits:
    """What of an objective matters for how it scales."""

    name: str
    relation: Literal["token", "sample"]
    padded: bool = False
    """Padding runs along, to the length of the batch's longest line."""
    gathered: bool = False
    """Samples of all devices are related."""


OBJECTIVES = (
    ObjectiveTraits("as published", "sample", padded=True),
    ObjectiveTraits("masked, each its own", "sample"),
    ObjectiveTraits("masked, gathered", "sample", gathered=True),
)


def ring_all_reduce(size: float, workers: int, link: Link) -> float:
    """Seconds in which `workers` in a ring sum `size` bytes each: scattered sums go round, then come back."""
    return 2 * (workers - 1) * (size / workers / link.bandwidth + link.latency)


def ring_all_gather(size: float, workers: int, link: Link) -> float:
    """Seconds in which each of `workers` in a ring gets the `size` bytes of every other."""
    return (workers - 1) * (size / link.bandwidth + link.latency)


def all_reduce(size: float, devices: int, cluster: Cluster) -> float:
    """The same over nodes: sums are scattered inside each, summed between them, and gathered inside."""
    inside, nodes = _nodes(devices, cluster)
    return ring_all_reduce(size, inside, cluster.inside) + ring_all_reduce(size, nodes, cluster.between)


def all_gather(size: float, devices: int, cluster: Cluster) -> float:
    """The same over nodes: each device's bytes go to its counterparts, and from those round each node."""
    inside, nodes = _nodes(devices, cluster)
    between = ring_all_gather(inside * size, nodes, cluster.between)
    return between + ring_all_gather(nodes * size, inside, cluster.inside)


def _nodes(devices: int, cluster: Cluster) -> tuple[int, int]:
    inside = min(devices, cluster.devices_a_node)
    return inside, -(-devices // inside)


def gathered_bytes(widths: tuple[int, int], tokens: float, number_bytes: int) -> float:
    """What a device gives to the others: Q, K, V of teacher and student, of its tokens."""
    return SIDES * sum(widths) * tokens * number_bytes


def returned_bytes(widths: tuple[int, int], tokens: float) -> float:
    """What a device gives to the others of the gradients that it computed, for all tokens by its heads."""
    return SIDES * widths[1] * tokens * 4


def straggling(lengths: np.ndarray, lines: int, devices: int) -> float:
    """The tokens of the largest of `devices` batches over those of an average one, on average."""
    if devices == 1:
        return 1.0
    random = np.random.default_rng(0)
    if lines > 256:  # the sum of many lengths has a normal distribution
        largest = random.standard_normal((TRIALS, devices)).max(axis=1).mean()
        return float(1 + largest * lengths.std() / lengths.mean() / lines**0.5)
    batches = np.stack([random.choice(lengths, (devices, lines)).sum(axis=1).max() for _ in range(TRIALS)])
    return float(batches.mean() / (lines * lengths.mean()))


def relation_elements(lengths: np.ndarray, lines: int, related: int, heads: int, objective: ObjectiveTraits) -> float:
    """Elements of all relation matrices of a pair, on average.

    Args:
        lines: of a device's batch.
        related: samples that a sample is related to.
    """
    n = np.full(1, expected_maximum(lengths, lines)) if objective.padded else lengths.astype(float)
    if objective.relation == "token":
        return float(heads * lines * (n**2).mean())
    reach = np.array([(n > position).mean() for position in range(int(n.max()))])
    return float(heads * (related * reach * (1 - reach) + (related * reach) ** 2).sum())


def predict(
    job: DistillationJob,
    lengths: np.ndarray,
    objective: ObjectiveTraits,
    cluster: Cluster,
    devices: int,
    lines: int,
    accumulation: int,
) -> dict[str, float]:
    """Seconds of an update and what they are made of.

    Args:
        lengths: tokens of lines of the text.
        lines: of a micro-batch of a device.
        accumulation: micro-batches to an update.
    """
    n = np.full(lines, expected_maximum(lengths, lines)) if objective.padded else lengths
    flops = model_flops(job, n) * lines / len(n)
    together = objective.gathered and devices > 1
    late = 1.0 if objective.padded else straggling(lengths, lines if together else lines * accumulation, devices)
    compute = late * flops / cluster.flops
    related = lines * (devices if objective.gathered else 1)
    teacher, student = Shape.of(job.teacher), Shape.of(job.student)
    widths = teacher.layers[job.teacher_layer].width, student.layers[job.student_layer].width
    element = 4 * PASSES / cluster.memory_bandwidth
    element += 2 * (widths[0] + 3 * widths[1]) / job.heads / cluster.float32_flops
    relation = SIDES * relation_elements(lengths, lines, related, job.heads, objective) * element
    gather = 0.0
    if together:
        relation *= -(-job.heads // devices) / job.heads
        tokens = late * lines * float(lengths.mean())
        gather = all_gather(gathered_bytes(widths, tokens, 2) + returned_bytes(widths, tokens), devices, cluster)
        gather += MESSAGES * all_gather(0, devices, cluster)
    reduce = all_reduce(4 * student.weights(), devices, cluster)
    hidden = min(cluster.overlap * reduce, compute * backward_share(job))
    return {
        "compute": accumulation * compute,
        "late": late,
        "relation": accumulation * relation,
        "gather": accumulation * gather,
        "reduce": reduce,
        "exposed": reduce - hidden,
        "step": accumulation * (compute + relation + gather) + reduce - hidden,
    }


def backward_share(job: DistillationJob) -> float:
    """Of the models' products, those of the student's backward pass."""
    # With itself for a teacher it runs forward twice, and backward at the same cost.
    itself = replace(job, teacher=job.student, teacher_layer=job.student_layer)
    return model_flops(itself, np.ones(1)) / 2 / model_flops(job, np.ones(1))


def limit(
    job: DistillationJob,
    lengths: np.ndarray,
    objective: ObjectiveTraits,
    cluster: Cluster,
    lines: int,
    accumulation: int,
) -> int:
    """The most devices, a power of 2 up to 4096, that weak scaling keeps at `ENOUGH`."""
    run = partial(predict, job, lengths, objective, cluster)
    alone = run(1, lines, accumulation)["step"]
    enough = [2**k for k in range(13) if alone / run(2**k, lines, accumulation)["step"] >= ENOUGH]
    return max(enough)
