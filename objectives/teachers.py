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
    weights: Sequence[float] = ()
    """What each model counts; all the same if there are none."""

    @property
    def shape(self) -> Shape:
        """Of the first."""
        return self.models[0].shape

    def run(self, batch: Batch, wanted: Wanted) -> Captured:
        """The mean logits; raises ValueError unless they alone are wanted."""
        if wanted.states or wanted.qkv or not wanted.logits:
            raise ValueError("several teachers have no states or attention in common")
        weights = self.weights or [1.0] * len(self.models)
        answers = [model.run(batch, wanted).logits.float() * w for model, w in zip(self.models, weights, strict=True)]
        return Captured({}, {}, sum(answers[1:], answers[0]) / sum(weights))
