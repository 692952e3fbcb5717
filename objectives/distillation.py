"""Distillation of a student from a teacher by matches: what of the two is compared, and how."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import numpy as np

from backends.files import InputError
from backends.interface import Backend, Batch, Captured, Model, Tensor, Wanted
from backends.shape import Shape
from objectives.attention import Heads, Loss, On, attention_loss
from objectives.groups import RELATIONS, Tokens
from objectives.logits import LogitsLoss, Rows
from objectives.relations import RelationLoss
from objectives.states import LOSSES
from objectives.supervised import class_rows
from objectives.transport import cheapest_flow
from text.features import IGNORED, LabelledBatch
from text.masking import MaskedBatch
from text.tasks import Kind

WeightSchedule = Literal["constant", "linear_decay", "linear_growth"]
SCHEDULES: Mapping[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "linear_decay": lambda done: 1.0 - done,
    "linear_growth": lambda done: done,
}
"""What a weight is multiplied by, of how much of training is done, from 0 to 1."""
ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda x: x,
    "relu": lambda x: x.clip(min=0.0),
    "tanh": lambda x: x.tanh(),
}


class Teacher(Protocol):
    """A model, or what answers like one."""

    @property
    def shape(self) -> Shape: ...

    def run(self, batch: Batch, wanted: Wanted) -> Captured: ...


class Projection(NamedTuple):
    """A layer from the student's width to the teacher's, which the student learns and its folder does not have."""

    number: int
    """Its name; matches that have the same share it."""
    kind: Literal["linear", "relu", "tanh"] = "linear"
    """What follows the linear layer, which is nothing else."""
    rate: float = 1.0
    """Its learning rate, as a multiple of the student's."""


@dataclass(frozen=True)
class Seen:
    """What teacher and student gave of the same batch."""

    backend: Backend
    teacher: Captured
    student: Captured
    attention_mask: np.ndarray
    """[B, L], nonzero at tokens."""
    together: bool
    """Whether several processes share the batch."""
    rows: Rows | None
    """Logits, where they were wanted."""
    projections: Mapping[int, Callable[[Tensor], Tensor]]

    @cached_property
    def tokens(self) -> Tokens:
        return Tokens.of(self.backend, self.attention_mask, self.together)


