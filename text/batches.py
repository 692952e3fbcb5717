"""Batches from a corpus: shuffled over all files, sharded, restorable at any position."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

logging.getLogger("absl").setLevel(logging.ERROR)  # grain's word on a profiler that nobody asked for

import grain  # noqa: E402

from text.corpus import Corpus  # noqa: E402

T = TypeVar("T")


def line_batches(
    corpus: Corpus,
    make: Callable[[int, list[str]], T],
    *,
    batch_size: int,
    seed: int,
    start: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[T]:
    """An endless iterator of ``make(number, lines)``, prefetched in a thread.

    Every epoch is another permutation of all lines, which follows from the seed
    alone; batches run on over its end, so each line comes once an epoch. Batch n
    of the run is a function of n: `start` is all there is to restore.

    Args:
        make: turns a batch's number and lines into what training needs.
        batch_size: lines a batch.
        start: the number, on this rank, of the first batch.
        rank, world_size: every world_size-th batch is this rank's.
    """
    dataset: Any = grain.MapDataset.source(corpus).seed(seed).shuffle().repeat()
    dataset = dataset.batch(batch_size, batch_fn=list)[rank::world_size]
    numbered = dataset[start:].map_with_index(lambda index, lines: make(start + index, lines))
    return iter(numbered.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=8)))
