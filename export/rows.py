"""Rows of the server's queue: an example, strings or tokens each, and what the model computes of them together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from export.examples import FIELDS, from_object
from export.model import OnnxModel

CHARACTER = "的"
"""Character that the model is warmed up with."""


@dataclass(frozen=True)
class StringRow:
    """Strings for a model that tokenizes."""

    text: str
    text_pair: str = ""


@dataclass(frozen=True)
class ExampleRow:
    """An example, and how many answers are wanted; 0 if nothing is said."""

    example: Any
    top_k: int = 0


def compute(model: OnnxModel, rows: list[Any]) -> list[Any]:
    """Returns the results of rows: answers to examples, outputs for strings and for tokens (int64 [3, length])."""
    results: list[Any] = [None] * len(rows)
    kinds: dict[type, list[int]] = {}
    for i, row in enumerate(rows):
        kinds.setdefault(type(row), []).append(i)
    for kind, indices in kinds.items():
        for i, result in zip(indices, _compute_kind(model, kind, [rows[i] for i in indices])):
            results[i] = result
    return results


def _compute_kind(model: OnnxModel, kind: type, rows: list[Any]) -> Sequence[Any]:
    if kind is np.ndarray:
        return model.run_rows(rows)
    if kind is StringRow:
        pairs = [row.text_pair for row in rows] if model.takes_pairs else None
        return list(zip(*model.classify([row.text for row in rows], pairs)))
    answers = model.answers([row.example for row in rows], max(row.top_k for row in rows))
    return [_shortened(answer, row.top_k) for answer, row in zip(answers, rows)]


def _shortened(answer: dict[str, Any], top_k: int) -> dict[str, Any]:
    """Returns an answer of the model as it goes out, with as many of the best as were asked for."""
    answer = {key: value for key, value in answer.items() if key != "id" and (top_k or key != "top_k")}
    return {key: value[:top_k] if top_k and key in ("top_k", "n_best") else value for key, value in answer.items()}


def warm_up(model: OnnxModel) -> None:
    """Runs all that requests will need: the model alone and in parts, the tokenizer.

    Raises:
        InputError: the file cannot answer.
    """
    if model.in_graph:
        compute(model, [StringRow(CHARACTER * n) for n in (1, 200)])
    else:
        compute(model, [np.ones((3, n), np.int64) for n in (2, 2)])
    if model.description.head is not None:
        texts = dict.fromkeys(FIELDS[model.task.kind], CHARACTER)
        if model.task.kind == "labelling" or model.takes_pairs is False:
            texts = {"text": CHARACTER}
        compute(model, [ExampleRow(from_object(model, texts, number)) for number in range(2)])
