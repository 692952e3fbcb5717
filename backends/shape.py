"""The sizes of a BERT: what its configuration may say, and the shape that each weight has by it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from backends.files import InputError
from backends.interface import Weights

SIZES = {
    "vocab_size": 1 << 24,
    "hidden_size": 1 << 16,
    "num_hidden_layers": 1 << 12,
    "num_attention_heads": 1 << 12,
    "intermediate_size": 1 << 20,
    "max_position_embeddings": 1 << 20,
    "type_vocab_size": 1 << 16,
    "task_type_vocab_size": 1 << 16,
    "num_labels": 1 << 20,
    "num_classes": 1 << 20,
}
"""Key of a configuration -> a number that no model comes near."""
BUFFERS = ("embeddings.position_ids", "embeddings.token_type_ids")
"""Kept among weights by some versions of transformers; they count from 0, or are zeros."""

_EMBEDDINGS = {
    "embeddings.word_embeddings.weight": ("vocab_size", "hidden_size"),
    "embeddings.position_embeddings.weight": ("max_position_embeddings", "hidden_size"),
    "embeddings.LayerNorm.weight": ("hidden_size",),
    "embeddings.LayerNorm.bias": ("hidden_size",),
}
_LAYER = {
    **{f"attention.self.{x}.weight": ("hidden_size", "hidden_size") for x in ("query", "key", "value")},
    **{f"attention.self.{x}.bias": ("hidden_size",) for x in ("query", "key", "value")},
    "attention.output.dense.weight": ("hidden_size", "hidden_size"),
    "attention.output.dense.bias": ("hidden_size",),
    "attention.output.LayerNorm.weight": ("hidden_size",),
    "attention.output.LayerNorm.bias": ("hidden_size",),
    "intermediate.dense.weight": ("intermediate_size", "hidden_size"),
    "intermediate.dense.bias": ("intermediate_size",),
    "output.dense.weight": ("hidden_size", "intermediate_size"),
    "output.dense.bias": ("hidden_size",),
    "output.LayerNorm.weight": ("hidden_size",),
    "output.LayerNorm.bias": ("hidden_size",),
}
_OPTIONAL = {
    "embeddings.token_type_embeddings.weight": ("type_vocab_size", "hidden_size"),
    "embeddings.task_type_embeddings.weight": ("task_type_vocab_size", "hidden_size"),
    "pooler.dense.weight": ("hidden_size", "hidden_size"),
    "pooler.dense.bias": ("hidden_size",),
    "cls.predictions.bias": ("vocab_size",),
}
_IN_LAYER = re.compile(r"encoder\.layer\.([0-9]{1,9})\.(.+)")


def check_sizes(config: Mapping[str, Any], path: Path) -> None:
    """Raises InputError if a configuration's sizes are none a model can have.

    Args:
        path: of the configuration, to be named.
    """
    for key, most in SIZES.items():
        value = config.get(key)
        if value is not None and (type(value) is not int or not 1 <= value <= most):
            raise InputError(f"{path}: {key} is {_short(value)}; expected a whole number from 1 to {most}")
    if config["hidden_size"] % config["num_attention_heads"]:
        raise InputError(
            f"{path}: num_attention_heads is {config['num_attention_heads']}; expected a number that divides "
            f"hidden_size, {config['hidden_size']}"
        )


def check_weights(config: Mapping[str, Any], weights: Weights, path: Path) -> None:
    """Compares a model's weights with its configuration; sizes that this leaves open may be any.

    Args:
        path: of the configuration, to be named.

    Raises:
        InputError: a weight is missing, has another shape, or is of an encoder and none of BERT's.
    """
    layers = 1 + max((int(match[1]) for match in map(_IN_LAYER.fullmatch, weights) if match), default=-1)
    if config["num_hidden_layers"] > layers:
        raise InputError(
            f"{path}: num_hidden_layers is {config['num_hidden_layers']}; the weights have {layers} layers"
        )
    wanted = dict(_wanted(config["num_hidden_layers"]))
    for name, array in weights.items():
        in_layer = _IN_LAYER.fullmatch(name)
        keys = wanted.get(name) or _OPTIONAL.get(name)
        if keys is None:
            above = in_layer is not None and in_layer[2] in _LAYER
            if name.startswith(("embeddings.", "encoder.")) and name not in BUFFERS and not above:
                raise InputError(f"{path.parent}: the weights have {name}, which no BERT has; expected those of a BERT")
            continue
        expected = [config.get(key) or size for key, size in zip(keys, array.shape)]
        if len(keys) != array.ndim or expected != list(array.shape):
            raise InputError(
                f"{path}: with {', '.join(f'{key} {config[key]}' for key in dict.fromkeys(keys) if config.get(key))} "
                f"{name} would be {[config.get(key, '?') for key in keys]}, in the weights it is {list(array.shape)}"
            )
    if missing := [name for name in wanted if name not in weights]:
        raise InputError(
            f"{path.parent}: {missing[0]} and {len(missing) - 1} more weights of the encoder are missing; there are "
            f"{some(list(weights))}"
        )


def _wanted(layers: int) -> Iterator[tuple[str, tuple[str, ...]]]:
    yield from _EMBEDDINGS.items()
    for layer in range(layers):
        yield from ((f"encoder.layer.{layer}.{name}", keys) for name, keys in _LAYER.items())


def some(names: list[str], most: int = 8) -> str:
    """The first of many names."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "") or "none"


def _short(value: Any) -> str:
    return repr(value)[:40] if isinstance(value, (str, int, float)) else "no number"
