"""What labelled examples teach: classes, spans, tags."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from backends.interface import Backend, Batch, Model, Tensor, Wanted
from text.features import LabelledBatch
from text.tasks import Kind


@dataclass(frozen=True)
class Supervised:
    """Mean cross-entropy of a fine-tuning task; the model has the head of its kind."""

    backend: Backend
    model: Model
    kind: Kind

    def __call__(self, labelled: LabelledBatch, done: float = 0.0) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss; it has no parts. Where several processes share a batch, the mean
        of their losses is the batch's."""
        with self.backend.autocast():
            logits = self.model.run(labelled.batch, Wanted(logits=True)).logits
        rows = class_rows(self.backend, self.kind, logits, labelled)
        total = self.backend.cross_entropy(rows, np.concatenate(labelled.targets))
        return total * (self.backend.world_size / max(1, labelled.counted)), {}


def class_rows(backend: Backend, kind: Kind, logits: Tensor, labelled: LabelledBatch) -> Tensor:
    """A row of classes' logits for each of a batch's targets: of reading, whose start and end are classes of their
    own, the positions of a sequence."""
    return _padded(backend, logits, labelled.batch) if kind == "reading" else logits


def _padded(backend: Backend, logits: Tensor, batch: Batch) -> Tensor:
    """Logits of tokens [T, 2] -> [2 B, L], a sequence's start and end one after the other."""
    count, length = batch.attention_mask.shape
    rows = np.where(batch.attention_mask > 0, batch.attention_mask.cumsum().reshape(count, length) - 1, batch.tokens)
    outside = backend.tensor(np.full((1, 2), -1e4, np.float32))
    spread = backend.concat([logits, outside])[backend.tensor(rows.reshape(-1))]
    return spread.reshape([count, length, 2]).swapaxes(1, 2).reshape([2 * count, length])
