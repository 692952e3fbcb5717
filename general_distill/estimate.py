"""``python -m general_distill --dry_run``: what a run will take, reckoned, then timed for a few steps.

Memory is reckoned per device, from the shapes of models and batches:

- weights of both models: the student's in float32 and, in low precision, the copies that products read; the
  teacher's products in low precision (twice on PyTorch's CPU, once in the processor's own order);
- gradients and Adam's two moments, in float32, of the weights that the loss reaches;
- buckets of several processes' gradients: on PyTorch the gradients lie in them, Paddle's are beside them;
- activations: what the student's forward pass leaves for the backward pass (`activation_bytes`);
- the objective: of relations, captured Q, K, V of both sides, their gradients, with several processes those of all,
  and the blocks of relation matrices with the vectors that they relate (`relation_bytes`); of other matches, what they
  compare and what they leave for the backward pass (`match_bytes`);
- fragments, on a CPU: freed memory between what is in use, which fits nothing that comes next (`FRAGMENTS`).

What a layer needs only while it is computed is not counted, nor the fragments of a GPU's allocator.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np

from backends.interface import Backend
from backends.pretrained import read_weights
from backends.shape import LayerShape, Shape
from general_distill.arguments import DistillArguments
from general_distill.distill import PretrainTeacher, Setup, distillation, model_config, prepare, pretraining
from objectives.distillation import (
    AttentionMatch,
    LabelsMatch,
    LogitsMatch,
    Match,
    RelationMatch,
    StatesMatch,
    TransportMatch,
    projections_of,
    wanted_of,
)
from objectives.relations import RelationLoss
from text.corpus import Lines
from text.tokenizer import WordPiece
from training.loop import Timed, TrainingArguments, time_steps

WARMUP, STEPS = 2, 6
SAMPLED_LINES = 4000
MASKED = 0.15
"""Share of the tokens that masked language modelling predicts."""
MATRICES = 4
"""Blocks of relation matrices there are at a time: both sides' log-probabilities, their difference and its tanh."""
FRAGMENTS = {"torch": 0.6, "paddle": 0.8}
"""Bytes of fragments for each byte that a step takes and frees. From pretraining a 6x768 and from distillation into a
2x128, a 4x512 (16 and 64 lines) and a 6x768 (on PyTorch in bfloat16 too): each took what is reckoned, within 7%."""

SMALLEST = model_config(
    "bert",
    vocab_size=8,
    num_hidden_layers=1,
    hidden_size=8,
    num_attention_heads=1,
    intermediate_size=8,
    hidden_act="gelu",
)
OBJECTIVE = "objective"


class Rows(NamedTuple):
    """A micro-batch as a model sees it, on average."""

    tokens: float
    """Rows that run through the layers."""
    attended: float
    """Rows that attention sees."""
    squares: float
    """Elements of the matrices of one attention head."""


class Plan(NamedTuple):
    """A phase of the run, reckoned."""

    steps: int
    lines: int
    """A step, of all processes."""
    memory: dict[str, float]
    """Bytes on a device, by what they are for."""


