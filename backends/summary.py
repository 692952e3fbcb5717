"""What a model is made of: parameters by module, the memory they take, the operations of a sequence."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from backends.files import InputError
from backends.interface import HEADS, Head
from backends.pretrained import CLASS_SUFFIXES, TIED, read_config, read_weights
from backends.shape import BUFFERS, Shape

_LAYER = re.compile(r"encoder\.layer\.(\d+)\.(.+)")
_HEAD_WEIGHTS: Mapping[str, tuple[Head, ...]] = {
    "cls.predictions.transform.dense.weight": ("masked_lm",),
    "qa_outputs.weight": ("question_answering",),
    "classifier.weight": ("sequence_classification", "token_classification"),
}
"""A weight that a head has -> the heads that have one of that name."""
ADAM = 4
"""Numbers that training by Adam keeps of a weight: itself, its gradient and two moments."""


class Module(NamedTuple):
    """A module of a model, or several alike of which it tells the sum."""

    depth: int
    """Modules that it is in; 0 is the model itself."""
    name: str
    parameters: int


def parameters(folder: Path) -> dict[str, int]:
    """Counts the numbers of each weight of a folder; the word embeddings, which the head of masked language modelling
    shares, once.

    Raises:
        InputError: see `backends.pretrained.read_weights`.
    """
    weights = read_weights(folder)
    return {name: array.size for name, array in weights.items() if name not in (*TIED, *BUFFERS)}


def modules(counts: Mapping[str, int]) -> list[Module]:
    """Lists the modules of a model, each before those that are in it, with the sums of their weights. Layers side by
    side whose weights are alike are told together."""
    layers: dict[int, dict[str, int]] = {}
    for name, count in counts.items():
        if match := _LAYER.fullmatch(name):
            layers.setdefault(int(match[1]), {})[match[2]] = count
    place: dict[int, str] = {}
    for _, alike in groupby(sorted(layers), key=lambda number: sorted(layers[number].items())):
        first, *others = alike
        place |= dict.fromkeys([first, *others], f"{first} to {others[-1]}" if others else str(first))
    totals: dict[tuple[str, ...], int] = {}
    ordered = sorted(counts.items(), key=lambda item: _order(item[0]))
    for name, count in ordered:
        path = tuple(name.split("."))
        if match := _LAYER.fullmatch(name):
            path = ("encoder", f"layer {place[int(match[1])]}", *match[2].split("."))
        for end in range(len(path)):
            totals[path[:end]] = totals.get(path[:end], 0) + count
    return [Module(len(path), path[-1] if path else "model", count) for path, count in _nested(totals)]


def _order(name: str) -> tuple[int, int]:
    """What a weight is sorted by: the part of the model, and the layer."""
    match = _LAYER.fullmatch(name)
    parts = ("embeddings", "encoder", "pooler")
    part = name.partition(".")[0]
    return parts.index(part) if part in parts else len(parts), int(match[1]) if match else 0


def _nested(totals: Mapping[tuple[str, ...], int], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], int]]:
    yield path, totals[path]
    for inner in totals:
        if len(inner) == len(path) + 1 and inner[: len(path)] == path:
            yield from _nested(totals, inner)


def head_of(config: Mapping[str, Any], counts: Mapping[str, int]) -> Head | None:
    """Tells a model's head by its weights, and by the class that its configuration names where two heads have such."""
    heads = next((heads for name, heads in _HEAD_WEIGHTS.items() if name in counts), ())
    named = [
        head
        for head in HEADS
        if any(str(name).endswith(CLASS_SUFFIXES[head]) for name in config.get("architectures", ()))
    ]
    return next((head for head in heads if head in named), heads[0] if heads else None)


def operations(shape: Shape, head: Head | None, classes: int, length: int) -> dict[str, float]:
    """Floating-point operations of the products for one sequence, forward, each layer for all tokens, by part."""
    n, width = float(length), shape.hidden
    parts = {
        "layers": sum(layer.operations(width, np.array([length])) for layer in shape.layers),
        "head": {
            None: 2 * width * width,  # the pooler
            "masked_lm": n * 2 * width * (width + shape.vocabulary),
            "sequence_classification": 2 * width * (width + classes),
        }.get(head, n * 2 * width * classes),
    }
    return {**parts, "in all": sum(parts.values())}


def summary(folder: Path, max_seq_length: int) -> str:
    """Returns a table of a model's modules, and lines on memory and operations.

    Raises:
        InputError: the folder's model cannot be read, or has not so many positions.
    """
    config = read_config(folder)
    shape = Shape.of(config)
    if not 1 <= max_seq_length <= shape.positions:
        raise InputError(
            f"--max_seq_length {max_seq_length}: must be from 1 to {shape.positions}, the model's positions"
        )
    counts = parameters(folder)
    head = head_of(config, counts)
    rows = modules(counts)
    total = rows[0].parameters
    width = max(2 * row.depth + len(row.name) for row in rows) + 2
    lines = [
        f"{folder}: {config['model_type']}, {shape}, {head.replace('_', ' ') if head else 'no'} head",
        "",
        f"{'':{width}}{'parameters':>14}{'share':>9}{'MiB, float32':>15}",
    ]
    for row in rows:
        name = "  " * row.depth + row.name
        share, size = row.parameters / total, _mebibytes(4 * row.parameters)
        lines.append(f"{name:{width}}{row.parameters:>14,}{share:>9.1%}{size:>15}")
    classes = 2 if head == "question_answering" else counts.get("classifier.weight", 0) // shape.hidden
    by_part = operations(shape, head, classes, max_seq_length)
    lines += [
        "",
        f"memory of weights, MiB: {_mebibytes(4 * total)} in float32, {_mebibytes(2 * total)} in bfloat16 or float16; "
        f"{_mebibytes(4 * ADAM * total)} with their gradients and Adam's moments",
        f"operations for {max_seq_length} tokens, GFLOP: "
        + ", ".join(f"{part} {count / 1e9:,.3f}" for part, count in by_part.items()),
    ]
    return "\n".join(lines)


def _mebibytes(size: int) -> str:
    return f"{size / (1 << 20):,.1f}"
