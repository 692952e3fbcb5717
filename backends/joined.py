"""Several models on one encoder: what both rooms share of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from backends.interface import Tensor, Trainable

ENCODER = ("embeddings.", "encoder.", "pooler.")
"""What the names of weights begin with that the models share."""
HEADS = "heads."
"""What the names of the others begin with among the joined weights, before the model's name."""


class Joined(Trainable):
    """Models that share an encoder, to be trained together.

    Each model runs, and has its weights, as it would alone. The joined weights are the encoder's under their names, and
    those of a model's head (and projections) under ``heads.<name>.``.
    """

    def __init__(self, models: Iterable[tuple[str, Any]]) -> None:
        self.models: dict[str, Any] = {}
        """The backend's models, by name."""
        first: Any = None
        for name, model in models:
            if first is None:
                first = model
            else:
                model.share_encoder(first)
            self.models[name] = model

    @property
    def rates(self) -> dict[str, float]:  # type: ignore[override]
        rates = {name: model.rates.items() for name, model in self.models.items()}
        return {f"{HEADS}{name}.{key}": rate for name, items in rates.items() for key, rate in items}

    def _named(self, tensors: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
        """Weights under the names that they have outside.

        Args:
            tensors: by the models' numbers and the names in their modules; the encoder's may come with every model.
        """
        named: dict[str, Tensor] = {}
        for number, (name, model) in enumerate(self.models.items()):
            prefix = f"{number}."
            own = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
            for key, tensor in model._named(own):
                named.setdefault(key if key.startswith(ENCODER) else f"{HEADS}{name}.{key}", tensor)
        return [*named.items()]