def estimate(arguments: DistillArguments) -> None:
    """Prints what a run will take, from its first process. Nothing is written to ``output_dir``.

    Raises:
        InputError: as `general_distill.distill.distill`, but for what is in ``output_dir``.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        setup = prepare(arguments, folder)
        backend = setup.backend
        backend.model(SMALLEST)  # which loads what is left of the libraries
        lengths = line_lengths(setup.corpus, setup.tokenizer, arguments.max_seq_length)
        plans = plan(setup, lengths)
        first = backend.rank == 0
        if first:
            print(_expected(setup, plans, lengths.mean()), flush=True)
        timed: dict[str, Timed] = {}
        peaks = []
        of_stages = {stage.name: stage for stage in setup.distillations}
        for name in plans:
            if name == PretrainTeacher.name:
                phase = pretraining(setup.distillations[0])
            else:
                stage = of_stages[name]
                phase = distillation(stage, None if stage.teacher_is_to_come else read_weights(stage.teacher_folder))
            (folder / name).mkdir()
            timed[name] = time_steps(backend, *phase, folder / name, WARMUP, STEPS)
            peaks.append(backend.memory()[1])
            del phase
        if first:
            print(_measured(setup, plans, timed, peaks), flush=True)
        backend.barrier()


def line_lengths(corpus: Lines[Any], tokenizer: WordPiece, max_seq_length: int) -> np.ndarray:
    """int64 [N], the tokens of N lines drawn at random, always the same, as far as they are kept."""
    numbers = np.random.default_rng(0).choice(len(corpus), min(SAMPLED_LINES, len(corpus)), replace=False)
    batch = tokenizer.encode([corpus[number] for number in numbers.tolist()], max_seq_length).batch
    return batch.attention_mask.sum(axis=1)


def expected_maximum(lengths: np.ndarray, lines: int) -> float:
    """The length of the longest of so many lines, on average."""
    values, counts = np.unique(lengths, return_counts=True)
    at_most = (counts.cumsum() / len(lengths)) ** lines
    return float((values * np.diff(at_most, prepend=0.0)).sum())


def rows(lengths: np.ndarray, lines: int, padded: bool, device: str) -> Rows:
    """A micro-batch of so many lines, on average.

    Args:
        lengths: [N], tokens of lines of the text.
        padded: whether padding runs through the layers; attention sees it on all devices but a CPU.
    """
    longest = expected_maximum(lengths, lines)
    padding = lines * longest, lines * longest**2
    tokens, squares = lines * float(lengths.mean()), lines * float((lengths.astype(float) ** 2).mean())
    if padded:
        return Rows(padding[0], *padding)
    return Rows(tokens, tokens, squares) if device == "cpu" else Rows(tokens, *padding)


def activation_bytes(
    shape: Shape, config: Mapping[str, Any], layers: int, batch: Rows, backend: Backend, captured: bool
) -> float:
    """What a forward pass in training leaves for the backward pass.

    Per row, a product leaves its input, a norm its input and a dropout which elements it kept; a layer that runs whole
    has six products of width D but the last, whose input has the feed-forward width F, as its activation's input has
    (that of ReLU is the next product's input too). Attention leaves Q, K, V and, where no fused kernel recomputes them,
    the probabilities of every head before and after dropout. Embeddings leave a norm's and a dropout's share. Products'
    inputs are in the backend's precision, Q, K, V share one in float32; norms are in float32.

    Args:
        config: the dropouts and the activation.
        layers: that run whole.
        captured: whether one more runs up to its Q, K, V.
    """
    d = shape.hidden
    on_cpu, torch = backend.device == "cpu", backend.name == "torch"
    narrow = product_bytes(backend)
    inputs = 4 if narrow == 4 else 3 * narrow
    # PyTorch's dropout on a CPU is ours, which keeps factors; the frameworks' own keep a byte
    kept, kept_float = (narrow, 4) if on_cpu and torch else (1, 1)
    if not config["hidden_dropout_prob"]:
        kept, kept_float = 0, 0
    attention = 4 if on_cpu else narrow
    activations = 1 if config["hidden_act"] == "relu" else 2
    probabilities = 0.0
    if on_cpu or not torch:
        probabilities = attention
        if config["attention_probs_dropout_prob"]:
            probabilities += attention + (4 if on_cpu and torch else 1)

    def of_layer(layer: LayerShape) -> float:
        products = d * (inputs + narrow) + layer.width * narrow + layer.intermediate * narrow * activations
        of_row = products + 2 * d * (4 + kept)
        attended = batch.attended * 3 * layer.width * attention + batch.squares * layer.heads * probabilities
        return batch.tokens * of_row + attended

    embeddings = batch.tokens * (d * (4 + kept_float) + 3 * 8)
    return embeddings + sum(map(of_layer, shape.layers[:layers])) + captured * batch.tokens * d * inputs


def relation_bytes(
    loss: RelationLoss,
    widths: tuple[int, int],
    lengths: np.ndarray,
    lines: int,
    tokens: float,
    backend: Backend,
) -> tuple[float, float]:
    """What relations of two layers hold of a micro-batch, and what they take beside that while they are computed.

    Args:
        widths: of the captured layers' Q, K, V, the teacher's and the student's.
        lengths: tokens of lines of the text.
        lines, tokens: of the micro-batch.
    """
    teacher, student = widths
    narrow, heads = product_bytes(backend), loss.num_relation_heads
    together = loss.gather_samples and backend.world_size > 1 and loss.beta > 0
    processes = backend.world_size if together else 1
    related = lines * processes
    longest = expected_maximum(lengths, related)
    # how many vectors are related at a time, and the elements of all matrices
    sizes = {
        "token": (longest, heads * lines * float((lengths.astype(float) ** 2).mean())),
        "sample": (float(related), heads * float(related) ** 2 * longest / processes),
        "head": (float(heads), tokens * heads**2),
    }
    blocks = [0.0]
    if backend.relation_kernel is None:
        for size, elements_in_all in (sizes[relation] for relation, weight in loss.coefficients.items() if weight):
            elements = min(elements_in_all, max(size**2, backend.block_elements))
            blocks.append(4 * elements * (MATRICES + 3 * (teacher + student) / heads / size))
    of_row = (teacher + student) * narrow + student * 4
    # all tokens of some heads of Q, K, V, and all heads of one of them on the way
    gathered = tokens * (3 * of_row + processes * max(teacher * narrow, student * 4)) if together else 0.0
    return 3 * of_row * tokens, gathered + max(blocks)


def match_bytes(
    match: Match,
    teacher: Shape,
    student: Shape,
    lengths: np.ndarray,
    lines: int,
    tokens: float,
    backend: Backend,
) -> tuple[float, float]:
    """What a match holds of a micro-batch, and what it takes beside that while it is computed.

    Args:
        lengths: tokens of lines of the text.
        lines, tokens: of the micro-batch.
    """
    narrow = product_bytes(backend)
    if isinstance(match, TransportMatch):
        held, taken = match_bytes(match.parts[0], teacher, student, lengths, lines, tokens, backend)
        return held * (len(match.pairs) + len(match.pairs[0]) - 1), taken
    if isinstance(match, RelationMatch):
        widths = teacher.layers[match.teacher].width, student.layers[match.student].width
        return relation_bytes(match.relations, widths, lengths, lines, tokens, backend)
    if isinstance(match, AttentionMatch):
        widths = teacher.layers[match.teacher].width, student.layers[match.student].width
        heads = student.layers[match.student].heads if match.heads == "each" else 1
        held = tokens * (3 * widths[0] * narrow + 2 * widths[1] * 4)  # the student's Q, K, V are activations
        return held, _token_blocks(heads, widths, lengths, lines, backend)
    if isinstance(match, StatesMatch):
        width = student.hidden if match.projection is None else teacher.hidden
        projected = width * len({*match.student}) if match.projection is not None else 0
        # the teacher's states and, for the backward pass, a difference or the gradients of two layers
        held = tokens * 4 * (teacher.hidden * len({*match.teacher}) + width * len(match.student))
        if len(match.student) > 1:
            held += tokens * 4 * projected
        if match.compare == "gram":
            return held, 4 * 4 * min(lines * width**2, max(width**2, backend.block_elements))
        if match.compare == "nst":
            return held, _token_blocks(1, (teacher.hidden, width), lengths, lines, backend)
        return held, 3 * 4 * tokens * width
    assert isinstance(match, (LogitsMatch, LabelsMatch))
    logits = MASKED * tokens * student.vocabulary
    return 4 * logits * 2, 4 * logits * MATRICES


def _token_blocks(heads: int, widths: tuple[int, int], lengths: np.ndarray, lines: int, backend: Backend) -> float:
    """Of matrices between the tokens of sequences, with the vectors that they relate."""
    longest = expected_maximum(lengths, lines)
    in_all = heads * lines * float((lengths.astype(float) ** 2).mean())
    elements = min(in_all, max(longest**2, backend.block_elements))
    return 4 * elements * (MATRICES + 2 * sum(widths) / heads / longest)


def product_bytes(backend: Backend) -> int:
    """Of a number in the backend's precision."""
    return 4 if backend.precision == "float32" else 2


def plan(setup: Setup, lengths: np.ndarray) -> dict[str, Plan]:
    """The phases of the run, by name, in order.

    Args:
        lengths: tokens of lines of the text.
    """
    backend = setup.backend
    base = {"libraries, text": float(backend.memory()[0])}
    plans = {}
    if setup.pretrains:
        settings, config = setup.arguments.pretrain, setup.distillations[0].teacher_config
        batch = rows(lengths, settings.batch_size, False, backend.device)
        shape = Shape.of(config)
        count, layers = shape.weights(masked_lm=True), len(shape.layers)
        activations = activation_bytes(shape, config, layers, batch, backend, captured=False)
        activations += MASKED * batch.tokens * 4 * (shape.vocabulary + 4 * shape.hidden)
        memory = {**base, "student's weights": _trained_bytes(count, shape, layers, backend)}
        memory |= {**_optimizer_bytes(count, count, backend), "activations": activations}
        plans[PretrainTeacher.name] = Plan(
            settings.max_steps, settings.batch_size * backend.world_size, _with_fragments(memory, backend)
        )
    return plans | {stage.name: _plan_of_distillation(stage, lengths, base) for stage in setup.distillations}


def _plan_of_distillation(setup: Setup, lengths: np.ndarray, base: Mapping[str, float]) -> Plan:
    arguments, backend = setup.arguments, setup.backend
    teacher, student = Shape.of(setup.teacher_config), Shape.of(setup.student_config)
    layers, captured = depth(setup.matches, student)
    padded = wanted_of(setup.matches)[1].padded
    batch = rows(lengths, arguments.batch_size, padded, backend.device)
    projections = projection_weights(setup.matches, teacher, student)
    count = student.weights(masked_lm=setup.head is not None) + projections
    trained = trained_weights(setup.matches, student) + projections
    held, taken = zip(
        *(
            match_bytes(match, teacher, student, lengths, arguments.batch_size, batch.tokens, backend)
            for match in setup.matches
        )
    )
    memory = {
        **base,
        "teacher's weights": _frozen_bytes(teacher, backend),
        "student's weights": _trained_bytes(count, student, layers, backend),
        **_optimizer_bytes(trained, count, backend),
        "activations": activation_bytes(student, setup.student_config, layers, batch, backend, captured > 0),
        OBJECTIVE: sum(held) + max(taken),
    }
    return Plan(setup.training.max_steps, setup.lines_per_update, _with_fragments(memory, backend))


def depth(matches: Sequence[Match], student: Shape) -> tuple[int, int]:
    """How many of the student's layers run whole, and how many of the next layer's Q, K, V are compared."""
    _, wanted = wanted_of(matches)
    layers = max([*wanted.states, *wanted.qkv, len(student.layers) if wanted.logits else 0])
    of_next = [
        3 if isinstance(part, RelationMatch) else 2
        for match in matches
        for part in match.parts
        if isinstance(part, (RelationMatch, AttentionMatch)) and part.student == layers
    ]
    return layers, max(of_next, default=0)


def trained_weights(matches: Sequence[Match], student: Shape) -> int:
    """The student's weights that get a gradient, without projections."""
    if wanted_of(matches)[1].logits:
        return student.weights(masked_lm=True)
    return student.reached_weights(*depth(matches, student))


def projection_weights(matches: Sequence[Match], teacher: Shape, student: Shape) -> int:
    return len(projections_of(matches)) * teacher.hidden * (student.hidden + 1)


def _with_fragments(memory: dict[str, float], backend: Backend) -> dict[str, float]:
    if backend.device != "cpu":
        return memory
    transient = sum(memory.get(name, 0.0) for name in ("gradients", "activations", OBJECTIVE))
    return {**memory, "fragments": FRAGMENTS[backend.name] * transient}


def _trained_bytes(count: int, shape: Shape, layers: int, backend: Backend) -> float:
    """Weights in float32 and, in low precision, the copies that the products of so many layers read."""
    copies = 0 if backend.precision == "float32" else product_bytes(backend)
    return 4.0 * count + copies * shape.layer_weights(layers)


def _frozen_bytes(shape: Shape, backend: Backend) -> float:
    products = shape.layer_weights()
    twice = backend.name == "torch" and backend.device == "cpu" and backend.precision == "bfloat16"
    return 4.0 * (shape.weights() - products) + product_bytes(backend) * products * (2 if twice else 1)


def _optimizer_bytes(count: int, weights: int, backend: Backend) -> dict[str, float]:
    """What `count` of the weights that have gradients need beside themselves."""
    sizes = {"gradients": 4.0 * count, "Adam's moments": 8.0 * count}
    if backend.world_size > 1:
        sizes["DDP's buckets"] = 4.0 * (weights - count if backend.name == "torch" else weights)
    return sizes


def kept_checkpoints(training: TrainingArguments, steps: int) -> tuple[int, int]:
    """How many checkpoints a phase writes, and how many of them stay."""
    written = [*range(training.save_steps, steps, training.save_steps), steps]
    interval = training.keep_every
    kept = {*written[-training.keep_checkpoints :], *(step for step in written if interval and step % interval == 0)}
    return len(written), len(kept)


def _expected(setup: Setup, plans: Mapping[str, Plan], tokens: float) -> str:
    """The table of what is reckoned; `tokens` is of a line."""
    arguments, backend = setup.arguments, setup.backend
    teacher = Shape.of(setup.distillations[0].teacher_config)
    head = [
        ["teacher", f"{teacher}, {teacher.weights():,} parameters"],
        *([stage.role, _trained(stage)] for stage in setup.distillations),
        ["processes", f"{backend.world_size}, {backend.name} on {backend.device}, {backend.precision}"],
        ["tokens a line", f"{tokens:.1f}, on average; at most {arguments.max_seq_length} are kept"],
    ]
    names = {key: None for stage in plans.values() for key in stage.memory}
    table = [
        ["", *plans],
        ["steps", *(f"{stage.steps:,}" for stage in plans.values())],
        ["lines a step", *(f"{stage.lines:,}" for stage in plans.values())],
        ["tokens a step", *(f"{stage.lines * tokens:,.0f}" for stage in plans.values())],
        ["lines in all", *(f"{stage.steps * stage.lines:,}" for stage in plans.values())],
        [
            "passes over the text",
            *(f"{stage.steps * stage.lines / len(setup.corpus):.2f}" for stage in plans.values()),
        ],
        ["tokens in all", *(f"{stage.steps * stage.lines * tokens:,.0f}" for stage in plans.values())],
        ["memory of a device"],
        *(
            [
                f"  {name}",
                *(_bytes(stage.memory[name]) if name in stage.memory else "" for stage in plans.values()),
            ]
            for name in names
        ),
        ["  expected", *(_bytes(sum(stage.memory.values())) for stage in plans.values())],
    ]
    return "\n".join([*(f"{name:24}{text}" for name, text in head), "", aligned(table)])


def _trained(setup: Setup) -> str:
    """What learns in a distillation."""
    teacher, student = Shape.of(setup.teacher_config), Shape.of(setup.student_config)
    projections = projection_weights(setup.matches, teacher, student)
    return (
        f"{student}, {student.weights(setup.head is not None):,} parameters, "
        f"{trained_weights(setup.matches, student):,} of them trained"
        + (f", and {projections:,} of projections" if projections else "")
    )


def _measured(setup: Setup, plans: Mapping[str, Plan], timed: Mapping[str, Timed], peaks: Sequence[int]) -> str:
    """The table of what was timed."""
    arguments, steps = setup.arguments, list(timed.values())
    counts = [kept_checkpoints(setup.training, stage.steps) for stage in plans.values()]
    times = [
        stage.steps * fmean(step.seconds) + written * step.checkpoint_seconds
        for stage, step, (written, _) in zip(plans.values(), steps, counts)
    ]
    # one more while it is written, and in the end the model, for either framework
    disk = [(kept + 1) * step.checkpoint_bytes for step, (_, kept) in zip(steps, counts)]
    stages = setup.distillations
    models = [stages[0].teacher_config, *(stage.student_config for stage in stages)][-len(disk) :]
    disk = [checkpoints + 8 * Shape.of(model).weights() for checkpoints, model in zip(disk, models)]
    place = Path(arguments.output_dir).absolute()
    while not place.exists():
        place = place.parent
    table = [
        ["  measured so far", *map(_bytes, peaks)],
        ["seconds a step", *(f"{fmean(step.seconds):.3f}" for step in steps)],
        ["lines a second", *(f"{step.sequences_per_second:,.1f}" for step in steps)],
        ["tokens a second", *(f"{step.tokens_per_second:,.0f}" for step in steps)],
        ["seconds a checkpoint", *(f"{step.checkpoint_seconds:.2f}" for step in steps)],
        ["a checkpoint", *(_bytes(step.checkpoint_bytes) for step in steps)],
        ["checkpoints written", *(f"{written:,}" for written, _ in counts)],
        ["checkpoints kept", *(f"{kept:,}" for _, kept in counts)],
        ["disk", *map(_bytes, disk)],
        ["time", *map(_duration, times)],
    ]
    ends = [
        f"{'in all':24}{_duration(sum(times))}, {_bytes(sum(disk))} of disk; "
        f"{_bytes(shutil.disk_usage(place).free)} are free in {place}",
        *(["not counted             measuring on eval_dir, before and after"] if setup.held_out else []),
    ]
    return "\n".join([aligned(table), "", *ends])


def aligned(table: Sequence[Sequence[str]]) -> str:
    """Lines of a first column to the left and others to the right."""
    return "\n".join(f"{first:24}{''.join(f'{text:>20}' for text in rest)}".rstrip() for first, *rest in table)


def _bytes(count: float) -> str:
    return f"{count / 2**30:,.2f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60:,} h {minutes % 60:02} min" if minutes else f"{seconds:.0f} s"
