"""Batches from a corpus: shuffled over all files, sharded, restorable at any position."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import numpy as np

logging.getLogger("absl").setLevel(logging.ERROR)  # grain logs that a profiler is absent, which it does not need

import grain  # noqa: E402

from text.corpus import Lines  # noqa: E402

T = TypeVar("T")


class Drawn(NamedTuple):
    """Lines that a batch is made of."""

    position: int
    """Position of the first line in the order in which a run draws lines."""
    numbers: np.ndarray
    """int64 [n], the lines' numbers in the corpus."""
    lines: list[Any]


class _Numbered:
    """A corpus whose lines come with their numbers."""

    def __init__(self, corpus: Lines[Any]) -> None:
        self.corpus = corpus

    def __len__(self) -> int:
        return len(self.corpus)

    def __getitem__(self, number: int) -> tuple[int, Any]:
        return number, self.corpus[number]


def line_batches(
    corpus: Lines[Any],
    make: Callable[[Drawn], T],
    *,
    batch_size: int,
    seed: int,
    start: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[T]:
    """Makes an endless iterator of ``make(drawn)``, prefetched in a thread.

    All processes draw from one order of lines: another permutation of all in each epoch, which follows
    from the seed alone. Batches run on over an epoch's end, so each line comes once an epoch, whatever divides
    what; and lines come in the same order with another batch size or number of processes.

    Args:
        make: turns lines into what training needs.
        batch_size: lines per batch.
        start: the position to start from, for all processes together: there is no other state.
        rank, world_size: every world_size-th batch is this rank's.
    """
    lines: Any = grain.MapDataset.source(_Numbered(corpus)).seed(seed).shuffle().repeat()
    batches = lines[start:].batch(batch_size, batch_fn=list)[rank::world_size]

    def drawn(index: int, numbered: list[tuple[int, Any]]) -> T:
        numbers, lines = zip(*numbered)
        return make(Drawn(start + (index * world_size + rank) * batch_size, np.array(numbers), list(lines)))

    return iter(batches.map_with_index(drawn).to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=8)))