@dataclass(frozen=True, kw_only=True)
class Match(ABC):
    """Something of teacher and student that is compared."""

    weight: float = 1.0
    weight_schedule: WeightSchedule = "constant"
    """What the weight is multiplied by: 1, or what falls from 1 to 0 or grows from 0 to 1 in the course of training."""

    @property
    def keys(self) -> list[str]:
        """Names of the parts that `evaluate` gives; equal ones of several matches add up."""
        return [str(self)]

    @property
    def parts(self) -> Sequence[Match]:
        """The matches of single layers that it is made of."""
        return [self]

    def weight_at(self, done: float) -> float:
        return self.weight * SCHEDULES[self.weight_schedule](done)

    @abstractmethod
    def wanted(self) -> tuple[Wanted, Wanted]:
        """Of the teacher and of the student."""

    def check(self, teacher: Shape, student: Shape) -> None:  # noqa: B027, some matches fit any two models
        """Raises InputError if models of these shapes cannot be so compared."""

    def compares_tokens(self, kind: Kind | None) -> bool:
        """Whether teacher and student must read the same tokens; else texts are compared.

        Args:
            kind: of the task; None is masked language modelling.
        """
        return True

    @abstractmethod
    def loss(self, seen: Seen) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, without its weight, and its parts."""

    def evaluate(self, seen: Seen) -> tuple[Tensor, dict[str, Tensor]]:
        """The same, with parts that are not trained too; nothing need be differentiable."""
        return self.loss(seen)

    def _as_part(self, loss: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return loss, {str(self): loss.detach()}


@dataclass(frozen=True)
class RelationMatch(Match):
    """Relations of queries, keys and values of a layer of each, from 0."""

    relations: RelationLoss
    teacher: int
    student: int

    @property
    def keys(self) -> list[str]:
        return [f"{relation}/{pair}" for relation in RELATIONS for pair in self.relations.pairs]

    def __str__(self) -> str:
        return f"relations/{self.teacher}-{self.student}"

    def wanted(self) -> tuple[Wanted, Wanted]:
        padded = self.relations.padding == "ppminilm"
        return Wanted(qkv=[self.teacher], padded=padded), Wanted(qkv=[self.student], padded=padded)

    def check(self, teacher: Shape, student: Shape) -> None:
        _check_attention(teacher, student)
        for whose, shape, layer in (("teacher", teacher, self.teacher), ("student", student, self.student)):
            if not 0 <= layer < len(shape.layers):
                raise InputError(f"{whose}_layer_index {layer}: the {whose} has layers 0 to {len(shape.layers) - 1}")
            self.relations.check_width(shape.layers[layer].width, whose)

    def loss(self, seen: Seen) -> tuple[Tensor, dict[str, Tensor]]:
        teacher, student = seen.teacher.qkv[self.teacher], seen.student.qkv[self.student]
        return self.relations(seen.backend, teacher, student, seen.attention_mask)

    def evaluate(self, seen: Seen) -> tuple[Tensor, dict[str, Tensor]]:
        teacher, student = seen.teacher.qkv[self.teacher], seen.student.qkv[self.student]
        relations = replace(self.relations, gather_samples=seen.together and self.relations.gather_samples)
        parts = relations.evaluate(seen.backend, teacher, student, seen.attention_mask)
        return parts.pop("loss"), parts


def relation_matches(loss: RelationLoss, layer_pairs: Sequence[tuple[int, int]]) -> list[Match]:
    """The same relations between (teacher layer, student layer) pairs, from 0.

    The student's deepest matched layer gets no gradient in its attention output and feed-forward weights.
    """
    return [RelationMatch(loss, teacher, student) for teacher, student in layer_pairs]


@dataclass(frozen=True)
class StatesMatch(Match):
    """Hidden states of a layer of each, or of two: 0 the embeddings, n the output of the n-th layer."""

    teacher: tuple[int, ...]
    student: tuple[int, ...]
    compare: str = "mse"
    """Of `objectives.states.LOSSES`."""
    projection: Projection | None = None

    def __str__(self) -> str:
        teacher, student = ("+".join(map(str, layers)) for layers in (self.teacher, self.student))
        return f"states/{self.compare}/{teacher}-{student}"

    def wanted(self) -> tuple[Wanted, Wanted]:
        return Wanted(states=self.teacher), Wanted(states=self.student)

    def check(self, teacher: Shape, student: Shape) -> None:
        for whose, shape, layers in (("teacher", teacher, self.teacher), ("student", student, self.student)):
            last = len(shape.layers)
            if not (shape.hidden and min(layers) >= 0 and max(layers) <= last):
                raise InputError(f"the {whose} has {f'states 0 to {last}' if shape.hidden else 'no hidden states'}")
        if self.projection is None and not LOSSES[self.compare].any_width and teacher.hidden != student.hidden:
            raise InputError(
                f"loss {self.compare}: the teacher's states have {teacher.hidden} dimensions, the student's "
                f"{student.hidden}; give project: linear"
            )

    def compares_tokens(self, kind: Kind | None) -> bool:
        return not LOSSES[self.compare].of_texts

    def loss(self, seen: Seen) -> tuple[Tensor, dict[str, Tensor]]:
        student = {layer: seen.student.states[layer] for layer in self.student}
        if self.projection is not None:
            project, activation = seen.projections[self.projection.number], ACTIVATIONS[self.projection.kind]
            with seen.backend.autocast():
                student = {layer: activation(project(x)) for layer, x in student.items()}
        teacher = [seen.teacher.states[layer] for layer in self.teacher]
        compare = LOSSES[self.compare].compute
        return self._as_part(compare(seen.backend, teacher, [student[layer] for layer in self.student], seen.tokens))


@dataclass(frozen=True)
class AttentionMatch(Match):
    """Attention of a layer of each, from 0."""

    shapes: tuple[Shape, Shape]
    """Of teacher and student."""
    teacher: int
    student: int
    compare: Loss = "mse"
    on: On = "scores"
    heads: Heads = "each"

    def __str__(self) -> str:
        over = "" if self.heads == "each" else f"_{self.heads}"
        of = "" if self.on == "scores" else f"_{self.on}"
        return f"attention/{self.compare}{over}{of}/{self.teacher}-{self.student}"

    def wanted(self) -> tuple[Wanted, Wanted]:
        return Wanted(qkv=[self.teacher]), Wanted(qkv=[self.student])

    def check(self, teacher: Shape, student: Shape) -> None:
        _check_attention(teacher, student)
        theirs, own = teacher.layers[self.teacher].heads, student.layers[self.student].heads
        if self.heads == "each" and theirs != own:
            raise InputError(
                f"heads each: the teacher's layer {self.teacher} has {theirs} attention heads, the student's layer "
                f"{self.student} {own}; give heads: sum or mean, or a student with {theirs}"
            )

    def loss(self, seen: Seen) -> tuple[Tensor, dict[str, Tensor]]:
        teacher, student = seen.teacher.qkv[self.teacher], seen.student.qkv[self.student]
        shapes = self.shapes[0].layers[self.teacher], self.shapes[1].layers[self.student]
        loss = attention_loss(seen.backend, teacher, student, shapes, seen.tokens, self.compare, self.on, self.heads)
        return self._as_part(loss)


@dataclass(frozen=True)
class TransportMatch(Match):
    """All pairs of a layer of each, weighted by the flow that is cheapest for the batch (`cheapest_flow`).

    The flow gets no gradient; of processes that share a batch it is the same.
    """

    pairs: Sequence[Sequence[Match]]
    """Of each layer of the teacher, the matches with each of the student's."""

    def __str__(self) -> str:
        compared, _ = str(self.pairs[0][0]).rsplit("/", 1)
        return f"{compared}/emd"

    @property
    def parts(self) -> Sequence[Match]:
        return [match for of_layer in self.pairs for match in of_layer]

    def wanted(self) -> tuple[Wanted, Wanted]:
        return wanted_of(self.parts)

    def check(self, teacher: Shape, student: Shape) -> None:
        for match in self.parts:
            match.check(teacher, student)

    def compares_tokens(self, kind: Kind | None) -> bool:
        return any(match.compares_tokens(kind) for match in self.parts)

    def loss(self, seen: Seen) -> tuple[Tensor, dict[str, Tensor]]:
        backend = seen.backend
        with backend.no_grad():
            distances_of_pairs = backend.concat([match.loss(seen)[0].reshape([1]) for match in self.parts])
        distances = backend.numpy(distances_of_pairs).astype(np.float64)
        if seen.together:
            distances = backend.total(distances) / backend.world_size
        flow = cheapest_flow(distances.reshape(len(self.pairs), -1)).reshape(-1)
        terms = [match.loss(seen)[0] * amount for match, amount in zip(self.parts, flow.tolist()) if amount]
        return self._as_part(sum(terms[1:], terms[0]))


