"""A model's logits for the sequences of a task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from backends.interface import Backend, Batch, Captured, Wanted
from text.features import Features, by_length

TOKENS_AT_ONCE = {"cpu": 2048}
"""Tokens of a batch that is evaluated, by device; on a CPU what its caches hold."""


class Answering(Protocol):
    """A model, or several as one."""

    def run(self, batch: Batch, wanted: Wanted) -> Captured: ...


def predict(
    backend: Backend, model: Answering, features: Features, among: Sequence[int] | None = None
) -> list[np.ndarray]:
    """Computes a model's logits for each sequence, or each of those `among` them, without padding; several processes
    share the work.

    Returns:
        float32 [classes] each (classification), or of each token, [n, ...].
    """
    numbers = np.arange(len(features)) if among is None else np.asarray(among)
    batches = [
        numbers[batch] for batch in by_length(features.lengths[numbers], TOKENS_AT_ONCE.get(backend.device, 1 << 15))
    ]
    logits: dict[int, np.ndarray] = {}
    for turn in range(0, len(batches), backend.world_size):
        # In the last turn, processes for which no batch is left compute the last one too.
        shares = [batches[min(turn + rank, len(batches) - 1)] for rank in range(backend.world_size)]
        with backend.no_grad(), backend.autocast():
            output = model.run(features.batch(shares[backend.rank]), Wanted(logits=True)).logits.float()
        outputs = backend.gather(output) if backend.world_size > 1 else [output]
        for share, values in zip(shares, outputs):
            sizes = [1 if features.a_row_each else len(features.ids[i]) for i in share]
            for i, rows in zip(share, np.split(backend.numpy(values), np.cumsum(sizes)[:-1])):
                logits[int(i)] = rows[0] if features.a_row_each else rows
    return [logits[i] for i in numbers.tolist()]
