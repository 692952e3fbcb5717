"""What ``python -m export benchmark`` compares: each contender in a process of its own, asked in turns."""

from __future__ import annotations

import multiprocessing
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
from export.model import OnnxModel
from text.data import Example
from text.features import by_length, classification_features
from text.folder import ModelFolder

Runtime = Literal["onnxruntime", "torch", "paddle"]
Tokenizing = Literal["python", "rust", "in-graph"]
"""By transformers' or paddlenlp's tokenizer in Python, the tokenizers library, or the ONNX graph."""
FRAMEWORK_TOKENS = 2048
"""Of a batch on a framework, as in fine-tuning's evaluation."""
CHARACTER = "的"
"""Of the strings that are measured: one token each."""


@dataclass(frozen=True)
class Contender:
    """A model on a runtime."""

    title: str
    runtime: Runtime
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


class Worker:
    """A contender's process.

    Args:
        threads: that compute.
    """

    def __init__(self, contender: Contender, threads: int) -> None:
        self.contender = contender
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs, contender, threads), daemon=True)
        self._process.start()
        theirs.close()
        self._answer()

    def latencies(self, batch_size: int, length: int, seconds: float) -> list[float]:
        """Seconds of each of some runs on random tokens, at least three, for about so long."""
        return self._ask("latencies", batch_size, length, seconds)

    def answer(self, examples: Sequence[Example]) -> Answered:
        """The labels of a task's examples, from strings."""
        return self._ask("answer", list(examples))

    def peak_memory(self) -> int:
        """Bytes that the process held at most."""
        return self._ask("peak_memory")

    def close(self) -> None:
        self._process.terminate()
        self._process.join()

    def _ask(self, name: str, *arguments: Any) -> Any:
        self._pipe.send((name, arguments))
        return self._answer()

    def _answer(self) -> Any:
        try:
            found = self._pipe.recv()
        except EOFError:
            raise InputError(f"{self.contender.title}: its process was ended, perhaps for want of memory") from None
        if isinstance(found, Exception):
            raise InputError(f"{self.contender.title}: {' '.join(str(found).split())[:300]}") from found
        return found


def _work(pipe: Any, contender: Contender, threads: int) -> None:
    os.environ["OMP_NUM_THREADS"] = str(threads)
    try:
        runner = Runner(contender, threads)
        pipe.send(None)
        while True:
            name, arguments = pipe.recv()
            pipe.send(getattr(runner, name)(*arguments))
    except EOFError:
        pass
    except Exception as error:
        pipe.send(error)


class Runner:
    """A contender, loaded; in its own process."""

    def __init__(self, contender: Contender, threads: int) -> None:
        self.contender = contender
        folder = ModelFolder.find(contender.folder, "model")
        self.tokenizer = folder.tokenizer
        if contender.runtime == "onnxruntime":
            self.model = OnnxModel(contender.file, threads, (contender.provider,))
        else:
            engine = engine_room(contender.runtime)
            self.engine = engine.classifier(folder.config, folder.weights(), contender.precision)
        if contender.tokenizing == "python":
            self.python_tokenizer = engine_room(backends.choose()).python_tokenizer(contender.folder)

    def latencies(self, batch_size: int, length: int, seconds: float) -> list[float]:
        run = self._run_of(batch_size, length)
        run()
        found: list[float] = []
        while len(found) < 3 or sum(found) < seconds:
            start = time.perf_counter()
            run()
            found.append(time.perf_counter() - start)
        return found

    def _run_of(self, batch_size: int, length: int) -> Callable[[], Any]:
        if self.contender.tokenizing == "in-graph":
            texts = [CHARACTER * (length - 2 - bool(self.model.takes_pairs))] * batch_size
            pairs = [""] * batch_size if self.model.takes_pairs else None
            return lambda: self.model.classify(texts, pairs)
        ids = np.random.default_rng(0).integers(5, len(self.tokenizer), (batch_size, length))
        batch = Batch(ids, np.zeros_like(ids), np.ones_like(ids))
        return lambda: self._logits(batch)

    def _logits(self, batch: Batch) -> np.ndarray:
        if self.contender.runtime != "onnxruntime":
            return self.engine(batch)
        return (self.model.run_whole if self.contender.as_it_comes else self.model.run)(batch)[0]

    def answer(self, examples: Sequence[Example]) -> Answered:
        start = time.perf_counter()
        if self.contender.as_it_comes:
            labels = self._answer_as_it_comes(examples)
        elif self.contender.runtime == "onnxruntime":
            labels = [answer["label"] for answer in self.model.answers(examples)]
        else:
            features = classification_features(self.tokenizer, examples, self.contender.max_seq_length)
            found = np.empty(len(examples), object)
            for which in by_length(features.lengths, FRAMEWORK_TOKENS):
                best = self.engine(features.batch(which)).argmax(axis=1)
                found[which] = [self.contender.labels[i] for i in best]
            labels = found.tolist()
        return Answered(time.perf_counter() - start, labels)

    def _answer_as_it_comes(self, examples: Sequence[Example], batch_size: int = 32) -> list[str]:
        labels = []
        for i in range(0, len(examples), batch_size):
            some = examples[i : i + batch_size]
            texts = [example.text for example in some]
            pairs = None if some[0].pair is None else [example.pair or "" for example in some]
            logits = self._logits(self.python_tokenizer(texts, pairs, self.contender.max_seq_length))
            labels += [self.contender.labels[best] for best in logits.argmax(axis=1)]
        return labels

    def peak_memory(self) -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) << 10
