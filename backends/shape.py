"""The sizes of a BERT: what its configuration says, the shape that each weight has by it, and what they add up to."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

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
    "attention_head_size": 1 << 16,
    "num_labels": 1 << 20,
    "num_classes": 1 << 20,
}
"""Key of a configuration -> a number that no model comes near."""
BUFFERS = ("embeddings.position_ids", "embeddings.token_type_ids")
"""Kept among weights by some versions of transformers; they count from 0, or are zeros."""

BY_LAYER = {"num_attention_heads": "num_attention_heads_by_layer", "intermediate_size": "intermediate_size_by_layer"}
"""Key of what all layers have -> the key, which neither library knows, of a list of what each has."""
HEAD_SIZE = "attention_head_size"
"""The key of the size of a head, where it is not hidden_size / num_attention_heads; neither library knows it."""
DEFAULTS = {"intermediate_size": 3072, "max_position_embeddings": 512, "type_vocab_size": 2}
"""Of sizes that are absent, transformers'; paddlenlp has 16 types of tokens."""


class LayerShape(NamedTuple):
    """The sizes of one layer."""

    heads: int
    head_size: int
    intermediate: int
    """Feed-forward width, F."""

    @property
    def width(self) -> int:
        """Of its queries, keys and values, W = heads * head size."""
        return self.heads * self.head_size

    def weights(self, hidden: int) -> int:
        products = 4 * hidden * self.width + 2 * hidden * self.intermediate
        return products + 3 * self.width + self.intermediate + 6 * hidden

    def operations(self, hidden: int, lengths: np.ndarray) -> float:
        """Floating-point operations of its products, forward: for n tokens in a sequence ``n (8 D W + 4 D F)`` of four
        projections and two feed-forward products, and ``4 n^2 W`` of scores and context.

        Args:
            lengths: [B], tokens of each sequence.
        """
        n = lengths.astype(np.float64)
        return float((n * hidden * (8 * self.width + 4 * self.intermediate) + 4 * n * n * self.width).sum())


