"""Model folders: what programs need of a model before, or without, a framework's loading it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from backends.files import InputError
from backends.interface import Head, Weights
from backends.pretrained import find_model, fingerprint, labels_of, read_config, read_weights, takes_pairs, write_model
from backends.shape import Shape
from text.tokenizer import WordPiece


@dataclass(frozen=True)
class ModelFolder:
    """A model's folder; each property reads, and checks, when it is first asked for."""

    path: Path
    model_type: str = "bert"
    """The model's type, where the folder does not say."""

    @classmethod
    def find(cls, name_or_path: str | Path, option: str, model_type: str = "bert") -> ModelFolder:
        """Finds a model's folder, fetched from Hugging Face's hub if it is a name there.

        Args:
            option: the option to name in an error.

        Raises:
            InputError: no such folder or model.
        """
        return cls(find_model(str(name_or_path), option), model_type)

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """``config.json`` under Hugging Face's keys; see `backends.pretrained.read_config`."""
        return read_config(self.path, self.model_type)

    @cached_property
    def shape(self) -> Shape:
        return Shape.of(self.config)

    @cached_property
    def tokenizer(self) -> WordPiece:
        """The model's tokenizer; raises InputError unless it is BERT's, with the vocabulary that the model embeds."""
        tokenizer = WordPiece.from_model(self.path)
        tokenizer.check_fits(self.shape.vocabulary, self.path)
        return tokenizer

    def weights(self) -> dict[str, np.ndarray]:
        """Reads the weights, anew each time; see `backends.pretrained.read_weights`."""
        return read_weights(self.path)

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the head's classes; see `backends.pretrained.labels_of`."""
        return labels_of(self.config, self.path)

    @property
    def takes_pairs(self) -> bool | None:
        """Whether it is a classifier of pairs of texts; None if its configuration does not say."""
        return takes_pairs(self.config)

    def identity(self, tokenizer: WordPiece | None = None) -> str:
        """Returns what tells the model from others, whatever its path and its name.

        Args:
            tokenizer: the tokenizer that it is used with, if not the folder's.
        """
        settings = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode()).hexdigest()
        vocabulary = (tokenizer or self.tokenizer).fingerprint()
        return f"weights {fingerprint(self.path)}, settings {settings[:16]}, vocabulary {vocabulary[:16]}"

    def check_length(self, max_seq_length: int, option: str = "--max_seq_length", whose: str = "model") -> None:
        """Raises InputError if the model has too few positions."""
        check_length(self.shape, max_seq_length, option, whose)


def check_length(shape: Shape, max_seq_length: int, option: str = "--max_seq_length", whose: str = "model") -> None:
    """Raises InputError if a model has too few positions."""
    if max_seq_length > shape.positions:
        raise InputError(f"{option} {max_seq_length}: the {whose} has {shape.positions} positions; give at most that")


def write_folder(
    path: Path, config: Mapping[str, Any], tokenizer: WordPiece, weights: Weights, head: Head | None = None
) -> None:
    """Writes a model and its tokenizer so that both libraries load the folder as it stands."""
    tokenizer.save(path, Shape.of(config).positions)
    write_model(path, config, weights, head)
