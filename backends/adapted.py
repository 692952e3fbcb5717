"""Modules of one's own as models: what both rooms share of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from backends.files import InputError
from backends.interface import QKV, Backend, Batch, Captured, Forward, Inputs, Model, Outputs, Tensor, Wanted
from backends.shape import LayerShape, Shape

NO_ATTENTION = LayerShape(0, 0, 0)


class AdaptedModel(Model):
    """A module that computes padded batches in a way of its own, of which a function tells.

    Of its `shape` only widths, layers and heads are known, other sizes are 0; its `config` is empty.
    """

    def __init__(self, backend: Backend, module: Any, forward: Forward) -> None:
        self.backend, self.module, self.forward = backend, module, forward
        self.config, self.head, self.rates = {}, None, {}
        self.train(False)
        self.shape = self._find_shape()

    def _find_shape(self) -> Shape:
        """Sizes of what the function gives of a batch of two."""
        mask = np.array([[1, 1, 1], [1, 1, 0]], np.int64)
        with self.backend.no_grad(), self.backend.autocast():
            outputs = self._ask(Batch(np.zeros_like(mask), np.zeros_like(mask), mask))
        if not isinstance(outputs, Outputs):
            raise InputError(f"the function of the module gave {type(outputs).__name__}; it must give Outputs")
        if outputs.logits is not None:
            per_token = len(outputs.logits.shape) == 3
            _check_form("logits", outputs.logits, ["length", "classes"] if per_token else ["classes"])
        for number, x in enumerate(outputs.states):
            _check_form(f"states {number}", x, ["length", "width"])
        for number, layer in enumerate(outputs.qkv):
            for name, x in zip(QKV._fields, layer):
                _check_form(f"{name} of layer {number}", x, ["length", "heads", "head size"])
        widths = [x.shape[2] for x in outputs.states]
        if len({*widths}) > 1:
            raise InputError(f"states: are {widths} wide; give those of one width")
        if outputs.states and outputs.qkv and len(outputs.states) != len(outputs.qkv) + 1:
            raise InputError(
                f"states: {len(outputs.states)} beside Q, K, V of {len(outputs.qkv)} layers; give one more, or none"
            )
        layers = [LayerShape(layer.q.shape[2], layer.q.shape[3], 0) for layer in outputs.qkv]
        layers = layers or [NO_ATTENTION] * (len(outputs.states) - 1)
        return Shape(0, 0, 0, widths[0] if widths else 0, tuple(layers))

    def _ask(self, batch: Batch) -> Outputs:
        return self.forward(self.module, Inputs(*map(self.backend.tensor, batch[:3])))

    def run(self, batch: Batch, wanted: Wanted) -> Captured:
        outputs, mask = self._ask(batch), batch.attention_mask
        states, layers = len(outputs.states), len(outputs.qkv)
        if (
            not {*wanted.states} <= {*range(states)}
            or not {*wanted.qkv} <= {*range(layers)}
            or (wanted.logits and outputs.logits is None)
        ):
            asked = f"states {[*wanted.states]}, Q, K, V of layers {[*wanted.qkv]}{', logits' * wanted.logits}"
            given = f"{states} states, Q, K, V of {layers} layers and {'no ' * (outputs.logits is None)}logits"
            raise InputError(f"{asked}: are wanted, and the function of the module gives {given}")
        whole = wanted.padded or bool(mask.all())
        tokens = None if whole else self.backend.tensor(np.flatnonzero(mask))

        def rows(x: Tensor, at: Tensor | None = tokens) -> Tensor:
            x = x.reshape([mask.size, -1])
            return x if at is None else x[at]

        logits: Any = outputs.logits if wanted.logits else None
        if logits is not None and len(logits.shape) == 3:
            logits = rows(logits) if wanted.at is None else rows(logits, self.backend.tensor(wanted.at))
        return Captured(
            {state: rows(outputs.states[state]) for state in wanted.states},
            {layer: QKV(*map(rows, outputs.qkv[layer])) for layer in wanted.qkv},
            logits,
        )

    def export_onnx(self, path: Path) -> None:
        raise InputError(f"{path}: a module of one's own is exported by its framework, not here")


def _check_form(name: str, x: Tensor, form: Sequence[str]) -> None:
    """Raises InputError unless x, of 2 sequences of length 3, is [batch, *form]."""
    sizes = list(x.shape)
    known = [2, 3] if "length" in form else [2]
    if len(sizes) != len(form) + 1 or sizes[: len(known)] != known:
        raise InputError(f"{name}: {sizes} of a batch of 2, length 3; must be [batch, {', '.join(form)}]")
