"""``python -m bench scaling``: an update on several devices as computation and communication, checked, then carried on.

The formula is in docs/scaling.md. Run as a script, this file is one of the processes that are measured.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes

from backends.interface import Batch, Tensor, Wanted
from backends.shape import Shape
from bench.contenders import Task
from bench.distill import SIZES, model_flops, task_of
from bench.report import corpus_and_tokenizer, machine, save
from general_distill.arguments import Arguments, Pretraining
from general_distill.distill import Setup, distillation, prepare
from general_distill.estimate import expected_maximum, line_lengths
from training.launch import Processes, launch
from training.loop import time_steps
from training.report import markdown
from training.stages import Phase

DEVICES = (1, 8, 64, 512)
WARMUP, STEPS, REPEATS, ROUNDS = 2, 20, 2, 2
"""Rounds of one process, two apart and two together, each with repeats of the same steps. Of each step the median
counts: others may be at work on the machine."""
PAYLOADS = (2**10, 2**20, 2**22, 2**24)
"""Bytes of the all-reductions and gatherings that are timed."""
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
    bandwidth: float
    """Bytes a second that a worker sends while it receives as many."""
    latency: float
    """Seconds a message."""


@dataclass(frozen=True)
class Cluster:
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
class Objective:
    """What is trained, as far as it scales differently."""

    name: str
    relation: Literal["token", "sample"]
    padded: bool = False
    """Padding runs along, to the length of the batch's longest line."""
    gathered: bool = False
    """Samples of all devices are related."""


