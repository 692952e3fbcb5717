"""An ONNX file of ``python -m export``, opened: its inputs, the meaning of its outputs, its runtime."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
from onnx import TensorProto

from backends.files import InputError
from backends.interface import ONNX_INPUTS, ONNX_OUTPUTS, Batch, Head
from backends.threads import share_processors
from export.admission import Admitted, admit
from export.runtimes import NAMES, OnnxRuntime, Runtime
from text.answers import answers, classes
from text.features import Features, by_length, task_features
from text.readers import from_json
from text.tasks import HEAD_OF, Task
from text.tokenizer import WordPiece
from text.vocabulary import Settings

TEXT_INPUTS = ("text", "text_pair")
TEXT_OUTPUTS = ("label", "probabilities")
FLOAT = int(TensorProto.FLOAT)
OUTPUT_TYPES = {"label": int(TensorProto.STRING)}
"""Types of outputs that are not float32."""
LABELLED: tuple[Head, ...] = ("sequence_classification", "token_classification")
"""Heads with classes that have names."""
SPARE_ROWS = 128
"""Limit of the rows that embeddings have behind the vocabulary."""
TOKENS_AT_ONCE = 512
"""Tokens of a part of a batch at most; more leave the caches of a CPU between one operator and the next."""


@dataclass(frozen=True)
class Description:
    """A file's metadata."""

    head: Head | None
    labels: tuple[str, ...]
    """Names of the classes; none without a head that has them."""
    max_seq_length: int
    settings: Settings
    """Settings of the tokenizer."""
    vocabulary: tuple[str, ...]
    quantized: str = ""
    """The scheme of its quantization; empty for float32."""
    pairs: bool | None = None
    """Whether it was fine-tuned on pairs of texts; None if nobody knows."""

    def metadata(self) -> dict[str, str]:
        return {
            "head": self.head or "",
            "labels": json.dumps(self.labels, ensure_ascii=False),
            "max_seq_length": str(self.max_seq_length),
            "tokenizer": json.dumps(self.settings.changed(), ensure_ascii=False),
            "vocabulary": "\n".join(self.vocabulary),
            "quantized": self.quantized,
            "pairs": "" if self.pairs is None else str(self.pairs).lower(),
        }

    @classmethod
    def of(cls, metadata: Mapping[str, str]) -> Description:
        """Reads what `metadata` wrote; raises KeyError or ValueError if the metadata is something else."""
        head, labels = metadata["head"] or None, from_json(metadata["labels"])
        if head not in ONNX_OUTPUTS:
            raise ValueError(f"head {head}")
        if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
            raise ValueError("labels that are no list of strings")
        if len({*labels}) < len(labels) or bool(labels) != (head in LABELLED):
            raise ValueError(f"{len(labels)} labels of head {head}, {len({*labels})} of them different")
        return cls(
            cast("Head | None", head),
            tuple(labels),
            int(metadata["max_seq_length"]),
            # Files of before say no more than this of their tokenizer.
            Settings.of(from_json(metadata.get("tokenizer") or f'{{"do_lower_case": {metadata["do_lower_case"]}}}')),
            tuple(metadata["vocabulary"].split("\n")),
            metadata["quantized"],
            {"true": True, "false": False}.get(metadata.get("pairs", "")),
        )

    def pairs_of_strings(self, wanted: bool) -> bool:
        """Returns whether the file takes pairs once its tokenizer is inside; raises InputError if it must not."""
        if wanted and self.pairs is False:
            raise InputError("--pairs: the model was fine-tuned on single texts; leave the option out")
        return wanted or bool(self.pairs)


