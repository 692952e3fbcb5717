"""Groups of tokens that are related to each other, and their relation matrices in blocks.

    relation       a group is                   related are
    token-token    the tokens of a sample       tokens, head by head
    sample-sample  the tokens at a position     samples, head by head
    head-head      one token                    its heads

Only tokens that count are in groups, so padding costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np

from backends.interface import Backend, Tensor

Padding = Literal["masked", "ppminilm"]
RELATIONS = ("token", "head", "sample")


class Groups(NamedTuple):
    """G groups of n tokens each."""

    rows: np.ndarray
    """int64 [G, n], indices into the B * L tokens of the batch."""
    weight: float
    """What one row of one head's relation matrix counts in the loss."""
    bias: np.ndarray | None = None
    """float32 [G, n], added to the scores of each key."""


class Tokens(NamedTuple):
    """The tokens of a batch of B sequences, L positions long, and how many there are of what losses are means over.

    Of several processes that share a batch, the counts are the mean of all: what is divided by them is, averaged over
    the processes, that of the whole batch.
    """

    mask: np.ndarray
    """bool [B, L]."""
    row_of: np.ndarray
    """int64 [B * L], which of the T tokens stands at each position that holds one."""
    sequences: float
    """That have tokens."""
    tokens: float
    pairs: float
    """Of tokens of one sequence: elements of an attention matrix."""

    @classmethod
    def of(cls, backend: Backend, attention_mask: np.ndarray, together: bool = False) -> Tokens:
        """From [B, L], nonzero at tokens; `together`, several processes share a batch."""
        mask = np.asarray(attention_mask).astype(bool)
        lengths = mask.sum(axis=1)
        counts = np.array([(lengths > 0).sum(), lengths.sum(), (lengths**2).sum()], np.float64)
        if together:
            counts = backend.total(counts) / backend.world_size
        return cls(mask, mask.reshape(-1).cumsum() - 1, *np.maximum(counts, 1.0).tolist())


def _alike(mask: np.ndarray, rows: np.ndarray) -> Iterator[np.ndarray]:
    """The valid entries of each line of `rows`, lines with equally many stacked."""
    counts = mask.sum(axis=1)
    for count in np.unique(counts[counts > 0]):
        lines = counts == count
        yield rows[lines][mask[lines]].reshape(-1, count)


def token_groups(mask: np.ndarray, heads: int, padding: Padding) -> Iterator[Groups]:
    samples, length = mask.shape
    rows = np.arange(samples * length).reshape(samples, length)
    if padding == "ppminilm":
        # A sample without any token has the same bias on all keys, where soft-max ignores it.
        bias = np.where(mask | ~mask.any(axis=1, keepdims=True), 0.0, -1e4).astype(np.float32)
        yield Groups(rows, 1.0 / (heads * length * samples), bias)
        return
    nonempty = int(mask.any(axis=1).sum())
    for group in _alike(mask, rows):
        yield Groups(group, 1.0 / (nonempty * heads * group.shape[1]))


def sample_groups(mask: np.ndarray, heads: int, padding: Padding) -> Iterator[Groups]:
    samples, length = mask.shape
    rows = np.arange(samples * length).reshape(samples, length).T
    if padding == "ppminilm":
        yield Groups(rows, 1.0 / (heads * length * samples))
        return
    for group in _alike(mask.T, rows):
        yield Groups(group, 1.0 / (heads * int(mask.sum())))


def head_groups(mask: np.ndarray, heads: int, padding: Padding) -> Iterator[Groups]:
    rows = np.flatnonzero(mask) if padding == "masked" else np.arange(mask.size)
    if rows.size:
        yield Groups(rows[:, None], 1.0 / (heads * rows.size))


GROUPS = {"token": token_groups, "head": head_groups, "sample": sample_groups}


def blocks(groups: Groups, heads: int, relation: str, limit: int) -> Iterator[tuple[slice, int, int]]:
    """Cuts groups into blocks of relation matrices with at most `limit` elements, but at least a matrix.

    Yields:
        A slice of the groups, the first head and the end of the heads.
    """
    count, size = groups.rows.shape
    elements = heads**2 * size if relation == "head" else heads * size**2
    step = max(1, limit // elements)
    head_step = heads
    if relation != "head" and elements > limit:
        head_step = max(1, limit // size**2)
    for start in range(0, count, step):
        for first in range(0, heads, head_step):
            yield slice(start, start + step), first, min(first + head_step, heads)


def split(x: Tensor, heads: int, relation: str, shape: Sequence[int]) -> Tensor:
    """Tokens of groups [G * n, heads * d] -> the vectors that are related, [N, n', d]."""
    count, size = shape
    x = x.reshape([count, size, heads, -1])
    if relation == "head":
        return x.reshape([count * size, heads, -1])
    return x.swapaxes(1, 2).reshape([count * heads, size, -1])


def merge(x: Tensor, heads: int, relation: str, shape: Sequence[int]) -> Tensor:
    """The reverse of `split`."""
    count, size = shape
    if relation != "head":
        x = x.reshape([count, heads, size, -1]).swapaxes(1, 2)
    return x.reshape([count * size, -1])
