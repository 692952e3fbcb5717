"""Outputs of a model's layers, taken from outside while it runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from backends.interface import Tensor

Key = TypeVar("Key")


class Captured(Exception):
    """Ends a forward pass once everything asked for is there."""


def capture(registrars: Mapping[Key, Callable[[Any], Any]], run: Callable[[], Any]) -> dict[Key, Tensor]:
    """Runs a model until all the outputs asked for are there, and no further.

    Args:
        registrars: for each output, the method of its layer that registers a
            hook ``(layer, inputs, output)`` called after it.
        run: the forward pass.
    """
    outputs: dict[Key, Tensor] = {}

    def keep(key: Key) -> Callable[[Any, Any, Tensor], None]:
        def hook(layer: Any, inputs: Any, output: Tensor) -> None:
            outputs[key] = output
            if len(outputs) == len(registrars):
                raise Captured

        return hook

    handles = [register(keep(key)) for key, register in registrars.items()]
    try:
        run()
    except Captured:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return outputs
