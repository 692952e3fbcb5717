"""Fine-tuned teachers of a task, and what a student learns from them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from backends.files import InputError
from backends.interface import Backend, Batch, Model, Weights
from backends.shape import Shape
from finetuning.arguments import FinetuneArguments
from finetuning.teacher_cache import TeacherCache
from objectives.distillation import (
    LabelsMatch,
    LogitsMatch,
    Match,
    Teacher,
    check_texts_are_compared,
    wanted_of,
)
from objectives.logits import LogitsLoss
from objectives.matches import Models, matches_of
from objectives.teachers import ForeignTeacher, MeanTeacher
from text.features import Features, task_features
from text.folder import ModelFolder
from text.tasks import HEAD_OF, Task

OPTION = "--teacher_model_name_or_path"


@dataclass(frozen=True)
class TaskTeacher:
    """A fine-tuned model, and what it reads."""

    folder: ModelFolder
    foreign: Features | None = None
    """The training set in its tokens, if its vocabulary is another than the student's."""

    def __str__(self) -> str:
        if self.foreign is None:
            return str(self.folder.path)
        return f"{self.folder.path} (in its own tokens, {int(self.foreign.truncated.sum())} texts cut)"


def find_teachers(
    arguments: FinetuneArguments, task: Task, student: ModelFolder, examples: Sequence[Any], features: Features
) -> list[TaskTeacher]:
    """The teachers; raises InputError if one was fine-tuned on something else than the task, or cannot read the
    training set.

    Args:
        task: with its labels.
        examples: the training set.
        features: the same in the student's tokens.
    """
    names = arguments.teacher_model_name_or_path or []
    folders = [ModelFolder.find(name, OPTION.removeprefix("--"), arguments.model_type) for name in names]
    teachers = []
    for teacher in folders:
        foreign = None
        if teacher.tokenizer.fingerprint() == student.tokenizer.fingerprint():
            teacher.check_length(arguments.max_seq_length, whose=f"teacher {teacher.path}")
        elif task.kind == "reading":
            raise InputError(
                f"{OPTION} {teacher.path}: its vocabulary is not that of {student.path}, and windows of reading are "
                "cut by tokens; give a teacher that shares it"
            )
        else:
            length = arguments.teacher_max_seq_length or arguments.max_seq_length
            teacher.check_length(length, "--teacher_max_seq_length", f"teacher {teacher.path}")
            foreign = task_features(task.kind, teacher.tokenizer, examples, length)
        (features if foreign is None else foreign).check_types(teacher.shape.token_types, teacher.path)
        teachers.append(TaskTeacher(teacher, foreign))
        if task.kind != "reading" and set(teacher.labels) != set(task.labels or ()):
            theirs, own = (", ".join(labels[:4]) or "none" for labels in (teacher.labels, task.labels or ()))
            raise InputError(
                f"{OPTION} {teacher.path}: its classes ({theirs}, ...) are not those of {task.name} ({own}, ...); "
                f"give a model that was fine-tuned on {task.name}"
            )
    if arguments.teacher_max_seq_length is not None and all(teacher.foreign is None for teacher in teachers):
        raise InputError(
            f"--teacher_max_seq_length {arguments.teacher_max_seq_length}: has no effect on teachers that share the "
            "student's vocabulary, and read its tokens; leave it out"
        )
    return teachers


