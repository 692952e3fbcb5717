"""Distillation of a student from a teacher by the relations of their queries, keys and values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from backends.files import InputError
from backends.interface import QKV, Backend, Batch, Model, Tensor, Wanted
from backends.shape import Shape
from objectives.relations import RelationLoss


def check_layers(
    loss: RelationLoss,
    layer_pairs: Sequence[tuple[int, int]],
    teacher: Shape,
    student: Shape,
) -> None:
    """Raises InputError if models of these shapes cannot be related:
    a layer is not there, or the relation heads do not divide its width."""
    for whose, shape, layers in (
        ("teacher", teacher, [layer for layer, _ in layer_pairs]),
        ("student", student, [layer for _, layer in layer_pairs]),
    ):
        for layer in layers:
            if not 0 <= layer < len(shape.layers):
                raise InputError(f"{whose}_layer_index {layer}: the {whose} has layers 0 to {len(shape.layers) - 1}")
            loss.check_width(shape.layers[layer].width, whose)


@dataclass(frozen=True)
class RelationDistillation:
    """Relation losses between layers of a teacher and a student, summed over the layer pairs.

    Only the layers up to the captured ones run. The student layer whose Q, K, V
    are matched gets no gradient in its attention output and feed-forward weights.

    Args:
        layer_pairs: (teacher layer, student layer), from 0.

    Raises:
        InputError: a layer that is not there, or relation heads that do not
            divide a width of Q, K, V.
    """

    backend: Backend
    teacher: Model
    student: Model
    loss: RelationLoss
    layer_pairs: Sequence[tuple[int, int]]

    def __post_init__(self) -> None:
        check_layers(self.loss, self.layer_pairs, self.teacher.shape, self.student.shape)

    def __call__(self, batch: Batch, done: float = 0.0) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch and its unweighted parts (see `RelationLoss`); the same however much is done."""
        losses, all_parts = [], []
        for teacher, student in self._captured(batch):
            loss, parts = self.loss(self.backend, teacher, student, batch.attention_mask)
            losses.append(loss)
            all_parts.append(parts)
        return sum(losses[1:], losses[0]), _add(all_parts)

    def evaluate(self, batch: Batch) -> dict[str, Tensor]:
        """Every relation of a batch, without gradient (see `RelationLoss.evaluate`)."""
        with self.backend.no_grad():
            return _add(
                [
                    self.loss.evaluate(self.backend, teacher, student, batch.attention_mask)
                    for teacher, student in self._captured(batch)
                ]
            )

    def _captured(self, batch: Batch) -> list[tuple[QKV, QKV]]:
        teacher_layers, student_layers = zip(*self.layer_pairs)
        with self.backend.autocast():
            padded = self.loss.padding == "ppminilm"
            with self.backend.no_grad():
                teacher = self.teacher.run(batch, Wanted(qkv=teacher_layers, padded=padded))
            student = self.student.run(batch, Wanted(qkv=student_layers, padded=padded))
        return [(teacher.qkv[t], student.qkv[s]) for t, s in self.layer_pairs]


def _add(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Sums dictionaries key by key."""
    return {key: sum((p[key] for p in parts[1:]), parts[0][key]) for key in parts[0]}
