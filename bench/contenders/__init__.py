"""Who is measured: each trains the same shapes on the same batches of text.

A contender runs in a process of its own, so that threads, memory and the libraries'
global settings are its own, and only the framework it needs is imported.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

import numpy as np

from backends.memory import resident
from text.features import Features, LabelledBatch

PHASES = ("data", "teacher", "student", "loss", "backward", "optimizer")


@dataclass(frozen=True)
class DistillationJob:
    """What is trained, and on what."""

    teacher: Mapping[str, Any]
    student: Mapping[str, Any]
    """Configurations under Hugging Face's keys."""
    teacher_layer: int
    student_layer: int
    """The layers that are matched, from 0."""
    heads: int
    on_gpu: bool
    precision: str
    """Ours, as `backends.interface.Backend` takes it."""
    learning_rate: float = 6e-4


@dataclass(frozen=True)
class TaskJob:
    """What a student learns from its teacher on a task, by its logits and by layers of both."""

    teacher: Mapping[str, Any]
    student: Mapping[str, Any]
    """Configurations under Hugging Face's keys, the task's classes among them."""
    states: Sequence[tuple[int, int]]
    """Hidden states of teacher and student that are matched, through a linear projection of the student's: 0 the
    embeddings."""
    attention: Sequence[tuple[int, int]]
    """Layers of both whose attention probabilities are matched, from 0."""
    features: Features
    batch_size: int
    learning_rate: float = 1e-4

    def batches(self) -> Iterator[LabelledBatch]:
        """All examples in order, again and again."""
        while True:
            for numbers in np.array_split(np.arange(len(self.features)), len(self.features) // self.batch_size):
                yield self.features.labelled(numbers)


class Contender(ABC):
    """One way to distil."""

    title: str
    framework: str
    precision: str
    """What its matrix products are computed in."""

    def __init__(self, on_gpu: bool = False) -> None:
        self.on_gpu = on_gpu
        self.seconds: dict[str, float] = {}
        """Time spent in each phase since it was last cleared."""

    @abstractmethod
    def step(self, batch: Any, number: int) -> None:
        """One whole training step on a batch of text, or on a `LabelledBatch`."""

    @abstractmethod
    def synchronize(self) -> None:
        """Waits for the device."""

    @abstractmethod
    def product(self, size: int, precision: str) -> Callable[[], Any]:
        """A product of two square matrices, to be timed.

        Raises:
            RuntimeError: the framework does not compute in this precision.
        """

    def peak_memory(self) -> int:
        """Bytes: the device's peak; on a CPU, the process' with all its libraries."""
        return resident()[1]

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Counts the time spent inside, but not in phases inside it."""
        self.synchronize()
        start, counted = time.perf_counter(), sum(self.seconds.values())
        yield
        self.synchronize()
        inside = sum(self.seconds.values()) - counted
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start - inside

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its calls a phase."""

        @wraps(function)
        def call(*arguments: Any, **more: Any) -> Any:
            with self.phase(name):
                return function(*arguments, **more)

        return call

    def matrix_rate(self, precision: str) -> float:
        """FLOP/s of products of large square matrices, the best of six tries; nan where there are none."""
        size = 8192 if self.on_gpu else 2048
        tries = []
        try:
            product = self.product(size, precision)
            for _ in range(6):
                self.synchronize()
                start = time.perf_counter()
                for _ in range(5):
                    product()
                self.synchronize()
                tries.append(time.perf_counter() - start)
        except RuntimeError:
            return math.nan
        return 5 * 2 * size**3 / min(tries)
