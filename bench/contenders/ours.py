"""This project, as `general_distill` runs it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

import backends
from backends.interface import QKV, Backend, Batch, Captured, Model, Precision, Tensor, Wanted
from bench.contenders import Contender, DistillationJob
from bench.contenders.frameworks import OnPaddle, OnTorch
from objectives.distillation import Distillation, relation_matches
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
    def __init__(self, job: DistillationJob) -> None:
        super().__init__(job)
        device = "gpu" if job.on_gpu else "cpu"
        self.title = f"ours, {self.framework}"
        self.backend = backends.load(self.framework, device, cast(Precision, job.precision))
        self.precision = self.backend.precision
        self.learning_rate = job.learning_rate
        self.backend.seed(0)
        student = self.backend.model(job.student)
        student.train()
        self.distillation = Distillation(
            self.backend,
            self._timed(self.backend.model(job.teacher, trainable=False), "teacher"),
            self._timed(student, "student"),
            relation_matches(TimedLoss(job.heads, contender=self), [(job.teacher_layer, job.student_layer)]),
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
