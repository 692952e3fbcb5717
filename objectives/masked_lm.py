"""Masked language modelling, the pretraining of BERT."""

from __future__ import annotations

from dataclasses import dataclass

from backends.interface import Backend, Model, Tensor
from text.masking import MaskedBatch


@dataclass(frozen=True)
class MaskedLanguageModelling:
    """Cross-entropy of the masked tokens; the model has a ``masked_lm`` head."""

    backend: Backend
    model: Model

    def __call__(self, masked: MaskedBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean loss over the masked tokens; it has no parts."""
        with self.backend.autocast():
            return self.model.masked_lm_loss(masked.batch, masked.positions, masked.labels), {}
