"""Models that run on tokens alone, no padding among them.

The tokens of a batch lie one after another, [T, D], through all that looks at
one token at a time, which is nearly all of a BERT. Attention sees the sequences,
equally long neighbours together. So a batch costs what its tokens cost, whatever
lengths are mixed in it, and its results are those of the padded batch.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from backends.interface import QKV, Backend, Batch, Head, Model, Tensor
from backends.settings import library_settings


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

    def asked(self, q: Tensor) -> list[int]:
        """How many rows of q each run has: its tokens, or where q is of sequences' first tokens, its sequences."""
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
        None if len(rows) == mask.size else backend.tensor(rows),
        None if keys.all() else backend.tensor(keys[:, None, None, :]),
        padded,
        [(len(list(run)), int(length)) for length, run in groupby(kept.sum(axis=1)) if length]
        + [(fillers, 1)] * (fillers > 0),
    )


class PackedModel(Model):
    """A model of a framework's library, run layer by layer on packed tokens."""

    backend: Backend

    def __init__(self, backend: Backend, config: Mapping[str, Any], head: Head | None) -> None:
        self.backend, self.config, self.head = backend, dict(config), head
        self.settings = library_settings(config, head, backend.activations, backend.name)
        """What the library is told of the model."""

    @abstractmethod
    def _embed(self, packed: Packed) -> Tensor:
        """Embeddings, [T', D]."""

    @abstractmethod
    def _project(self, layer: int, x: Tensor, asking: Tensor) -> QKV:
        """A layer's K and V of its input x, [T', D] each, and Q of `asking`, x itself or some of its rows."""

    @abstractmethod
    def _layer(self, layer: int, x: Tensor, qkv: QKV, packed: Packed) -> Tensor:
        """A layer's output for the rows of its input that ask, all [T', D] or each sequence's first, [B, D]."""

    def qkv(self, batch: Batch, layers: Sequence[int], padded: bool = False) -> dict[int, QKV]:
        packed = pack(self.backend, batch, padded)
        x = self._embed(packed)
        found: dict[int, QKV] = {}
        for layer in range(max(layers) + 1):
            qkv = self._project(layer, x, x)
            if layer in layers:
                found[layer] = QKV(*(packed.without_fillers(side) for side in qkv))
            if layer < max(layers):
                x = self._layer(layer, x, qkv, packed)
        return found

    def hidden_states(self, batch: Batch) -> Tensor:
        packed = pack(self.backend, batch, padded=False)
        x = self._embed(packed)
        for layer in range(self.config["num_hidden_layers"]):
            x = self._layer(layer, x, self._project(layer, x, x), packed)
        return packed.without_fillers(x)

    def first_states(self, batch: Batch) -> Tensor:
        """The last layer's output for each sequence's first token, [B, D]; it is not computed for the others."""
        packed = pack(self.backend, batch, padded=False)
        x = self._embed(packed)
        last = self.config["num_hidden_layers"] - 1
        for layer in range(last):
            x = self._layer(layer, x, self._project(layer, x, x), packed)
        first = x[self.backend.tensor(batch.first_rows)]
        return self._layer(last, first, self._project(last, x, first), packed)
