"""An ONNX file of ours, opened: what it takes, what its answers mean, and its session."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from backends.interface import HEADS, ONNX_INPUTS, ONNX_OUTPUTS, Batch, Head, InputError
from backends.threads import crowded, share_processors
from text.answers import answers
from text.features import Features, by_length, task_features
from text.tasks import HEAD_OF, Task
from text.tokenizer import WordPiece

TEXT_INPUTS = ("text", "text_pair")
TEXT_OUTPUTS = ("label", "probabilities")
TOKENS_AT_ONCE = 512
"""Of a part of a batch at most; more of them leave the caches of a CPU between one operator and the next."""


@dataclass(frozen=True)
class Description:
    """What a file says of itself, in its metadata."""

    head: Head | None
    labels: tuple[str, ...]
    """Names of the classes; none without a head that has them."""
    max_seq_length: int
    lowercase: bool
    vocabulary: tuple[str, ...]
    quantized: str = ""
    """How, if it is."""

    def metadata(self) -> dict[str, str]:
        return {
            "head": self.head or "",
            "labels": json.dumps(self.labels, ensure_ascii=False),
            "max_seq_length": str(self.max_seq_length),
            "do_lower_case": str(self.lowercase).lower(),
            "vocabulary": "\n".join(self.vocabulary),
            "quantized": self.quantized,
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
            metadata["quantized"],
        )


class OnnxModel:
    """An ONNX file that ``python -m export`` wrote.

    Args:
        path: the file.
        threads: that compute; 0 takes as many as there are cores.
        providers: ONNX Runtime's, in order of preference.

    Raises:
        InputError: no such file, not ONNX, or not one of ours.
    """

    def __init__(self, path: Path, threads: int = 0, providers: Sequence[str] = ("CPUExecutionProvider",)) -> None:
        self.path = path
        if threads < 0:
            raise InputError(f"--threads {threads}: must not be negative")
        if not path.is_file():
            raise InputError(f"{path}: no such file; give a model that python -m export onnx wrote")
        self.threads, self._providers = threads or len(os.sched_getaffinity(0)), list(providers)
        share_processors()
        try:
            self.session = self._open(self.threads)
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
        except (KeyError, ValueError, TypeError) as error:
            raise InputError(
                f"{path}: says nothing of its labels and vocabulary ({error}); export it with python -m export onnx"
            ) from error

    @cached_property
    def by_token(self) -> list[str]:
        """Outputs that have a value, or values, for each token."""
        return [put.name for put in self.session.get_outputs() if put.shape[1:2] == ["length"]]

    @property
    def takes_pairs(self) -> bool:
        """Whether a second text must be given (only a file with its tokenizer knows)."""
        return self.in_graph and len(self.session.get_inputs()) == 2

    @cached_property
    def tokenizer(self) -> WordPiece:
        """The one that the file was exported with."""
        return WordPiece(self.description.vocabulary, self.description.lowercase)

    @cached_property
    def task(self) -> Task:
        """What the file answers.

        Raises:
            InputError: it has no head.
        """
        for kind, head in HEAD_OF.items():
            if head == self.description.head:
                return Task(self.path.stem, kind, self.description.labels or None)
        raise InputError(f"{self.path}: an encoder without a head answers nothing; export a fine-tuned model")

    def run(self, batch: Batch) -> list[np.ndarray]:
        """`ONNX_OUTPUTS` for a padded batch, computed in parts that the processor's caches hold."""
        rows = max(1, self._tokens_of_part(batch.input_ids.size) // batch.input_ids.shape[1])
        feeds = [_feed(*(array[i : i + rows] for array in batch[:3])) for i in range(0, len(batch.input_ids), rows)]
        parts = self._compute(self._outputs, feeds)
        return parts[0] if len(parts) == 1 else [np.concatenate(outputs) for outputs in zip(*parts)]

    def run_whole(self, batch: Batch) -> list[np.ndarray]:
        """The same in one part."""
        return self._compute(self._outputs, [_feed(*batch[:3])])[0]

    def logits(self, features: Features) -> list[np.ndarray]:
        """Of each sequence, as `text.answers.answers` takes them; those of similar length are computed together."""
        found: list[np.ndarray] = [np.zeros(0)] * len(features)
        batches = features.by_length(self._tokens_of_part(int(features.lengths.sum())))
        parts = self._compute(self._outputs, [_feed(*features.batch(which)[:3]) for which in batches])
        for which, outputs in zip(batches, parts):
            values = outputs[0] if len(outputs) == 1 else np.stack(outputs, axis=-1)
            for i, row in zip(which, values):
                found[i] = row[: len(features.ids[i])] if row.ndim == 2 else row
        return found

    def run_rows(self, rows: Sequence[np.ndarray]) -> list[list[np.ndarray]]:
        """`ONNX_OUTPUTS` of each of some padded rows, int64 [3, length] for `ONNX_INPUTS`; those of similar length
        are computed together, and what is of tokens comes as long as the row."""
        found: list[list[np.ndarray]] = [[]] * len(rows)
        lengths = np.array([row.shape[1] for row in rows])
        batches, feeds = by_length(lengths, self._tokens_of_part(int(lengths.sum()))), []
        for which in batches:
            batch = np.zeros((3, len(which), lengths[which].max()), np.int64)
            for place, i in enumerate(which):
                batch[:, place, : lengths[i]] = rows[i]
            feeds.append(_feed(*batch))
        for which, outputs in zip(batches, self._compute(self._outputs, feeds)):
            for place, i in enumerate(which):
                found[i] = [
                    output[place, : lengths[i]] if name in self.by_token else output[place]
                    for name, output in zip(self._outputs, outputs)
                ]
        return found

    def answers(self, examples: Sequence[Any]) -> list[dict[str, Any]]:
        """An answer to each of the task's examples (`text.answers`)."""
        if self.in_graph:
            pairs = [example.pair or "" for example in examples] if self.takes_pairs else None
            labels, probabilities = self.classify([example.text for example in examples], pairs)
            return [
                {"id": example.id, "label": label, "probability": round(float(probability), 6)}
                for example, label, probability in zip(examples, labels, probabilities.max(axis=1))
            ]
        features = self.features(examples)
        return answers(self.task, examples, features, self.logits(features))

    def features(self, examples: Sequence[Any]) -> Features:
        """Examples of the task as the sequences that the model sees; questions and strides are as long as there
        is room for."""
        limit = self.description.max_seq_length
        query, stride = self._question_and_stride
        return task_features(self.task.kind, self.tokenizer, examples, limit, doc_stride=stride, max_query_length=query)

    def windows(self, characters: int) -> int:
        """Sequences that a context of so many characters takes, where each is a token."""
        query, stride = self._question_and_stride
        return 1 + max(0, characters - (self.description.max_seq_length - query - 3) + stride - 1) // stride

    @property
    def _question_and_stride(self) -> tuple[int, int]:
        limit = self.description.max_seq_length
        query = min(64, limit // 2)
        return query, max(1, min(128, limit - query - 3))

    def classify(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> tuple[list[str], np.ndarray]:
        """Labels and probabilities [N, classes] of texts, by the tokenizer in the graph; texts of similar
        length are computed together."""
        columns = [np.array(column, object) for column in ([texts] if pairs is None else [texts, pairs])]
        limit = self.description.max_seq_length
        lengths = np.array([min(limit, 3 + sum(map(len, row))) for row in zip(*columns)])
        labels = np.empty(len(texts), object)
        probabilities = np.zeros((len(texts), len(self.description.labels)), np.float32)
        batches = by_length(lengths, self._tokens_of_part(int(lengths.sum())))
        feeds = [{name: column[which] for name, column in zip(TEXT_INPUTS, columns)} for which in batches]
        for which, outputs in zip(batches, self._compute(TEXT_OUTPUTS, feeds)):
            labels[which], probabilities[which] = outputs
        return labels.tolist(), probabilities

    # How it is computed

    @property
    def on_cpu(self) -> bool:
        return self.session.get_providers()[0] == "CPUExecutionProvider"

    def _tokens_of_part(self, tokens: int) -> int:
        """Tokens of each part of a batch of so many: as many parts as threads, or twice as many, and so on."""
        if not self.on_cpu:
            return 1 << 15
        rounds = -(-tokens // (self.threads * TOKENS_AT_ONCE))
        return max(1, -(-tokens // max(1, self.threads * rounds)))

    @property
    def _outputs(self) -> tuple[str, ...]:
        return ONNX_OUTPUTS[self.description.head]

    def _compute(self, outputs: Sequence[str], feeds: Sequence[dict[str, np.ndarray]]) -> list[list[np.ndarray]]:
        """The outputs of each of some parts. Where there are several, a CPU's threads each compute one, and do not
        wait for each other within every operator; the one part that is alone gets all threads, unless other programs
        want their processors."""

        def run(session: onnxruntime.InferenceSession, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
            found: Any = session.run(list(outputs), feed)
            return found

        if self.threads == 1 or not self.on_cpu or (len(feeds) == 1 and not crowded.is_set()):
            return [run(self.session, feed) for feed in feeds]
        return list(self._pool.map(partial(run, self._single), feeds))

    @cached_property
    def _single(self) -> onnxruntime.InferenceSession:
        """A session whose runs take one thread each."""
        return self._open(1)

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self.threads)

    def _open(self, threads: int) -> onnxruntime.InferenceSession:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        return onnxruntime.InferenceSession(str(self.path), options, providers=self._providers)


def check_name(name: str) -> None:
    """Raises InputError unless a model may be called so in addresses and folders."""
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise InputError(f"--name {name!r}: expected letters, digits, '_', '-' and '.', and none of the last two first")


def check_output(output: Path, *inputs: Path) -> None:
    """Raises InputError if a file to be written is a folder, or one of those that are read."""
    if output.is_dir():
        raise InputError(f"{output}: is a folder; give the name of a file")
    if output.exists() and any(output.samefile(path) for path in inputs):
        raise InputError(f"--output {output}: is read here; give another file")


def _feed(*arrays: np.ndarray) -> dict[str, np.ndarray]:
    return dict(zip(ONNX_INPUTS, arrays))
