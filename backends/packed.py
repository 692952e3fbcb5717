"""Models that run on tokens alone, no padding among them.

The tokens of a batch lie one after another, [T, D], through all that looks at
one token at a time, which is nearly all of a BERT. Attention sees the sequences,
equally long neighbours together. So a batch costs what its tokens cost, whatever
lengths are mixed in it, and its results are those of the padded batch.

Shapes, here and wherever batches are: B sequences of L positions, T of which hold tokens, T' with fillers; D, the width
of hidden states; W, heads x head size of a layer; A, relation heads. Attention's arrays are [B, heads, L, head size].
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np

from backends.interface import QKV, Backend, Batch, Captured, Head, Model, Tensor, Wanted
from backends.settings import library_settings
from backends.shape import LayerShape, Shape

Part = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Packed:
    """The T tokens of a batch of B sequences, L positions long, and fillers up to T', on the device."""

    input_ids: Tensor
    token_type_ids: Tensor
    position_ids: Tensor
    """int64 [T'] each."""
    tokens: int
    """T."""
    shape: tuple[int, int]
    """B, L."""
    row_of: np.ndarray
    """int64 [B * L], which of the T tokens stands at each position, or before it if none does."""
    rows: Tensor | None
    """int64 [T], indices into the B * L positions; None if all of them are there."""
    mask: Tensor | None
    """bool [B, 1, 1, L], the keys that are attended to; None if all are."""
    padded: bool
    """Whether padding runs along."""
    runs: list[tuple[int, int]]
    """(how many, length) of equally long sequences side by side, in order; a filler is a sequence of one."""

    @property
    def sizes(self) -> list[int]:
        """Tokens in each of the runs."""
        return [count * length for count, length in self.runs]

    def rows_asking(self, q: Tensor) -> list[int]:
        """How many rows of q each run has: its tokens, or where q is of one token of each sequence, its sequences."""
        if q.shape[0] != self.shape[0] or q.shape[0] == sum(self.sizes):
            return self.sizes
        return [count for count, _ in self.runs[: len(self.runs) - (sum(self.sizes) > self.tokens)]]

    def without_fillers(self, x: Tensor) -> Tensor:
        """The tokens' rows of x, [T', ...]."""
        return x if x.shape[0] == self.tokens else x[: self.tokens]


def pack(backend: Backend, batch: Batch, padded: bool) -> Packed:
    """The batch's tokens; with `padded` its padding runs along, unattended."""
    mask = batch.attention_mask.astype(bool)
    kept = np.ones_like(mask) if padded else mask
    rows = np.flatnonzero(kept)
    # Soft-max over no key at all is undefined: a line without a token attends to its padding.
    keys = mask | ~mask.any(axis=1, keepdims=True)
    fillers = 0 if padded else -len(rows) % backend.row_multiple
    ids, types, positions = (
        backend.tensor(np.pad(array, (0, fillers)))
        for array in (batch.input_ids.reshape(-1)[rows], batch.token_type_ids.reshape(-1)[rows], rows % mask.shape[1])
    )
    return Packed(
        ids,
        types,
        positions,
        len(rows),
        (mask.shape[0], mask.shape[1]),
        np.maximum(kept.reshape(-1).cumsum() - 1, 0),
        None if len(rows) == mask.size else backend.tensor(rows),
        None if keys.all() else backend.tensor(keys[:, None, None, :]),
        padded,
        [(len(list(run)), int(length)) for length, run in groupby(kept.sum(axis=1)) if length]
        + [(fillers, 1)] * (fillers > 0),
    )


class Layer(NamedTuple):
    """A layer's parts, each the framework's module, by what they do."""

    query: Part
    key: Part
    value: Part
    output: Part
    """Of attention, [., W] -> [., D]."""
    attention_norm: Part
    widen: Part
    activation: Part
    narrow: Part
    norm: Part
    dropout: Part
    shape: LayerShape

    def project(self, x: Tensor, asking: Tensor) -> QKV:
        """K and V of the layer's input x, and Q of `asking`, x itself or some of its rows."""
        return QKV(self.query(asking), self.key(x), self.value(x))

    def finish(self, x: Tensor, context: Tensor) -> Tensor:
        """The layer's output for those rows x of its input that asked, of what attention answered them."""
        x = self.attention_norm(x + self.dropout(self.output(context)))
        return self.norm(x + self.dropout(self.narrow(self.activation(self.widen(x)))))


