"""Fine-tuned teachers of a task, and what a student learns from them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from backends.files import InputError
from backends.interface import Backend, Weights
from backends.shape import Shape
from finetuning.arguments import FinetuneArguments
from finetuning.teacher_cache import TeacherCache
from objectives.distillation import LabelsMatch, LogitsMatch, Match, Teacher, wanted_of
from objectives.logits import LogitsLoss
from objectives.matches import Models, matches_of
from objectives.teachers import MeanTeacher
from text.features import Features
from text.folder import ModelFolder
from text.tasks import HEAD_OF, Task

OPTION = "--teacher_model_name_or_path"


def find_teachers(
    arguments: FinetuneArguments, task: Task, student: ModelFolder, features: Features
) -> list[ModelFolder]:
    """The teachers' folders; raises InputError if one was fine-tuned on something else than the task, or cannot be
    given the student's tokens.

    Args:
        task: with its labels.
        features: of the training set.
    """
    names = arguments.teacher_model_name_or_path or []
    teachers = [ModelFolder.find(name, OPTION.removeprefix("--"), arguments.model_type) for name in names]
    for teacher in teachers:
        if teacher.tokenizer.fingerprint() != student.tokenizer.fingerprint():
            raise InputError(
                f"{OPTION} {teacher.path}: its vocabulary is not that of {student.path}; give a teacher that shares it"
            )
        teacher.check_length(arguments.max_seq_length, whose=f"teacher {teacher.path}")
        features.check_types(teacher.shape.token_types, teacher.path)
        if task.kind != "reading" and set(teacher.labels) != set(task.labels or ()):
            theirs, own = (", ".join(labels[:4]) or "none" for labels in (teacher.labels, task.labels or ()))
            raise InputError(
                f"{OPTION} {teacher.path}: its classes ({theirs}, ...) are not those of {task.name} ({own}, ...); "
                f"give a model that was fine-tuned on {task.name}"
            )
    return teachers


def task_matches(
    arguments: FinetuneArguments,
    task: Task,
    teachers: Sequence[ModelFolder],
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
        models = Models(teachers[0].shape, student, arguments.learning_rate, gather_samples=together)
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
    for match in matches:
        if task.kind == "reading" and isinstance(match, LogitsMatch) and match.compare.temperature_schedule == "flsw":
            raise InputError(f"{option}: temperature_schedule flsw: compares classes, which reading has not; give cwsm")
    return matches


def identity_of(teachers: Sequence[ModelFolder], weights: Sequence[float] | None) -> str:
    """What tells teachers, and what each counts, from others."""
    shares = [""] * len(teachers) if weights is None else [f" x {weight}" for weight in weights]
    return "; ".join(teacher.identity() + share for teacher, share in zip(teachers, shares))


def load_teacher(
    backend: Backend, task: Task, folders: Sequence[ModelFolder], weights: Sequence[float] | None = None
) -> Teacher:
    """One model, or several as one, by their weights; raises InputError if one has no head of the task."""
    names: dict[str, Any] = {
        "id2label": dict(enumerate(("start", "end") if task.kind == "reading" else task.labels or ()))
    }
    models = [
        backend.model({**folder.config, **names}, _weights_in_order(folder, task), HEAD_OF[task.kind], trainable=False)
        for folder in folders
    ]
    return models[0] if len(models) == 1 else MeanTeacher(models, weights or ())


def open_cache(
    arguments: FinetuneArguments, backend: Backend, task: Task, teachers: Sequence[ModelFolder], features: Features
) -> TeacherCache | None:
    """The teachers' answers to the training set, as far as they are on disk; None if none are to be kept.

    Raises:
        InputError: what is there is of other teachers or other text, or damaged.
    """
    if arguments.cache_teacher is None:
        return None
    labels = json.dumps(task.labels or ())
    key = {
        "teachers": identity_of(teachers, arguments.teacher_weights),
        "classes": hashlib.sha256(labels.encode()).hexdigest()[:16],
        "text": f"{len(features)} sequences, sha256 {features.fingerprint()[:16]}",
        "precision": backend.precision,
    }
    classes = 2 if task.kind == "reading" else len(task.labels or ())
    return TeacherCache(backend, Path(arguments.cache_teacher), key, features, classes, teachers[0].shape)


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
