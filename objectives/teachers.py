"""Teachers that are more than a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from backends.interface import Batch, Captured, Model, Wanted
from backends.shape import Shape


@dataclass(frozen=True)
class MeanTeacher:
    """Several models, whose logits are averaged, as TextBrewer's MultiTeacherDistiller does."""

    models: Sequence[Model]

    @property
    def shape(self) -> Shape:
        """Of the first."""
        return self.models[0].shape

    def run(self, batch: Batch, wanted: Wanted) -> Captured:
        """The mean logits; raises ValueError unless they alone are wanted."""
        if wanted.states or wanted.qkv or not wanted.logits:
            raise ValueError("several teachers have no states or attention in common")
        answers = [model.run(batch, wanted).logits.float() for model in self.models]
        return Captured({}, {}, sum(answers[1:], answers[0]) / len(answers))
