"""An ONNX file of ours, opened: what it takes, what its answers mean, and its session."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnxruntime

from backends.interface import HEADS, ONNX_INPUTS, ONNX_OUTPUTS, Batch, Head, InputError
from text.tokenizer import WordPiece

TEXT_INPUTS = ("text", "text_pair")
TEXT_OUTPUTS = ("label", "probabilities")
TOKENS_AT_ONCE = 1024
"""Of a part of a batch; more of them leave the caches of a CPU between one operator and the next."""


@dataclass(frozen=True)
class Description:
    """What a file says of itself, in its metadata."""

    head: Head | None
    labels: tuple[str, ...]
    """Names of the classes; none without a head that has them."""
    max_seq_length: int
    lowercase: bool
    vocabulary: tuple[str, ...]

    def metadata(self) -> dict[str, str]:
        return {
            "head": self.head or "",
            "labels": json.dumps(self.labels, ensure_ascii=False),
            "max_seq_length": str(self.max_seq_length),
            "do_lower_case": str(self.lowercase).lower(),
            "vocabulary": "\n".join(self.vocabulary),
        }

    @classmethod
    def of(cls, metadata: Mapping[str, str]) -> Description:
        """Raises KeyError or ValueError if the metadata is not of `metadata`."""
        head = metadata["head"] or None
        if head is not None and head not in HEADS:
            raise ValueError(head)
        return cls(
            head,
            tuple(map(str, json.loads(metadata["labels"]))),
            int(metadata["max_seq_length"]),
            metadata["do_lower_case"] == "true",
            tuple(metadata["vocabulary"].split("\n")),
        )


class OnnxModel:
    """An ONNX file that ``python -m export`` wrote.

    Args:
        path: the file.
        threads: of an operator; 0 takes as many as there are cores.
        providers: ONNX Runtime's, in order of preference.

    Raises:
        InputError: no such file, not ONNX, or not one of ours.
    """

    def __init__(self, path: Path, threads: int = 0, providers: Sequence[str] = ("CPUExecutionProvider",)) -> None:
        self.path = path
        if not path.is_file():
            raise InputError(f"{path}: no such file; give a model that python -m export onnx wrote")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or len(os.sched_getaffinity(0))
        options.log_severity_level = 3
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, providers=list(providers))
        except Exception as error:  # ONNX Runtime's, which share no class
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"{path}: not an ONNX model that ONNX Runtime runs ({reason})") from error
        taken = {put.name: put.type for put in self.session.get_inputs()}
        self.in_graph = "text" in taken
        wanted = dict.fromkeys(ONNX_INPUTS, "tensor(int64)")
        if self.in_graph:
            wanted = dict.fromkeys(TEXT_INPUTS[: len(taken)], "tensor(string)")
        if taken != wanted:
            told = ", ".join(f"{name}: {kind}" for name, kind in taken.items())
            raise InputError(f"{path}: takes {told}; expected {', '.join(ONNX_INPUTS)}: tensor(int64), or text")
        try:
            self.description = Description.of(self.session.get_modelmeta().custom_metadata_map)
        except (KeyError, ValueError) as error:
            raise InputError(
                f"{path}: says nothing of its labels and vocabulary ({error}); export it with python -m export onnx"
            ) from error

    @property
    def takes_pairs(self) -> bool:
        """Whether a second text must be given (only a file with its tokenizer knows)."""
        return self.in_graph and len(self.session.get_inputs()) == 2

    @cached_property
    def tokenizer(self) -> WordPiece:
        """The one that the file was exported with."""
        return WordPiece(self.description.vocabulary, self.description.lowercase)

    def run(self, batch: Batch) -> list[np.ndarray]:
        """`ONNX_OUTPUTS` for a padded batch, computed in parts that the processor's caches hold."""
        names = list(ONNX_OUTPUTS[self.description.head])
        rows = max(1, TOKENS_AT_ONCE // batch.input_ids.shape[1])
        parts: list[Any] = [
            self.session.run(names, {name: array[i : i + rows] for name, array in zip(ONNX_INPUTS, batch[:3])})
            for i in range(0, len(batch.input_ids), rows)
        ]
        return parts[0] if len(parts) == 1 else [np.concatenate(outputs) for outputs in zip(*parts)]

    def classify(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> tuple[list[str], np.ndarray]:
        """Labels and probabilities [N, classes] of texts, by the tokenizer in the graph."""
        columns = [texts] if pairs is None else [texts, pairs]
        given: dict[str, Any] = {name: np.array(column, object) for name, column in zip(TEXT_INPUTS, columns)}
        labels, probabilities = cast(list[np.ndarray], self.session.run(list(TEXT_OUTPUTS), given))
        return labels.tolist(), probabilities
