"""Duplicate lines, exact and near ones, of a corpus larger than memory.

A line's sketch is its MinHash (Broder, 1997) over character trigrams, by rensa. Bands of a sketch are keys, and
lines that share one are candidates (locality-sensitive hashing, Indyk and Motwani, 1998); whether they are near
duplicates, the share of equal values in their sketches says, which estimates the Jaccard similarity of their
trigrams. Keys lie on disk in sorted runs, and are looked through a range of keys at a time.

A line is dropped if an earlier one has its text, or if one of the `NEIGHBOURS` lines before it under one of its
keys is similar to it. So the result depends on the text and its order alone, not on the order of the tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np
from rensa import RMinHash

BANDS, ROWS = 10, 6
"""At a similarity of 0.8 a pair shares a key with probability 0.95, at 0.5 with 0.15."""
NEIGHBOURS = 8
WIDTH = BANDS * ROWS
"""Values of a sketch."""
RUN = np.dtype([("key", "<u8"), ("row", "<u4")])
_PRIME = np.uint64(0x9E3779B97F4A7C15)


def sketches(lines: Sequence[str]) -> np.ndarray:
    """Computes MinHashes, uint32 [len(lines), WIDTH]."""
    points = np.frombuffer("".join(f"{line}\0\0" for line in lines).encode("utf-32-le"), "<u4").astype(np.uint64)
    trigrams = (points[:-2] << np.uint64(42)) | (points[1:-1] << np.uint64(21)) | points[2:]
    lengths = np.fromiter(map(len, lines), np.int64, len(lines))
    counts = np.maximum(lengths - 2, 1)
    ends = np.cumsum(counts)
    # Where each line's trigrams are, those that reach into the next line left out.
    starts = np.cumsum(lengths + 2) - (lengths + 2)
    where = np.arange(ends[-1]) + np.repeat(starts - (ends - counts), counts)
    offsets = np.concatenate([[0], ends]).astype(np.uint64)
    digests = RMinHash.digest_matrix_from_flat_token_hashes(trigrams[where], offsets, WIDTH, 1)
    return np.array(digests.to_rows(), np.uint32).reshape(len(lines), WIDTH)


def keys_of(lines: Sequence[str], sketch: np.ndarray | None) -> np.ndarray:
    """Computes keys, uint64 [len(lines), 1 + BANDS], or [len(lines), 1] without sketches. Keys of whole texts are odd,
    keys of bands even."""
    texts = b"".join(blake2b(line.encode(), digest_size=8).digest() for line in lines)
    exact = np.frombuffer(texts, "<u8")[:, None] | np.uint64(1)
    if sketch is None:
        return exact
    parts = np.ascontiguousarray(sketch).view("<u8").reshape(len(lines), BANDS, ROWS // 2)
    keys = np.broadcast_to(np.arange(1, BANDS + 1, dtype=np.uint64), parts.shape[:2])
    for i in range(ROWS // 2):
        keys = (keys ^ parts[..., i]) * _PRIME
        keys = keys ^ (keys >> np.uint64(29))
    return np.concatenate([exact, keys & ~np.uint64(1)], axis=1)


def sorted_run(keys: np.ndarray, first_row: int) -> np.ndarray:
    """Sorts the keys of lines from `first_row` on, each with its row: `RUN` [N].

    Of equal texts only the first has keys of bands: a text that is repeated a million times must not fill a range.
    """
    firsts = np.sort(np.unique(keys[:, 0], return_index=True)[1])
    bands = keys[firsts, 1:]
    values = np.concatenate([keys[:, 0], bands.reshape(-1)])
    rows = np.concatenate([np.arange(len(keys)), np.repeat(firsts, bands.shape[1])])
    order = np.argsort(values, kind="stable")
    run = np.empty(len(values), RUN)
    run["key"], run["row"] = values[order], first_row + rows[order]
    return run


def candidates(keys: np.ndarray, lines: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Finds copies, and pairs that may be near duplicates, by a range of keys.

    Args:
        keys: uint64 [N], in any order.
        lines: int64 [N], the number of each key's line.

    Returns:
        int64 [D], lines whose text an earlier one has, and int64 [C, 2], pairs of lines, the later first, that
        share a key of a band.
    """
    order = np.lexsort((lines, keys))
    keys, lines = keys[order], lines[order]
    same = keys[1:] == keys[:-1]
    exact = (keys & np.uint64(1)).astype(bool)
    copies = lines[1:][same & exact[1:]]
    pairs = []
    for distance in range(1, NEIGHBOURS + 1):
        near = (keys[distance:] == keys[:-distance]) & ~exact[distance:]
        if not near.any():
            break
        pairs.append(np.stack([lines[distance:][near], lines[:-distance][near]], axis=1))
    similar = np.concatenate(pairs) if pairs else np.empty((0, 2), np.int64)
    return np.unique(copies), np.unique(similar, axis=0)
