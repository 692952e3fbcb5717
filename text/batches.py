"""Batches from a corpus: shuffled over all files, sharded, restorable at any position."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

logging.getLogger("absl").setLevel(logging.ERROR)  # grain's word on a profiler that nobody asked for

import grain  # noqa: E402

from text.corpus import Lines  # noqa: E402

T = TypeVar("T")


def line_batches(
    corpus: Lines[Any],
    make: Callable[[int, list[Any]], T],
    *,
    batch_size: int,
    seed: int,
    start: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[T]:
    """An endless iterator of ``make(position, lines)``, prefetched in a thread.

    All processes draw from one order of lines: every epoch another permutation of all, which follows
    from the seed alone. Batches run on over an epoch's end, so each line comes once an epoch, whatever divides
    what; and lines come in the same order with another batch size or number of processes.

    Args:
        make: turns lines, and the position of the first in that order, into what training needs.
        batch_size: lines a batch.
        start: the position to start from, for all processes together: there is no other state.
        rank, world_size: every world_size-th batch is this rank's.
    """
    lines: Any = grain.MapDataset.source(corpus).seed(seed).shuffle().repeat()
    batches = lines[start:].batch(batch_size, batch_fn=list)[rank::world_size]

    def numbered(index: int, some: list[Any]) -> T:
        return make(start + (index * world_size + rank) * batch_size, some)

    return iter(
        batches.map_with_index(numbered).to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=8))
    )