@dataclass(frozen=True)
class LogitsMatch(Match):
    """What the heads say."""

    compare: LogitsLoss

    def __str__(self) -> str:
        return f"logits/{self.compare.loss}"

    def wanted(self) -> tuple[Wanted, Wanted]:
        return Wanted(logits=True), Wanted(logits=True)

    def compares_tokens(self, kind: Kind | None) -> bool:
        return kind != "classification"

    def loss(self, seen: Seen) -> tuple[Tensor, dict[str, Tensor]]:
        assert seen.rows is not None
        return self._as_part(self.compare(seen.backend, seen.rows, seen.together))


@dataclass(frozen=True)
class LabelsMatch(Match):
    """What the student's head says, and what is right."""

    def __str__(self) -> str:
        return "labels"

    def wanted(self) -> tuple[Wanted, Wanted]:
        return Wanted(), Wanted(logits=True)

    def compares_tokens(self, kind: Kind | None) -> bool:
        return False

    def loss(self, seen: Seen) -> tuple[Tensor, dict[str, Tensor]]:
        rows = seen.rows
        assert rows is not None
        return self._as_part(seen.backend.cross_entropy(rows.student, rows.targets) / rows.known)


def _check_attention(teacher: Shape, student: Shape) -> None:
    """Raises InputError if one of two models has no queries, keys and values."""
    for whose, shape in (("teacher", teacher), ("student", student)):
        if not any(layer.heads for layer in shape.layers):
            raise InputError(f"the {whose} has no queries, keys and values; compare states or logits")