OBJECTIVES = (
    Objective("as published", "sample", padded=True),
    Objective("masked, each its own", "sample"),
    Objective("masked, gathered", "sample", gathered=True),
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
    # of many lines, the sum is normal
    if lines > 256:
        largest = random.standard_normal((TRIALS, devices)).max(axis=1).mean()
        return float(1 + largest * lengths.std() / lengths.mean() / lines**0.5)
    batches = np.stack([random.choice(lengths, (devices, lines)).sum(axis=1).max() for _ in range(TRIALS)])
    return float(batches.mean() / (lines * lengths.mean()))


def relation_elements(lengths: np.ndarray, lines: int, related: int, heads: int, objective: Objective) -> float:
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
    task: Task, lengths: np.ndarray, objective: Objective, cluster: Cluster, devices: int, lines: int, accumulation: int
) -> dict[str, float]:
    """Seconds of an update and what they are made of.

    Args:
        lengths: tokens of lines of the text.
        lines: of a micro-batch of a device.
        accumulation: micro-batches to an update.
    """
    n = np.full(lines, expected_maximum(lengths, lines)) if objective.padded else lengths
    flops = model_flops(task, n) * lines / len(n)
    together = objective.gathered and devices > 1
    late = 1.0 if objective.padded else straggling(lengths, lines if together else lines * accumulation, devices)
    compute = late * flops / cluster.flops
    related = lines * (devices if objective.gathered else 1)
    teacher, student = Shape.of(task.teacher), Shape.of(task.student)
    widths = teacher.layers[task.teacher_layer].width, student.layers[task.student_layer].width
    element = 4 * PASSES / cluster.memory_bandwidth
    element += 2 * (widths[0] + 3 * widths[1]) / task.heads / cluster.float32_flops
    relation = SIDES * relation_elements(lengths, lines, related, task.heads, objective) * element
    gather = 0.0
    if together:
        relation *= -(-task.heads // devices) / task.heads
        tokens = late * lines * float(lengths.mean())
        gather = all_gather(gathered_bytes(widths, tokens, 2) + returned_bytes(widths, tokens), devices, cluster)
        gather += MESSAGES * all_gather(0, devices, cluster)
    reduce = all_reduce(4 * student.reached_weights(task.student_layer), devices, cluster)
    hidden = min(cluster.overlap * reduce, compute * backward_share(task))
    return {
        "compute": accumulation * compute,
        "late": late,
        "relation": accumulation * relation,
        "gather": accumulation * gather,
        "reduce": reduce,
        "exposed": reduce - hidden,
        "step": accumulation * (compute + relation + gather) + reduce - hidden,
    }


def backward_share(task: Task) -> float:
    """Of the models' products, those of the student's backward pass."""
    # With itself for a teacher it runs forward twice, and backward at the same cost.
    itself = replace(task, teacher=task.student, teacher_layer=task.student_layer)
    return model_flops(itself, np.ones(1)) / 2 / model_flops(task, np.ones(1))


def limit(
    task: Task, lengths: np.ndarray, objective: Objective, cluster: Cluster, lines: int, accumulation: int
) -> int:
    """The most devices, a power of 2 up to 4096, that weak scaling keeps at `ENOUGH`."""
    run = partial(predict, task, lengths, objective, cluster)
    alone = run(1, lines, accumulation)["step"]
    enough = [2**k for k in range(13) if alone / run(2**k, lines, accumulation)["step"] >= ENOUGH]
    return max(enough)


def scaling(
    batch_size: int = 32,
    global_batch_size: int = 1024,
    max_seq_length: int = 128,
    devices_a_node: int = 8,
    node_gigabytes: float = 120.0,
    network_gigabits: float = 100.0,
    microseconds: float = 20.0,
    overlap: float = 0.7,
    teraflops: float = 125.0,
    utilisation: float = 0.3,
    memory_gigabytes: float = 720.0,
    frameworks: list[Literal["torch", "paddle"]] = ["torch", "paddle"],  # noqa: B006
    measured_batch_size: int = 16,
    input_dir: str | None = None,
    vocab_file: str | None = None,
    output_dir: str = "output/bench",
) -> None:
    """Predicts how PP-MiniLM's distillation scales over devices, after checking the model of it on two processes here.

    What is measured is a small pair of models on one CPU process and on two; what is predicted is 24x1024 to 6x768 on
    nodes of V100, whose speed is assumed, not measured.

    Args:
        batch_size: lines of a device's batch, for weak scaling.
        global_batch_size: lines of all devices to an update, for strong scaling, at most batch_size at a time.
        max_seq_length: tokens of a line that are kept.
        devices_a_node: GPUs that NVLink or PCIe joins.
        node_gigabytes: GB/s of all-reduce among them; 120 is NVLink on V100, 10 PCIe.
        network_gigabits: Gbit/s between nodes.
        microseconds: latency of a message.
        overlap: share of the gradients' all-reduce that can go on beside the backward pass; the rest, the embeddings',
            is there when that is over.
        teraflops: a device's products in float16; an eighth of it in float32.
        utilisation: share of teraflops that is reached.
        memory_gigabytes: GB/s of a device's memory that are reached.
        frameworks: what is measured: torch, paddle, both or, with [], none.
        measured_batch_size: lines of a process' batch there.
        input_dir: folder of text, one sentence a line; without, the project's data folder or its demo corpus.
        vocab_file: vocab.txt; without, the data folder's, or one trained on the text.
        output_dir: where the tables, the plot and the figures go.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        corpus, tokenizer = corpus_and_tokenizer(input_dir, vocab_file, folder / "index")
        lengths = line_lengths(corpus, tokenizer, max_seq_length)
        tokenizer.save(folder, max_seq_length)
        checks = []
        for name in frameworks:
            arguments = _small(name, corpus.files[0].parent, folder, measured_batch_size, max_seq_length)
            checks += [_check(replace(arguments, beta=beta)) for beta in (0.0, 1.0)]
    reached = 1e12 * teraflops * utilisation
    cluster = Cluster(
        devices_a_node,
        Link(1e9 * node_gigabytes, 1e-6 * microseconds),
        Link(1e9 * network_gigabits / 8, 1e-6 * microseconds),
        overlap,
        reached,
        reached / 8,
        1e9 * memory_gigabytes,
    )
    task = task_of(SIZES["large"], len(tokenizer), max_seq_length, True, "float16")

    def shares(devices: int) -> tuple[int, int]:
        lines = max(1, min(batch_size, global_batch_size // devices))
        return lines, max(1, global_batch_size // (lines * devices))

    results: dict[str, Any] = {
        "machine": machine("cpu"),
        "checks": checks,
        "weak": _predictions(task, lengths, cluster, lambda devices: (batch_size, 1)),
        "strong": _predictions(task, lengths, cluster, shares),
        "limits": [
            [objective.name] + [limit(task, lengths, objective, cluster, *each) for each in _variants(batch_size)]
            for objective in OBJECTIVES
        ],
    }
    tables = [_checked(checks)] if checks else []
    for kind in ("weak", "strong"):
        tables.append(f"Predicted, not measured: {kind} scaling, milliseconds\n\n{_predicted(results[kind])}")
    head = ["", *(f"{lines} lines, {micro} to an update" for lines, micro in _variants(batch_size))]
    tables.append(
        f"Predicted, not measured: the most devices, in powers of 2 up to 4096, at {ENOUGH:.0%} of one's efficiency\n\n"
        + markdown(head, [[str(cell) for cell in row] for row in results["limits"]])
    )
    table = "\n\n".join([f"{results['machine']}", *tables])
    save(Path(output_dir), "scaling", table, results, _plot)
    print(table)


def _variants(lines: int) -> list[tuple[int, int]]:
    """(lines of a device, micro-batches to an update)."""
    return [(lines, 1), (4 * lines, 1), (16 * lines, 1), (lines, 4), (lines, 16)]


def _predictions(
    task: Task, lengths: np.ndarray, cluster: Cluster, share_of: Callable[[int], tuple[int, int]]
) -> list[dict[str, Any]]:
    """Updates on `DEVICES`; `share_of` them is a device's (lines of a micro-batch, micro-batches to an update)."""
    found: list[dict[str, Any]] = []
    for objective in OBJECTIVES:
        for devices in DEVICES:
            share = share_of(devices)
            one = predict(task, lengths, objective, cluster, devices, *share)
            rate = devices * share[0] * share[1] / one["step"]
            found.append({"objective": objective.name, "devices": devices, "share": share, "rate": rate, **one})
            found[-1]["efficiency"] = rate / devices / found[-1 - DEVICES.index(devices)]["rate"]
    return found


def _predicted(found: Sequence[Mapping[str, Any]]) -> str:
    head = ["objective", "devices", "lines each", "models", "largest batch", "relations", "gather", "all-reduce"]
    rows = [
        [one["objective"], f"{one['devices']}", "{} x {}".format(*one["share"])]
        + [f"{1e3 * one['compute']:,.1f}", f"x {one['late']:.2f}"]
        + [f"{1e3 * one[key]:,.1f}" for key in ("relation", "gather", "reduce", "exposed", "step")]
        + [f"{one['rate']:,.0f}", f"{one['efficiency']:.0%}"]
        for one in found
    ]
    return markdown([*head, "of it exposed", "update", "lines/s", "efficiency"], rows)


def _plot(axes: Axes, results: dict[str, Any]) -> None:
    """Efficiency over devices, a line an objective and kind of scaling."""
    for kind, style in (("weak", "-"), ("strong", "--")):
        for number, objective in enumerate(OBJECTIVES):
            found = [one for one in results[kind] if one["objective"] == objective.name]
            x, y = [one["devices"] for one in found], [one["efficiency"] for one in found]
            axes.plot(x, y, style, color=f"C{number}", label=f"{objective.name}, {kind}")
    axes.set_xscale("log", base=2)
    axes.set_ylim(0, 1.05)
    axes.set_xlabel("devices (predicted)")
    axes.set_ylabel("efficiency")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))