class OnnxModel:
    """An ONNX file that ``python -m export`` wrote.

    Args:
        path: the file.
        threads: that compute; 0 takes as many as there are cores.
        runtime: a class of `export.runtimes`.
        settings: of its own.

    Raises:
        InputError: no such file, not ONNX, not one of ours, or one that the runtime does not run.
    """

    def __init__(self, path: Path, threads: int = 0, runtime: type[Runtime] = OnnxRuntime, **settings: Any) -> None:
        self.path = path
        if threads < 0:
            raise InputError(f"--threads {threads}: must not be negative")
        self.threads = threads or len(os.sched_getaffinity(0))
        admitted = admit(path)
        self.in_graph = "text" in admitted.inputs
        self.description = self._description(admitted)
        self.inputs, self.outputs = admitted.inputs, admitted.outputs
        self.token_types = admitted.tables.get("token_type_ids", 1)
        """Types of tokens that a file without its tokenizer takes; pairs need two."""
        if refused := admitted.operators.intersection(runtime.refused):
            fault = "a tokenizer" if self.in_graph else f"the operator {min(refused)}"
            raise InputError(
                f"--runtime {runtime.name}: {path} holds {fault}, which {NAMES[runtime.name]} does not run; "
                "give a file without it, or --runtime onnxruntime"
            )
        share_processors()
        try:
            self.runtime = runtime(admitted.content, self.threads, **settings)
            self._try()
        except InputError:
            raise
        except Exception as error:  # the runtimes', which share no class
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"{path}: not an ONNX model that {NAMES[runtime.name]} runs ({reason})") from error

    def _description(self, admitted: Admitted) -> Description:
        """Returns the file's metadata; raises InputError if the graph contradicts it."""
        path, tables = self.path, admitted.tables
        inputs = {name: put.type for name, put in admitted.inputs.items()}
        wanted = dict.fromkeys(ONNX_INPUTS, int(TensorProto.INT64))
        if self.in_graph:
            wanted = dict.fromkeys(TEXT_INPUTS[: len(inputs)], int(TensorProto.STRING))
        if inputs != wanted:
            kinds = {number: kind.lower() for kind, number in TensorProto.DataType.items()}
            types = ", ".join(f"{name}: {kinds.get(kind, kind)}" for name, kind in inputs.items())
            raise InputError(f"{path}: takes {types[:200]}; expected {', '.join(ONNX_INPUTS)}: int64, or text")
        try:
            description = Description.of(admitted.metadata)
        except (KeyError, ValueError, TypeError) as error:
            raise InputError(
                f"{path}: says nothing of its labels and vocabulary ({error}); export it with python -m export onnx"
            ) from error
        head, words, longest = description.head, len(description.vocabulary), description.max_seq_length
        outputs = TEXT_OUTPUTS if self.in_graph else ONNX_OUTPUTS[head]
        rows = tables.get("input_ids", 0)
        if self.in_graph and head != "sequence_classification":
            fault = f"says head {head}, but takes strings, as classifiers of texts do"
        elif tuple(admitted.outputs) != outputs:
            fault = f"gives {', '.join(admitted.outputs)[:100]}; says head {head}, which gives {', '.join(outputs)}"
        elif wrong := [name for name, put in admitted.outputs.items() if put.type != OUTPUT_TYPES.get(name, FLOAT)]:
            fault = f"gives {wrong[0]} in another type"
        elif self.in_graph and admitted.answers != description.labels:
            fault = f"names {len(description.labels)} labels, but answers others"
        elif not 3 <= longest <= tables.get("", 0):
            fault = f"says max_seq_length {longest}, but has {tables.get('', 0)} positions"
        elif head == "question_answering" and tables.get("token_type_ids", 1) < 2:
            fault = "says head question_answering, but does not tell questions from contexts (type_vocab_size 1)"
        elif not self.in_graph and not 0 <= rows - words < SPARE_ROWS:
            fault = f"says a vocabulary of {words} entries, but embeds {rows} tokens"
        else:
            return description
        raise InputError(f"{path}: {fault}; export it with python -m export onnx")

    def _try(self) -> None:
        """Runs a small batch, and compares its outputs with the metadata.

        Raises:
            InputError: it is something else.
        """
        labels = self.description.labels
        if self.in_graph:
            feed = {name: np.array(["", "a"], object) for name in TEXT_INPUTS[: 1 + bool(self.takes_pairs)]}
            probabilities = self.runtime.compute(TEXT_OUTPUTS, [feed])[0][1]
            if probabilities.shape != (2, len(labels)):
                sizes = list(probabilities.shape)
                raise InputError(f"{self.path}: names {len(labels)} labels, but probabilities of 2 texts is {sizes}")
            return
        shapes: Mapping[Head | None, list[tuple[Any, ...]]] = {
            None: [(2, 3, ...), (2, ...)],
            "sequence_classification": [(2, len(labels))],
            "token_classification": [(2, 3, len(labels))],
            "question_answering": [(2, 3), (2, 3)],
        }
        ones = np.ones((2, 3), np.int64)
        outputs = self.run_whole(Batch(ones, 0 * ones, ones))
        for name, output, shape in zip(self.outputs, outputs, shapes[self.description.head]):
            if shape[-1] is ... and output.ndim == len(shape):
                shape = (*shape[:-1], output.shape[-1])
            if output.shape != shape or output.dtype != np.float32:
                says = f"{len(labels)} labels" if labels else f"head {self.description.head}"
                raise InputError(f"{self.path}: says {says}, but {name} of 2 texts of 3 tokens is {list(output.shape)}")
        try:
            len(self.tokenizer)
        except InputError as error:
            raise InputError(f"{self.path}: {error}") from error

    @cached_property
    def by_token(self) -> list[str]:
        """Outputs that have a value, or values, for each token."""
        if self.description.head == "sequence_classification":
            return []
        return [name for name in self.outputs if name != "pooler_output"]

    @property
    def takes_pairs(self) -> bool | None:
        """Whether a second text must be given, or must not; None if nobody knows."""
        return len(self.inputs) == 2 if self.in_graph else self.description.pairs

    @property
    def may_take_pairs(self) -> bool:
        """Whether a second text can be told from the first."""
        return bool(self.takes_pairs) if self.in_graph else self.token_types > 1

    @cached_property
    def tokenizer(self) -> WordPiece:
        """The tokenizer that the file was exported with."""
        return WordPiece(self.description.vocabulary, self.description.settings)

    @cached_property
    def task(self) -> Task:
        """The task that the file answers.

        Raises:
            InputError: it has no head.
        """
        for kind, head in HEAD_OF.items():
            if head == self.description.head:
                return Task(self.path.stem, kind, self.description.labels or None)
        raise InputError(f"{self.path}: an encoder without a head answers nothing; export a fine-tuned model")

    def run(self, batch: Batch) -> list[np.ndarray]:
        """Computes `ONNX_OUTPUTS` of a padded batch, in parts that the processor's caches hold."""
        texts, length = batch.input_ids.shape
        rows = max(1, self._tokens_of_part(batch.input_ids.size) // length)
        # No rows are a part too, of which outputs have no rows.
        feeds = [_feed(*(array[i : i + rows] for array in batch[:3])) for i in range(0, max(1, texts), rows)]
        parts = self.runtime.compute(tuple(self.outputs), feeds)
        return parts[0] if len(parts) == 1 else [np.concatenate(outputs) for outputs in zip(*parts)]

    def run_whole(self, batch: Batch) -> list[np.ndarray]:
        """Computes `ONNX_OUTPUTS` of a padded batch in one part."""
        return self.runtime.compute(tuple(self.outputs), [_feed(*batch[:3])])[0]

    def logits(self, features: Features) -> list[np.ndarray]:
        """Computes the logits of each sequence, as `text.answers.answers` takes them; sequences of similar length are
        computed together."""
        logits: list[np.ndarray] = [np.zeros(0)] * len(features)
        batches = features.by_length(self._tokens_of_part(int(features.lengths.sum())))
        parts = self.runtime.compute(tuple(self.outputs), [_feed(*features.batch(indices)[:3]) for indices in batches])
        for indices, outputs in zip(batches, parts):
            values = outputs[0] if len(outputs) == 1 else np.stack(outputs, axis=-1)
            for i, row in zip(indices, values):
                logits[i] = row[: len(features.ids[i])] if row.ndim == 2 else row
        return logits

    def run_rows(self, rows: Sequence[np.ndarray]) -> list[list[np.ndarray]]:
        """Computes `ONNX_OUTPUTS` of each of some rows, int64 [3, length] for `ONNX_INPUTS`; rows of similar length
        are computed together, and outputs of tokens come as long as the row."""
        results: list[list[np.ndarray]] = [[]] * len(rows)
        lengths = np.array([row.shape[1] for row in rows])
        batches, feeds = by_length(lengths, self._tokens_of_part(int(lengths.sum()))), []
        for indices in batches:
            batch = np.zeros((3, len(indices), lengths[indices].max()), np.int64)
            for place, i in enumerate(indices):
                batch[:, place, : lengths[i]] = rows[i]
            feeds.append(_feed(*batch))
        for indices, outputs in zip(batches, self.runtime.compute(tuple(self.outputs), feeds)):
            for place, i in enumerate(indices):
                results[i] = [
                    output[place, : lengths[i]] if name in self.by_token else output[place]
                    for name, output in zip(self.outputs, outputs)
                ]
        return results

    def answers(self, examples: Sequence[Any], top_k: int = 0) -> list[dict[str, Any]]:
        """Returns an answer to each of the task's examples (`text.answers`)."""
        if self.in_graph:
            pairs = [example.pair or "" for example in examples] if self.takes_pairs else None
            _, probabilities = self.classify([example.text for example in examples], pairs)
            return classes(self.task, examples, probabilities, top_k)
        if not examples:
            return []
        features = self.features(examples)
        return answers(self.task, examples, features, self.logits(features), top_k=top_k)

    def features(self, examples: Sequence[Any]) -> Features:
        """Returns the sequences that the model sees of the task's examples; questions and strides are as long as there
        is room for."""
        limit = self.description.max_seq_length
        query, stride = self._question_and_stride
        features = task_features(
            self.task.kind, self.tokenizer, examples, limit, doc_stride=stride, max_query_length=query
        )
        features.check_types(self.token_types, self.path)
        return features

    def windows(self, characters: int) -> int:
        """Returns the number of sequences that a context takes whose characters are a token each."""
        query, stride = self._question_and_stride
        return 1 + max(0, characters - (self.description.max_seq_length - query - 3) + stride - 1) // stride

    @property
    def _question_and_stride(self) -> tuple[int, int]:
        limit = self.description.max_seq_length
        query = min(64, limit // 2)
        return query, max(1, min(128, limit - query - 3))

    def classify(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> tuple[list[str], np.ndarray]:
        """Returns labels and probabilities [N, classes] of texts, by the tokenizer in the graph; texts of similar
        length are computed together."""
        columns = [np.array(column, object) for column in ([texts] if pairs is None else [texts, pairs])]
        limit = self.description.max_seq_length
        lengths = np.array([min(limit, 3 + sum(map(len, row))) for row in zip(*columns)])
        labels = np.empty(len(texts), object)
        probabilities = np.zeros((len(texts), len(self.description.labels)), np.float32)
        batches = by_length(lengths, self._tokens_of_part(int(lengths.sum())))
        feeds = [{name: column[indices] for name, column in zip(TEXT_INPUTS, columns)} for indices in batches]
        for indices, outputs in zip(batches, self.runtime.compute(TEXT_OUTPUTS, feeds)):
            labels[indices], probabilities[indices] = outputs
        return labels.tolist(), probabilities

    # Computation

    def _tokens_of_part(self, tokens: int) -> int:
        """Returns the tokens of each part of a batch: as many parts as threads, or twice as many, and so on."""
        if not self.runtime.on_cpu:
            return 1 << 15
        rounds = -(-tokens // (self.threads * TOKENS_AT_ONCE))
        return max(1, -(-tokens // max(1, self.threads * rounds)))


def public_name(name: str | None, path: Path) -> str:
    """Returns a model's name in addresses and folders: the user's, or its file's, with ``_`` for what may not stand
    there; raises InputError if the user's name may not."""
    if name is None:
        return re.sub(r"^\W|[^\w.-]", "_", path.stem)
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise InputError(f"--name {name!r}: expected letters, digits, '_', '-' and '.', and none of the last two first")
    return name


def check_output(output: Path, *inputs: Path) -> None:
    """Raises InputError if a file to be written is a folder, or one of those that are read."""
    if output.is_dir():
        raise InputError(f"{output}: is a folder; give the name of a file")
    if output.exists() and any(output.samefile(path) for path in inputs):
        raise InputError(f"--output {output}: is read here; give another file")


def _feed(*arrays: np.ndarray) -> dict[str, np.ndarray]:
    return dict(zip(ONNX_INPUTS, arrays))