def task_matches(
    arguments: FinetuneArguments,
    task: Task,
    teachers: Sequence[TaskTeacher],
    student: Shape,
    together: bool,
    option: str = "--matches",
) -> list[Match]:
    """What the student learns from in a stage; raises InputError if that is nothing, or cannot be.

    Args:
        arguments: those of the stage.
        together: whether several processes share a batch.
        option: what has the lines of matches.
    """
    logits = LogitsLoss(
        arguments.kd_loss, arguments.temperature, arguments.squared_temperature, arguments.probability_shift
    )
    matches: list[Match] = [
        *([LogitsMatch(logits, weight=arguments.kd_weight)] if arguments.kd_weight else []),
        *([LabelsMatch(weight=arguments.hard_label_weight)] if arguments.hard_label_weight else []),
    ]
    if arguments.matches is not None:
        models = Models(teachers[0].folder.shape, student, arguments.learning_rate, gather_samples=together)
        matches += matches_of(arguments.matches, models, option)
    if not matches:
        raise InputError("--kd_weight 0 --hard_label_weight 0: nothing to learn from; give one of them, or --matches")
    if arguments.unlabelled is not None and all(isinstance(match, LabelsMatch) for match in matches):
        raise InputError(
            f"--unlabelled {arguments.unlabelled}: nothing but labels is learnt; give --kd_weight, or --matches, or "
            "leave it out"
        )
    wanted, _ = wanted_of(matches)
    if len(teachers) > 1 and (wanted.states or wanted.qkv):
        raise InputError(
            f"{option}: of {len(teachers)} teachers only logits are averaged; give one, or lines of logits and labels"
        )
    if arguments.cache_teacher is not None and (wanted.states or wanted.qkv):
        raise InputError("--cache_teacher: keeps logits alone; leave it out, or other lines of --matches")
    if arguments.cache_teacher is not None and not wanted.logits:
        raise InputError("--cache_teacher: keeps logits, and none are learnt; leave it out, or give --kd_weight")
    for teacher in teachers:
        if teacher.foreign is not None:
            fitting = "--kd_weight 0, labels" if task.kind == "labelling" else "logits, labels"
            fitting += " or {of: states, loss: pkd}"
            check_texts_are_compared(matches, task.kind, teacher.folder.path, fitting)
    for match in matches:
        if task.kind == "reading" and isinstance(match, LogitsMatch) and match.compare.temperature_schedule == "flsw":
            raise InputError(f"{option}: temperature_schedule flsw: compares classes, which reading has not; give cwsm")
    return matches


def identity_of(teachers: Sequence[TaskTeacher], weights: Sequence[float] | None) -> str:
    """What tells teachers, and what each counts, from others."""
    shares = [""] * len(teachers) if weights is None else [f" x {weight}" for weight in weights]
    return "; ".join(teacher.folder.identity() + share for teacher, share in zip(teachers, shares))


def load_teacher(
    backend: Backend, task: Task, teachers: Sequence[TaskTeacher], weights: Sequence[float] | None = None
) -> Teacher:
    """One model, or several as one, by their weights; raises InputError if one has no head of the task."""
    models = [_load(backend, task, teacher) for teacher in teachers]
    return models[0] if len(models) == 1 else MeanTeacher(models, weights or ())


def _load(backend: Backend, task: Task, teacher: TaskTeacher) -> Model | ForeignTeacher:
    """A teacher's model, given its own tokens if they are others."""
    folder, foreign = teacher.folder, teacher.foreign
    names = dict(enumerate(("start", "end") if task.kind == "reading" else task.labels or ()))
    config = {**folder.config, "id2label": names}
    model = backend.model(config, _weights_in_order(folder, task), HEAD_OF[task.kind], trainable=False)
    if foreign is None:
        return model

    def own_tokens(batch: Batch) -> Batch:
        assert batch.numbers is not None
        return foreign.batch(batch.numbers)

    return ForeignTeacher(backend, model, own_tokens)


def open_cache(
    arguments: FinetuneArguments, backend: Backend, task: Task, teachers: Sequence[TaskTeacher], features: Features
) -> TeacherCache | None:
    """The teachers' answers to the training set, as far as they are on disk; None if none are to be kept.

    Args:
        features: the training set in the student's tokens.

    Raises:
        InputError: what is there is of other teachers or other text, or damaged.
    """
    if arguments.cache_teacher is None:
        return None
    labels = json.dumps(task.labels or ())
    read = [features if teacher.foreign is None else teacher.foreign for teacher in teachers]
    texts = [f"{len(text)} sequences, sha256 {text.fingerprint()[:16]}" for text in read]
    key = {
        "teachers": identity_of(teachers, arguments.teacher_weights),
        "classes": hashlib.sha256(labels.encode()).hexdigest()[:16],
        "text": "; ".join(dict.fromkeys(texts)),
        "precision": backend.precision,
    }
    classes = 2 if task.kind == "reading" else len(task.labels or ())
    return TeacherCache(backend, Path(arguments.cache_teacher), key, features, classes, teachers[0].folder.shape)


def _weights_in_order(folder: ModelFolder, task: Task) -> Weights:
    """A teacher's weights, its classes in the order of the task's."""
    weights = folder.weights()
    name = "qa_outputs" if task.kind == "reading" else "classifier"
    if f"{name}.weight" not in weights:
        raise InputError(
            f"{OPTION} {folder.path}: has no head of {task.kind}; give a model that was fine-tuned on {task.name}"
        )
    if task.kind != "reading":
        order = np.array([folder.labels.index(label) for label in task.labels or ()])
        weights |= {f"{name}.{part}": weights[f"{name}.{part}"][order] for part in ("weight", "bias")}
    return weights