def _small(
    backend: Literal["torch", "paddle"], source: Path, folder: Path, batch_size: int, max_seq_length: int
) -> Arguments:
    """The distillation that is measured: `SIZES["small"]`, both models at random."""
    size = SIZES["small"]
    (teacher_layers, teacher_width), (layers, width) = size.teacher, size.student
    return Arguments(
        input_dir=str(source),
        output_dir=str(folder / "none"),
        backend=backend,
        device="cpu",
        model_type="bert",
        num_layers=layers,
        hidden_size=width,
        num_attention_heads=2,
        intermediate_size=4 * width,
        hidden_act="gelu",
        num_relation_heads=size.heads,
        teacher_layer_index=size.teacher_layer,
        student_layer_index=layers - 1,
        max_seq_length=max_seq_length,
        batch_size=batch_size,
        dry_run=True,
        pretrain=Pretraining(
            vocab_file=str(folder / "vocab.txt"),
            num_layers=teacher_layers,
            hidden_size=teacher_width,
            num_attention_heads=4,
            intermediate_size=4 * teacher_width,
        ),
    )


def _check(arguments: Arguments) -> dict[str, Any]:
    """The steps of two processes by one at a time, by both apart and by both together, measured; together, predicted
    from apart."""
    rounds = [
        (_apart(arguments, [0]) + _apart(arguments, [1]), _apart(arguments, [0, 1]), _together(arguments))
        for _ in range(ROUNDS)
    ]
    alone, apart, two = ([_combined(found) for found in zip(*kind)] for kind in zip(*rounds))
    reduced = _link(two[0]["all_reduce"])
    # Any repeat of a step by the one process may meet any by the other.
    first, second = (one["seconds"] for one in apart)
    met = float(np.median(np.maximum(first[:, None], second[None]), axis=(0, 1)).mean())
    compute = _mean(apart)
    parts = {"compute": compute, "late": met - compute, "relation": 0.0, "gather": 0.0}
    if arguments.beta:
        own, twice = np.mean([one["relation"] for one in apart], axis=0)
        parts["relation"] = twice / 2 - own
        widths, most = apart[0]["widths"], float(np.maximum(*(one["tokens"] for one in apart)).mean())
        size = gathered_bytes(widths, most, 4) + returned_bytes(widths, most)
        gathered = _link(two[0]["gather"])
        parts["gather"] = ring_all_gather(size, 2, gathered) + MESSAGES * ring_all_gather(0, 2, gathered)
    parts["reduce"] = ring_all_reduce(apart[0]["gradient_bytes"], 2, reduced)
    return {
        "framework": arguments.backend,
        "beta": arguments.beta,
        "alone": _mean(alone),
        "two": _mean(two),
        "predicted": sum(parts.values()),
        **{f"{key} seconds": two[0][key] for key in ("all_reduce", "gather")},
        **{f"predicted {name}": seconds for name, seconds in parts.items()},
    }


