"""Masked language modelling, the pretraining of BERT."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from backends.interface import Backend, Model, Tensor, Wanted
from text.masking import MaskedBatch


@dataclass(frozen=True)
class MaskedLanguageModelling:
    """Cross-entropy of the masked tokens; the model has a ``masked_lm`` head."""

    backend: Backend
    model: Model

    def __call__(self, masked: MaskedBatch, done: float = 0.0) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean loss over the masked tokens, of several processes so weighed that their mean is that over
        all; it has no parts."""
        backend = self.backend
        with backend.autocast():
            logits = self.model.run(masked.batch, Wanted(logits=True, at=masked.positions)).logits
        loss = backend.cross_entropy(logits, masked.labels) / len(masked.labels)
        if backend.world_size > 1:
            counts = backend.gather(backend.tensor(np.array([float(len(masked.labels))])))
            total = sum(backend.numpy(count).item() for count in counts)
            loss = loss * (backend.world_size * len(masked.labels) / total)
        return loss, {}