@dataclass(frozen=True)
class Shape:
    """The sizes of a BERT, layer by layer."""

    vocabulary: int
    positions: int
    token_types: int
    hidden: int
    """D."""
    layers: tuple[LayerShape, ...]

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Shape:
        """From a configuration whose sizes were checked (`check_sizes`)."""
        config = {**DEFAULTS, **config}
        count, hidden = config["num_hidden_layers"], config["hidden_size"]
        heads, widths = (config.get(BY_LAYER[key]) or [config[key]] * count for key in BY_LAYER)
        size = config.get(HEAD_SIZE) or hidden // config["num_attention_heads"]
        layers = tuple(LayerShape(own_heads, size, width) for own_heads, width in zip(heads, widths))
        return cls(config["vocab_size"], config["max_position_embeddings"], config["type_vocab_size"], hidden, layers)

    def settings(self) -> dict[str, Any]:
        """The reverse of `of`; of layers that the libraries cannot have, with keys of our own."""
        sizes: dict[str, Any] = {
            "vocab_size": self.vocabulary,
            "max_position_embeddings": self.positions,
            "type_vocab_size": self.token_types,
            "hidden_size": self.hidden,
            "num_hidden_layers": len(self.layers),
        }
        heads, head_sizes, widths = zip(*self.layers)
        if self.even:
            return {**sizes, "num_attention_heads": heads[0], "intermediate_size": widths[0]}
        of_library = next(count for count in range(self.hidden // head_sizes[0], 0, -1) if self.hidden % count == 0)
        sizes |= {"num_attention_heads": of_library, "intermediate_size": max(widths), HEAD_SIZE: head_sizes[0]}
        return {**sizes, BY_LAYER["num_attention_heads"]: [*heads], BY_LAYER["intermediate_size"]: [*widths]}

    @property
    def even(self) -> bool:
        """Whether the libraries have such a model: its layers are alike, and each as wide inside as outside."""
        return len({*self.layers}) == 1 and self.layers[0].width == self.hidden

    def __str__(self) -> str:
        return f"{len(self.layers)}x{self.hidden}"

    @property
    def embedding_weights(self) -> int:
        return (self.vocabulary + self.positions + self.token_types + 2) * self.hidden

    def layer_weights(self, layers: int | None = None) -> int:
        """Of the first so many layers, or of all."""
        return sum(layer.weights(self.hidden) for layer in self.layers[:layers])

    def weights(self, masked_lm: bool = False) -> int:
        """Of the encoder and its pooler or, with `masked_lm`, the head of masked language modelling."""
        end = self.hidden * (self.hidden + 1) + (2 * self.hidden + self.vocabulary if masked_lm else 0)
        return self.embedding_weights + self.layer_weights() + end

    def reached_weights(self, layers: int, projections: int = 3) -> int:
        """Those that get a gradient from the output of the first so many layers and, unless 0, so many of Q, K, V of
        the next."""
        own = projections * self.layers[layers].width * (self.hidden + 1) if projections else 0
        return self.embedding_weights + self.layer_weights(layers) + own

    def operations(self, lengths: np.ndarray, layer: int) -> float:
        """Floating-point operations of the products that give Q, K, V of a layer, counted from 0, forward: those of the
        layers below, and ``6 n D W`` for n tokens in a sequence.

        Args:
            lengths: [B], tokens of each sequence.
        """
        below = sum(layer.operations(self.hidden, lengths) for layer in self.layers[:layer])
        return below + 6.0 * self.hidden * self.layers[layer].width * float(lengths.sum())


_EMBEDDINGS = {
    "embeddings.word_embeddings.weight": ("vocab_size", "hidden_size"),
    "embeddings.position_embeddings.weight": ("max_position_embeddings", "hidden_size"),
    "embeddings.LayerNorm.weight": ("hidden_size",),
    "embeddings.LayerNorm.bias": ("hidden_size",),
}
_WIDTH = "attention width"
_LAYER = {
    **{f"attention.self.{x}.weight": (_WIDTH, "hidden_size") for x in ("query", "key", "value")},
    **{f"attention.self.{x}.bias": (_WIDTH,) for x in ("query", "key", "value")},
    "attention.output.dense.weight": ("hidden_size", _WIDTH),
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
    for key, limit in SIZES.items():
        value = config.get(key)
        if value is not None and (type(value) is not int or not 1 <= value <= limit):
            raise InputError(f"{path}: {key} is {_short(value)}; expected a whole number from 1 to {limit}")
    if config["hidden_size"] % config["num_attention_heads"]:
        raise InputError(
            f"{path}: num_attention_heads is {config['num_attention_heads']}; expected a number that divides "
            f"hidden_size, {config['hidden_size']}"
        )
    for key, by_layer in BY_LAYER.items():
        values = config.get(by_layer)
        if values is not None and not (
            isinstance(values, list)
            and len(values) == config["num_hidden_layers"]
            and all(type(value) is int and 1 <= value <= SIZES[key] for value in values)
        ):
            raise InputError(
                f"{path}: {by_layer} is no list of {config['num_hidden_layers']} whole numbers from 1 to {SIZES[key]}"
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
    shape = Shape.of(config)
    wanted = {**_OPTIONAL, **dict(_wanted(len(shape.layers)))}
    for name, array in weights.items():
        in_layer = _IN_LAYER.fullmatch(name)
        keys = wanted.get(name)
        if keys is None:
            above = in_layer is not None and in_layer[2] in _LAYER
            if name.startswith(("embeddings.", "encoder.")) and name not in BUFFERS and not above:
                raise InputError(f"{path.parent}: the weights have {name}, which no BERT has; expected those of a BERT")
            continue
        sizes = dict(config)
        if in_layer is not None:
            own = shape.layers[int(in_layer[1])]
            sizes |= {_WIDTH: own.width, "intermediate_size": own.intermediate}
            keys = tuple("hidden_size" if key == _WIDTH and own.width == shape.hidden else key for key in keys)
        expected = [sizes.get(key) or size for key, size in zip(keys, array.shape)]
        if len(keys) != array.ndim or expected != list(array.shape):
            raise InputError(
                f"{path}: with {', '.join(f'{key} {sizes[key]}' for key in dict.fromkeys(keys) if sizes.get(key))} "
                f"{name} would be {[sizes.get(key, '?') for key in keys]}, in the weights it is {list(array.shape)}"
            )
    required = [name for name in wanted if name not in _OPTIONAL]
    if missing := [name for name in required if name not in weights]:
        raise InputError(
            f"{path.parent}: {missing[0]} and {len(missing) - 1} more weights of the encoder are missing; there are "
            f"{listing(list(weights))}"
        )


def _wanted(layers: int) -> Iterator[tuple[str, tuple[str, ...]]]:
    yield from _EMBEDDINGS.items()
    for layer in range(layers):
        yield from ((f"encoder.layer.{layer}.{name}", keys) for name, keys in _LAYER.items())


def check_missing(missing: Iterable[str]) -> None:
    """Raises InputError if a model lacks embeddings or layers; poolers and heads may start at random."""
    lost = [name for name in missing if name.startswith(("embeddings.", "encoder."))]
    if lost:
        raise InputError(f"model weights: {lost[0]} and {len(lost) - 1} more encoder weights are missing")


def check_shape(name: str, actual: Sequence[int], expected: Sequence[int]) -> None:
    """Raises InputError if a weight has not the shape that a model's configuration says."""
    if list(actual) != list(expected):
        raise InputError(f"model weights: {name} is {list(actual)}, the configuration says {list(expected)}")


def listing(names: list[str], limit: int = 8) -> str:
    """The first of many names."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "") or "none"


def _short(value: Any) -> str:
    return repr(value)[:40] if isinstance(value, (str, int, float)) else "no number"