@dataclass
class Distillation:
    """A student learns from its teacher: weighted matches, added up.

    Both models run once, as far as the matches need.

    Args:
        kind: of the task whose labelled batches it is given, if they are such.
        seed: what projections start from.

    Raises:
        InputError: the models cannot be so compared.
    """

    backend: Backend
    teacher: Teacher
    student: Model
    matches: Sequence[Match]
    kind: Kind | None = None
    seed: int = 0
    projections: dict[int, Callable[[Tensor], Tensor]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        for match in self.matches:
            match.check(self.teacher.shape, self.student.shape)
        for projection in projections_of(self.matches):
            random = np.random.default_rng((self.seed, projection.number))
            size = self.teacher.shape.hidden, self.student.shape.hidden
            weight = (0.02 * random.standard_normal(size)).astype(np.float32)
            self.projections[projection.number] = self.student.add_projection(
                projection.number, weight, projection.rate
            )

    @property
    def keys(self) -> list[str]:
        """Names of what `evaluate` gives."""
        return ["loss", *dict.fromkeys(key for match in self.matches for key in match.keys)]

    def __call__(
        self, batch: Batch | MaskedBatch | LabelledBatch, done: float = 0.0
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch, and its parts without their weights; processes share the batch."""
        seen = self._see(batch, together=self.backend.world_size > 1)
        found = [match.loss(seen) for match in self.matches]
        losses = [loss * match.weight_at(done) for match, (loss, _) in zip(self.matches, found)]
        return sum(losses[1:], losses[0]), _add([parts for _, parts in found])

    def evaluate(self, batch: Batch | MaskedBatch | LabelledBatch) -> dict[str, Tensor]:
        """``loss``, with all weights as they are without a schedule, and every part, those that are not trained too,
        without gradient; the batch is this process' alone."""
        with self.backend.no_grad():
            seen = self._see(batch, together=False)
            found = [match.evaluate(seen) for match in self.matches]
        losses = [loss * match.weight for match, (loss, _) in zip(self.matches, found)]
        return {"loss": sum(losses[1:], losses[0]), **_add([parts for _, parts in found])}

    def _see(self, batch: Batch | MaskedBatch | LabelledBatch, together: bool) -> Seen:
        at = batch.positions if isinstance(batch, MaskedBatch) else None
        tokens = batch if isinstance(batch, Batch) else batch.batch
        of_teacher, of_student = (side._replace(at=at) for side in wanted_of(self.matches))
        with self.backend.autocast():
            with self.backend.no_grad():
                teacher = self.teacher.run(tokens, of_teacher)
            student = self.student.run(tokens, of_student)
        rows = self._rows(batch, teacher, student, together) if of_student.logits else None
        return Seen(self.backend, teacher, student, tokens.attention_mask, together, rows, self.projections)

    def _rows(
        self, batch: Batch | MaskedBatch | LabelledBatch, teacher: Captured, student: Captured, together: bool
    ) -> Rows:
        """Logits as they are compared; the teacher's are the student's where the teacher is not asked."""
        logits = [student.logits if side.logits is None else side.logits for side in (teacher, student)]
        classes = [x.shape[-1] for x in logits]
        if classes[0] != classes[1]:
            raise InputError(f"logits: the teacher's are of {classes[0]} classes, the student's of {classes[1]}")
        if isinstance(batch, MaskedBatch):
            count = float(len(batch.labels))
            if together:
                count = self.backend.total(np.array([count]))[0] / self.backend.world_size
            return Rows(logits[0], logits[1], batch.labels, count, count, count * logits[1].shape[-1])
        assert isinstance(batch, LabelledBatch) and self.kind is not None
        rows = [class_rows(self.backend, self.kind, x, batch) for x in logits]
        targets = np.concatenate(batch.targets)
        processes = self.backend.world_size if together else 1
        count, known = (max(1, number) / processes for number in (batch.answered, batch.counted))
        entries = count * rows[1].shape[-1]
        if self.kind == "reading":
            entries = 2 * Tokens.of(self.backend, batch.batch.attention_mask, together).tokens
        kept = np.flatnonzero(targets != IGNORED)
        if not kept.size:  # the share of a process for which no sequence was left
            kept, count, known, entries = np.array([0]), math.inf, math.inf, math.inf
        if kept.size < targets.size:
            at = self.backend.tensor(kept)
            rows = [x[at] for x in rows]
        return Rows(rows[0], rows[1], targets[kept], count, known, entries)


def check_texts_are_compared(matches: Sequence[Match], kind: Kind | None, teacher: Path, fitting: str) -> None:
    """Refuses matches that need both models to read the same tokens.

    Args:
        kind: of the task; None is masked language modelling.
        teacher: the folder of one whose vocabulary is not the student's.
        fitting: what may be compared instead.

    Raises:
        InputError: a match compares tokens.
    """
    for match in matches:
        if match.compares_tokens(kind):
            raise InputError(
                f"--teacher_model_name_or_path {teacher}: its vocabulary is not the student's, and {match} compares "
                f"token by token; give {fitting}, or a teacher that shares the vocabulary"
            )


def projections_of(matches: Sequence[Match]) -> list[Projection]:
    """Every projection once, in order."""
    parts = [part for match in matches for part in match.parts]
    found = [part.projection for part in parts if isinstance(part, StatesMatch) and part.projection]
    return sorted(dict.fromkeys(found))


def wanted_of(matches: Sequence[Match]) -> tuple[Wanted, Wanted]:
    """All that matches want of the teacher and of the student."""
    of_teacher, of_student = zip(*(match.wanted() for match in matches))
    return _union(of_teacher), _union(of_student)


def _union(wanted: Sequence[Wanted]) -> Wanted:
    return Wanted(
        states=sorted({state for one in wanted for state in one.states}),
        qkv=sorted({layer for one in wanted for layer in one.qkv}),
        logits=any(one.logits for one in wanted),
        padded=any(one.padded for one in wanted),
    )


def _add(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Sums dictionaries key by key."""
    total: dict[str, Tensor] = {}
    for some in parts:
        for key, part in some.items():
            total[key] = total[key] + part if key in total else part
    return total
