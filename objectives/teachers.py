"""Teachers that are several models, or have another vocabulary than the student."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from backends.interface import Backend, Batch, Captured, Model, Wanted
from backends.shape import Shape
from objectives.distillation import Teacher
from objectives.divergence import index


@dataclass(frozen=True)
class MeanTeacher:
    """Several models, whose logits are averaged, as TextBrewer's MultiTeacherDistiller does."""

    models: Sequence[Teacher]
    weights: Sequence[float] = ()
    """What each model counts; all the same if there are none."""

    @property
    def shape(self) -> Shape:
        """Of the first."""
        return self.models[0].shape

    def run(self, batch: Batch, wanted: Wanted) -> Captured:
        """The mean logits; raises ValueError if anything else is wanted."""
        if wanted.states or wanted.qkv:
            raise ValueError("several teachers have no states or attention in common")
        if not wanted.logits:
            return self.models[0].run(batch, wanted)
        weights = self.weights or [1.0] * len(self.models)
        answers = [model.run(batch, wanted).logits.float() * w for model, w in zip(self.models, weights, strict=True)]
        return Captured({}, {}, sum(answers[1:], answers[0]) / sum(weights))


@dataclass(frozen=True)
class ForeignTeacher:
    """A model whose vocabulary is not the student's: it reads the texts of the student's batches in its own tokens.

    It answers for texts, as `Match.compares_tokens` tells them from tokens.

    Args:
        tokens: the student's batch -> the same texts in the teacher's tokens.
    """

    backend: Backend
    model: Model
    tokens: Callable[[Batch], Batch]

    @property
    def shape(self) -> Shape:
        return self.model.shape

    def run(self, batch: Batch, wanted: Wanted) -> Captured:
        """The logits of texts, and states: the state of a text's first token stands at all tokens that the student has
        of it.

        Raises:
            ValueError: attention, or logits of tokens, are wanted.
        """
        if wanted.qkv or (wanted.logits and self.model.head not in (None, "sequence_classification")):
            raise ValueError("a teacher of another vocabulary has no attention or tokens in common with the student")
        own_batch = self.tokens(batch)
        # positions where logits of tokens are wanted are the student's
        captured = self.model.run(own_batch, wanted._replace(at=None))
        lengths, lengths_of_student = (side.attention_mask.sum(axis=1) for side in (own_batch, batch))
        rows = index(self.backend, np.repeat(lengths.cumsum() - lengths, lengths_of_student))
        return captured._replace(states={layer: states[rows] for layer, states in captured.states.items()})