class PackedModel(Model):
    """A model of a framework's library, run layer by layer on packed tokens."""

    backend: Backend
    module: Any
    """Of the library."""
    encoder: Any
    """The module's, or itself where it has no head."""
    layers: list[Layer]

    def __init__(self, backend: Backend, config: Mapping[str, Any], head: Head | None) -> None:
        self.backend, self.config, self.head, self.shape = backend, dict(config), head, Shape.of(config)
        self.rates = {}
        self.settings = library_settings(config, head, backend.activations, backend.name)
        """What the library is told of the model."""

    @abstractmethod
    def _embed(self, packed: Packed) -> Tensor:
        """Embeddings, [T', D]."""

    @abstractmethod
    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """softmax(Q K^T / sqrt(d)) V, with dropout of the probabilities in training; all [B, heads, L, d].

        Args:
            mask: bool [B, 1, 1, L], the keys that are attended to; None if all are.
        """

    @abstractmethod
    def _spread(self, x: Tensor, rows: Tensor, count: int) -> Tensor:
        """Zeros [count, W] but for x at these rows."""

    @abstractmethod
    def _take(self, x: Tensor, rows: Tensor) -> Tensor:
        """These rows of x."""

    @abstractmethod
    def _ask_head(self, x: Tensor) -> Tensor:
        """Logits of hidden states [R, D]: of whole sequences for sequence classification, else of tokens."""

    def share_encoder(self, other: PackedModel) -> None:
        """Takes the encoder of another model of the same shape for its own."""
        setattr(self.module, self.module.base_model_prefix, other.encoder)
        self.encoder, self.layers = other.encoder, other.layers

    def run(self, batch: Batch, wanted: Wanted) -> Captured:
        self._check(wanted)
        packed = pack(self.backend, batch, wanted.padded)
        count, length = packed.shape
        end = len(self.layers)
        deepest = max([*wanted.states, *wanted.qkv, end if wanted.logits else 0])
        of_firsts = wanted.logits and self.head == "sequence_classification"
        positions = np.arange(count) * length if of_firsts else wanted.at
        rows: Any = None if positions is None else self.backend.tensor(packed.row_of[positions])
        # Where nobody else wants the last layer, and the head one token of each sequence, it computes those alone.
        one_each = positions is not None and np.array_equal(positions // length, np.arange(count))
        alone = wanted.logits and one_each and end not in wanted.states and end - 1 not in wanted.qkv
        states: dict[int, Tensor] = {}
        qkvs: dict[int, QKV] = {}

        x = self._embed(packed)
        for number, layer in enumerate(self.layers):
            if number in wanted.states:
                states[number] = packed.without_fillers(x)
            if number == deepest and number not in wanted.qkv:
                break
            asking = self._take(x, rows) if alone and number == end - 1 else x
            qkv = layer.project(x, asking)
            if number in wanted.qkv:
                qkvs[number] = QKV(*map(packed.without_fillers, qkv))
            if number == deepest:
                break
            x = layer.finish(asking, self._context(layer, qkv, packed))
        if end in wanted.states:
            states[end] = packed.without_fillers(x)
        logits: Any = None
        if wanted.logits:
            if not alone:
                x = packed.without_fillers(x) if rows is None else self._take(x, rows)
            logits = self._ask_head(x)
        return Captured(states, qkvs, logits)

    def _check(self, wanted: Wanted) -> None:
        end = len(self.layers)
        if not all(0 <= state <= end for state in wanted.states) or not all(0 <= layer < end for layer in wanted.qkv):
            raise ValueError(f"states {wanted.states}, qkv {wanted.qkv}: the model has {end} layers")
        if wanted.logits and self.head is None:
            raise ValueError("logits: the model has no head")

    def _context(self, layer: Layer, qkv: QKV, packed: Packed) -> Tensor:
        """What attention answers those who ask, [rows of Q, W]."""
        if self.backend.device == "cpu" and not packed.padded:
            return self._context_of_runs(layer, qkv, packed)
        count, length = packed.shape

        def spread(x: Tensor) -> Tensor:
            if packed.rows is not None and x.shape[0] == packed.tokens:
                x = self._spread(x, packed.rows, count * length)
            return x.reshape([count, x.shape[0] // count, layer.shape.heads, -1]).swapaxes(1, 2)

        q, k, v = map(spread, qkv)
        context = self._attend(q, k, v, packed.mask).swapaxes(1, 2)
        context = context.reshape([context.shape[0] * context.shape[1], -1])
        row_count = qkv.q.shape[0]
        return context if context.shape[0] == row_count or packed.rows is None else self._take(context, packed.rows)

    def _context_of_runs(self, layer: Layer, qkv: QKV, packed: Packed) -> Tensor:
        """The same, equally long neighbours at a time: more operations, less arithmetic."""
        contexts = []
        sizes = packed.rows_asking(qkv.q), packed.sizes, packed.sizes
        for (count, _), *run in zip(packed.runs, *(x.split(of) for x, of in zip(qkv, sizes))):
            rows = run[0].shape[0]
            q, k, v = (x.reshape([count, x.shape[0] // count, layer.shape.heads, -1]).swapaxes(1, 2) for x in run)
            contexts.append(self._attend(q, k, v, None).swapaxes(1, 2).reshape([rows, -1]))
        return self.backend.concat(contexts)
