"""This project, as `general_distill` and `finetuning` run it."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import backends
from backends.interface import Batch, Model, Precision
from bench.contenders import Contender, DistillationJob, TaskJob
from bench.contenders.frameworks import OnPaddle, OnTorch
from finetuning.teacher_cache import TeacherCache
from objectives.distillation import Distillation, Match, Teacher, relation_matches
from objectives.matches import Models, matches_of
from objectives.relations import RelationLoss
from text.features import LabelledBatch
from text.tasks import Kind
from training.loop import seed_of


class Ours(Contender):
    def __init__(self, job: DistillationJob) -> None:
        super().__init__(job.on_gpu)
        self.title = f"ours, {self.framework}"
        self._load(job.precision)
        teacher, student = self.backend.model(job.teacher, trainable=False), self.backend.model(job.student)
        matches = relation_matches(RelationLoss(job.heads), [(job.teacher_layer, job.student_layer)])
        self._distil(teacher, student, matches, job.learning_rate)

    def _load(self, precision: Precision) -> None:
        self.backend = backends.load(self.framework, "gpu" if self.on_gpu else "cpu", precision)
        self.precision = self.backend.precision
        self.backend.seed(0)

    def _distil(
        self,
        teacher: Teacher,
        student: Model,
        matches: Sequence[Match],
        learning_rate: float,
        kind: Kind | None = None,
    ) -> None:
        student.train()
        for model, phase in ((teacher, "teacher"), (student, "student")):
            model.run = self.timed(phase, model.run)
        self.distillation = Distillation(self.backend, teacher, student, matches, kind)
        self.learning_rate = learning_rate
        self.optimizer = self.backend.optimizer(
            student, weight_decay=0.01, adam_epsilon=1e-8, max_grad_norm=1.0, loss_scale=2.0**15
        )

    def step(self, batch: Batch | LabelledBatch, number: int) -> None:
        with self.phase("data"):
            batch = batch.shortest_first() if isinstance(batch, Batch) else batch
        self.backend.seed(seed_of(0, number))
        with self.phase("loss"):
            loss, _ = self.losses(batch)
        with self.phase("backward"):
            self.optimizer.backward(loss)
        with self.phase("optimizer"):
            self.optimizer.step(self.learning_rate)

    def losses(self, batch: Batch | LabelledBatch) -> tuple[Any, dict[str, Any]]:
        """The loss, and its parts."""
        return self.distillation(batch)


class OursTorch(OnTorch, Ours):
    pass


class OursPaddle(OnPaddle, Ours):
    pass


class OursOnTask(Ours):
    wanted: Precision = "auto"

    def __init__(self, job: TaskJob) -> None:
        Contender.__init__(self)
        self._load(self.wanted)
        self.title = f"ours, {self.framework}, {self.precision}"
        teacher = self._teacher(job)
        student = self.backend.model(job.student, head="sequence_classification")
        lines: list[dict[str, Any]] = [{"of": "logits", "temperature": 8.0}]
        for pairs, line in (
            (job.states, {"of": "states", "project": "linear"}),
            (job.attention, {"of": "attention", "on": "probabilities"}),
        ):
            if pairs:
                of_teacher, of_student = zip(*pairs)
                lines.append({**line, "teacher": [*of_teacher], "student": [*of_student]})
        matches = matches_of(lines, Models(teacher.shape, student.shape, job.learning_rate))
        self._distil(teacher, student, matches, job.learning_rate, "classification")

    def _teacher(self, job: TaskJob) -> Teacher:
        return self.backend.model(job.teacher, head="sequence_classification", trainable=False)


class OursTorchOnTask(OnTorch, OursOnTask):
    pass


class OursTorchFloat32OnTask(OursTorchOnTask):
    wanted = "float32"


class OursTorchCachedOnTask(OursTorchOnTask):
    """With the teacher's answers from the disk, as `--cache_teacher` keeps them: the first epoch is over."""

    def _teacher(self, job: TaskJob) -> Teacher:
        self.title += ", answers kept"
        self.folder = tempfile.TemporaryDirectory()
        teacher = super()._teacher(job)
        classes = len(job.teacher["id2label"])
        cache = TeacherCache(self.backend, Path(self.folder.name), {}, job.features, classes, teacher.shape)
        cache.fill(teacher)
        return cache


class OursPaddleOnTask(OnPaddle, OursOnTask):
    pass
