"""Processes of ``python -m export benchmark``: each holds one deployment, and answers when it is asked."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

import backends
from backends import engine_room
from backends.files import InputError
from backends.interface import Batch, Precision
from backends.memory import resident
from export.benchmark.peers import NncfModel, ctranslate2_classifier
from export.model import OnnxModel
from export.runtimes import OpenVino
from programs.worker import Worker, WorkerEnded, WorkerFailed
from text.data import Example
from text.features import by_length, classification_features
from text.folder import ModelFolder

Engine = Literal["onnxruntime", "openvino", "nncf", "torch", "paddle", "ctranslate2"]
"""What computes; nncf: OpenVINO, a file that NNCF wrote."""
Tokenizing = Literal["python", "rust", "in-graph"]
"""Who tokenizes: transformers or paddlenlp in Python, the tokenizers library, or the ONNX graph."""
FRAMEWORK_TOKENS = 2048
"""Tokens of a batch on a framework, as in fine-tuning's evaluation."""
CHARACTER = "的"
"""Character of the strings that are measured: one token each."""


@dataclass(frozen=True)
class Deployment:
    """A model on an engine."""

    title: str
    runtime: Engine
    folder: Path
    """The model's folder."""
    file: Path
    """Its ONNX file; for frameworks the one whose size is theirs too."""
    labels: tuple[str, ...]
    max_seq_length: int
    precision: Precision = "float32"
    tokenizing: Tokenizing = "rust"
    provider: str = "CPUExecutionProvider"
    trained: bool = True
    """Whether its answers mean something."""

    @property
    def as_it_comes(self) -> bool:
        """Whether batches are computed whole, and texts in batches of 32 in their order, as those who tokenize
        in Python do; else in parts that caches hold, texts of similar length together."""
        return self.tokenizing == "python"

    @property
    def row(self) -> str:
        """The title with its way of tokenizing."""
        way = {"python": "Python tokenizer", "rust": "tokenizers", "in-graph": "in-graph tokenizer"}[self.tokenizing]
        return f"{self.title}, {way}"


class Answered(NamedTuple):
    """A round on a task's texts."""

    seconds: float
    labels: list[str]


class RemoteRunner:
    """A `Runner` in a process of its own.

    Args:
        threads: that compute.

    Raises:
        InputError: the process failed. Every method raises it, too.
    """

    def __init__(self, deployment: Deployment, threads: int) -> None:
        self.deployment = deployment
        self._worker = Worker(deployment.title, Runner, deployment, threads, threads=threads)
        self._wait_for(self._worker.wait)

    def latencies(self, batch_size: int, length: int, seconds: float) -> list[float]:
        """Seconds of each of some runs on random tokens, at least three, for about so long."""
        return self._wait_for(self._worker.call, "latencies", batch_size, length, seconds)

    def answer(self, examples: Sequence[Example]) -> Answered:
        """The labels of a task's examples, from strings."""
        return self._wait_for(self._worker.call, "answer", list(examples))

    def peak_memory(self) -> int:
        """Bytes that the process held at most."""
        return self._wait_for(self._worker.call, "peak_memory")

    def close(self) -> None:
        """Ends the process."""
        self._worker.close()

    def _wait_for(self, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except WorkerEnded as failure:
            raise InputError(str(failure)) from None
        except WorkerFailed as failure:
            reason = " ".join(str(failure.__cause__).split())[:300]
            raise InputError(f"{self.deployment.title}: {reason}") from failure


class Runner:
    """A deployment, loaded; in its own process."""

    def __init__(self, deployment: Deployment, threads: int) -> None:
        self.deployment = deployment
        folder = ModelFolder.find(deployment.folder, "model")
        self.tokenizer = folder.tokenizer
        self.model: OnnxModel | None = None
        if deployment.runtime == "onnxruntime":
            self.model = OnnxModel(deployment.file, threads, provider=deployment.provider)
        elif deployment.runtime == "openvino":
            self.model = OnnxModel(deployment.file, threads, OpenVino, precision=deployment.precision)
        elif deployment.runtime == "nncf":
            settings = {"file": deployment.file, "precision": deployment.precision}
            self.model = OnnxModel(deployment.file.with_name("float32.onnx"), threads, NncfModel, **settings)
        elif deployment.runtime == "ctranslate2":
            self.engine = ctranslate2_classifier(deployment.file, folder, threads or len(os.sched_getaffinity(0)))
        else:
            engine = engine_room(deployment.runtime)
            self.engine = engine.classifier(folder.config, folder.weights(), deployment.precision)
        if deployment.tokenizing == "python":
            self.python_tokenizer = engine_room(backends.choose()).python_tokenizer(deployment.folder)

    def latencies(self, batch_size: int, length: int, seconds: float) -> list[float]:
        run = self._run_of(batch_size, length)
        run()
        latencies: list[float] = []
        while len(latencies) < 3 or sum(latencies) < seconds:
            start = time.perf_counter()
            run()
            latencies.append(time.perf_counter() - start)
        return latencies

    def _run_of(self, batch_size: int, length: int) -> Callable[[], Any]:
        if self.model is not None and self.model.in_graph:
            model = self.model
            texts = [CHARACTER * (length - 2 - bool(model.takes_pairs))] * batch_size
            pairs = [""] * batch_size if model.takes_pairs else None
            return lambda: model.classify(texts, pairs)
        ids = np.random.default_rng(0).integers(5, len(self.tokenizer), (batch_size, length))
        batch = Batch(ids, np.zeros_like(ids), np.ones_like(ids))
        return lambda: self._logits(batch)

    def _logits(self, batch: Batch) -> np.ndarray:
        if self.model is None:
            return self.engine(batch)
        return (self.model.run_whole if self.deployment.as_it_comes else self.model.run)(batch)[0]

    def answer(self, examples: Sequence[Example]) -> Answered:
        start = time.perf_counter()
        if self.deployment.as_it_comes:
            labels = self._answer_as_it_comes(examples)
        elif self.model is not None:
            labels = [answer["label"] for answer in self.model.answers(examples)]
        else:
            features = classification_features(self.tokenizer, examples, self.deployment.max_seq_length)
            in_order = np.empty(len(examples), object)
            for indices in by_length(features.lengths, FRAMEWORK_TOKENS):
                best = self.engine(features.batch(indices)).argmax(axis=1)
                in_order[indices] = [self.deployment.labels[i] for i in best]
            labels = in_order.tolist()
        return Answered(time.perf_counter() - start, labels)

    def _answer_as_it_comes(self, examples: Sequence[Example], batch_size: int = 32) -> list[str]:
        labels = []
        for i in range(0, len(examples), batch_size):
            batch = examples[i : i + batch_size]
            texts = [example.text for example in batch]
            pairs = None if batch[0].pair is None else [example.pair or "" for example in batch]
            logits = self._logits(self.python_tokenizer(texts, pairs, self.deployment.max_seq_length))
            labels += [self.deployment.labels[best] for best in logits.argmax(axis=1)]
        return labels

    def peak_memory(self) -> int:
        return resident()[1]