def _link(seconds: Sequence[float]) -> Link:
    """Between two processes, from the times of `PAYLOADS`: a call sends as many bytes in two messages."""
    return Link((PAYLOADS[-1] - PAYLOADS[0]) / (seconds[-1] - seconds[0]), seconds[0] / 2)


def _combined(rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A process' findings: steps of all repeats, of each other time the median."""
    found = {**rounds[0], "seconds": np.concatenate([one["seconds"] for one in rounds])}
    for key in {"relation", "all_reduce", "gather"} & found.keys():
        found[key] = np.median([one[key] for one in rounds], axis=0).tolist()
    return found


def _mean(processes: Sequence[Mapping[str, Any]]) -> float:
    """Seconds of a step: of each the median."""
    return float(np.mean([np.median(one["seconds"], axis=0).mean() for one in processes]))


def _checked(checks: Sequence[Mapping[str, Any]]) -> str:
    head = ["", "1 process", "2 apart", "+ largest batch", "+ relations", "+ gather"]
    rows = [
        [f"{one['framework']}, beta {one['beta']:g}"]
        + [f"{1e3 * one['alone']:,.1f}"]
        + [f"{1e3 * one[f'predicted {key}']:,.1f}" for key in ("compute", "late", "relation", "gather", "reduce")]
        + [f"{1e3 * one['predicted']:,.1f}", f"{1e3 * one['two']:,.1f}", f"{one['predicted'] / one['two'] - 1:+.0%}"]
        for one in checks
    ]
    table = markdown([*head, "+ all-reduce", "2, predicted", "2, measured", "error"], rows)
    sent = [
        [one["framework"], name.replace("_", "-"), *(f"{1e3 * each:.2f}" for each in one[f"{name} seconds"])]
        for one in checks
        if one["beta"]
        for name in ("all_reduce", "gather")
    ]
    return (
        f"Measured: a step of one process, of two apart and of two together, a core each, milliseconds\n\n{table}\n\n"
        "Measured: what two processes (beta 1) send each other, milliseconds\n\n"
        + markdown(["", "", *(f"{size // 1024:,} KiB" for size in PAYLOADS)], sent)
    )


def _apart(arguments: Arguments, ranks: Sequence[int]) -> list[dict[str, Any]]:
    """What processes find that train at the same time, each for itself on what those ranks of two train on."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        job = _job(arguments, Path(folder))
        commands = [[sys.executable, __file__, str(job), str(rank)] for rank in ranks]
        processes = [subprocess.Popen(command, env=environment) for command in commands]
        _end(arguments, [process.wait() for process in processes])
        return [json.loads(_found(job, rank).read_text(encoding="utf-8")) for rank in ranks]


def _together(arguments: Arguments) -> list[dict[str, Any]]:
    """What two processes find that train together; the first, that is, which the other keeps step with."""
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        job = _job(arguments, Path(folder))
        _end(arguments, [launch(Processes(nproc=2), arguments.backend, "cpu", Path(__file__), [str(job)]) or 0])
        return [json.loads(_found(job, 0).read_text(encoding="utf-8"))]


def _job(arguments: Arguments, folder: Path) -> Path:
    path = folder / "job.json"
    path.write_text(json.dumps({**vars(arguments), "pretrain": vars(arguments.pretrain)}), encoding="utf-8")
    return path


def _found(job: Path, rank: int) -> Path:
    return job.with_name(f"found-{rank}.json")


def _end(arguments: Arguments, codes: Sequence[int]) -> None:
    for code in codes:
        if code:
            raise SystemExit(f"--frameworks {arguments.backend}: a process ended with exit code {code}")


def _work(job: Path, rank: int | None) -> None:
    """A process that is measured: one of those that train together or, given a rank, one that trains for itself on the
    batches of that rank."""
    settings = json.loads(job.read_text(encoding="utf-8"))
    arguments = Arguments(**{**settings, "pretrain": Pretraining(**settings["pretrain"])})
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        setup = prepare(arguments, folder)
        backend = setup.backend

        def share(phase: Phase) -> Iterator[Batch]:
            batches = phase.batches(0, 0)
            return batches if rank is None else islice(batches, rank, None, 2)

        seconds = []
        for repeat in range(REPEATS):  # a model each: Paddle's, once parallel, takes no second optimizer
            phase = distillation(setup, None)
            some = phase._replace(batches=lambda *_: share(phase))  # noqa: B023
            seconds.append(time_steps(backend, *some, folder / str(repeat), WARMUP, STEPS).seconds)
        results: dict[str, Any] = {"seconds": seconds}
        if rank is None:
            for name, send in (("all_reduce", _all_reduce), ("gather", backend.gather)):
                payloads = [backend.tensor(np.ones(size // 4, np.float32)) for size in PAYLOADS]
                results[name] = [_median(partial(send, payload), backend.barrier) for payload in payloads]
        else:
            captured = max(layer for _, layer in arguments.layer_pairs())
            teacher, student = Shape.of(setup.teacher_config), Shape.of(setup.student_config)
            timed = islice(share(phase), WARMUP, WARMUP + STEPS)
            results |= {
                "relation": [
                    _median(_relating(setup, phase.objective, count * arguments.batch_size)) for count in (1, 2)
                ],
                "tokens": [int(batch.attention_mask.sum()) for batch in timed],
                "gradient_bytes": 4 * student.reached_weights(captured),
                "widths": [teacher.hidden, student.hidden],
            }
        if rank is not None or backend.rank == 0:
            _found(job, rank or 0).write_text(json.dumps(results), encoding="utf-8")
        backend.barrier()


def _median(run: Callable[[], object], before: Callable[[], object] = lambda: None) -> float:
    """Seconds of a run: the median of some, after some that do not count."""
    seconds = []
    for _ in range(WARMUP + STEPS):
        before()
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return float(np.median(seconds[WARMUP:]))


def _all_reduce(x: Tensor) -> None:
    importlib.import_module(type(x).__module__.partition(".")[0]).distributed.all_reduce(x)


def _relating(setup: Setup, objective: Any, count: int) -> Callable[[], object]:
    """The relation loss of so many lines, their Q, K, V computed before."""
    numbers = np.random.default_rng(0).choice(len(setup.corpus), count, replace=False)
    lines = [setup.corpus[int(number)] for number in numbers]
    batch = setup.tokenizer.encode(lines, setup.arguments.max_seq_length).batch.shortest_first()
    [(t, s)] = objective.layer_pairs
    with setup.backend.no_grad():
        teacher = objective.teacher.run(batch, Wanted(qkv=[t])).qkv[t]
        student = objective.student.run(batch, Wanted(qkv=[s])).qkv[s]
    return partial(objective.loss, setup.backend, teacher, student, batch.attention_mask)


if __name__ == "__main__":
    _work(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else None)
