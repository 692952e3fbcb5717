"""This project, as `general_distill` runs it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

import backends
from backends.interface import QKV, Backend, Batch, Captured, Model, Precision, Tensor, Wanted
from bench.contenders import Contender, Task
from bench.contenders.frameworks import OnPaddle, OnTorch
from objectives.distillation import RelationDistillation
from objectives.relations import RelationLoss
from training.loop import seed_of


@dataclass(frozen=True)
class TimedLoss(RelationLoss):
    contender: Any = None

    def __call__(
        self, backend: Backend, teacher: QKV, student: QKV, mask: np.ndarray
    ) -> tuple[Tensor, dict[str, Tensor]]:
        with self.contender.phase("loss"):
            return super().__call__(backend, teacher, student, mask)


class Ours(Contender):
    def __init__(self, task: Task) -> None:
        super().__init__(task)
        device = "gpu" if task.on_gpu else "cpu"
        self.title = f"ours, {self.framework}"
        self.backend = backends.load(self.framework, device, cast(Precision, task.precision))
        self.precision = self.backend.precision
        self.learning_rate = task.learning_rate
        self.backend.seed(0)
        student = self.backend.model(task.student)
        student.train()
        self.distillation = RelationDistillation(
            self.backend,
            self._timed(self.backend.model(task.teacher, trainable=False), "teacher"),
            self._timed(student, "student"),
            TimedLoss(task.heads, contender=self),
            [(task.teacher_layer, task.student_layer)],
        )
        self.optimizer = self.backend.optimizer(
            student, weight_decay=0.01, adam_epsilon=1e-8, max_grad_norm=1.0, loss_scale=2.0**15
        )

    def _timed(self, model: Model, phase: str) -> Model:
        """The same model, the time that it takes counted."""
        run = model.run

        def timed_run(batch: Batch, wanted: Wanted) -> Captured:
            with self.phase(phase):
                return run(batch, wanted)

        model.run = timed_run  # type: ignore[method-assign]
        return model

    def step(self, batches: Iterator[Batch], number: int) -> Batch:
        with self.phase("data"):
            batch = next(batches).shortest_first()
        self.backend.seed(seed_of(0, number))
        loss, _ = self.distillation(batch)
        with self.phase("backward"):
            self.optimizer.backward(loss)
        with self.phase("optimizer"):
            self.optimizer.step(self.learning_rate)
        return batch


class OursTorch(OnTorch, Ours):
    pass


class OursPaddle(OnPaddle, Ours):
    pass
