"""Lines of a recipe -> what of a teacher and a student is compared (`objectives.distillation.Match`).

A line is a mapping such as ``{of: states, teacher: 8, student: 2, loss: mse, weight: 1, project: linear}``, or the name
of some (`PRESETS`). ``teacher`` and ``student`` are a layer, or lists of equally many, each pair of which is matched;
without ``student`` all its layers are, and ``teacher`` is then ``uniform`` or ``last``. States count from 0, the
embeddings; attention's and relations' layers from 0, the first. Losses of two layers (gram, nst) take a layer n for
n and n, or a list of pairs. With ``teacher: emd`` all pairs of layers but the embeddings are compared, as much as the
earth mover's distance has it (`TransportMatch`).
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, Literal

from backends.files import InputError
from backends.shape import Shape
from objectives.distillation import (
    ACTIVATIONS,
    SCHEDULES,
    AttentionMatch,
    LabelsMatch,
    LogitsMatch,
    Match,
    Projection,
    RelationMatch,
    StatesMatch,
    TransportMatch,
)
from objectives.logits import DIVERGENCES, LogitsLoss
from objectives.relations import RelationLoss
from objectives.states import LOSSES

Line = Mapping[str, Any]
EMD = "emd"
"""What `teacher` is where layers correspond by earth mover's distance."""


def _states(teacher: int, student: int, stride: int, loss: str = "mse", **more: Any) -> list[Line]:
    layers = {"teacher": [*range(0, teacher + 1, stride)], "student": [*range(student + 1)]}
    return [{"of": "states", **layers, "loss": loss, **more}]


def _attention(student: int, loss: str, heads: str) -> list[Line]:
    stride = 12 // student
    layers = {"teacher": [*range(stride - 1, 12, stride)], "student": [*range(student)]}
    return [{"of": "attention", **layers, "loss": loss, "heads": heads}]


def _of_equally_deep(loss: str, **more: Any) -> list[Line]:
    layers = [*range(0, 13, 2)]
    return [{"of": "states", "teacher": layers, "student": layers, "loss": loss, **more}]


PRESETS: Mapping[str, Sequence[Line]] = {
    **{
        f"L{layers}_attention_{loss}{'' if heads == 'each' else f'_{heads}'}": _attention(layers, loss, heads)
        for layers in (3, 4)
        for loss, heads in (("mse", "each"), ("mse", "sum"), ("ce", "each"), ("ce", "mean"))
    },
    "L3_hidden_mse": _states(12, 3, 4),
    "L3n_hidden_mse": _states(12, 3, 4, project="linear"),
    "L3_hidden_smmd": _states(12, 3, 4, "nst"),
    "L4t_hidden_mse": _states(12, 4, 3, project="linear"),
    "L4_hidden_smmd": _states(12, 4, 3, "nst"),
    "L4t_hidden_sgram": _states(12, 4, 3, "gram", project="linear"),
    "L6_hidden_mse": _states(12, 6, 2),
    "L6_hidden_smmd": _states(12, 6, 2, "nst"),
    "small_hidden_mse": _of_equally_deep("mse", project="linear"),
    "small_hidden_smmd": _of_equally_deep("nst"),
}
"""TextBrewer's matches by their names. Its attention counts layers from 1 (and so asks transformers for one that is not
there); here the same layers count from 0."""


def _number(least: float, excluded: bool = False) -> tuple[Callable[[Any], bool], str]:
    def fits(value: Any) -> bool:
        is_number = type(value) in (int, float)
        return is_number and (value > least if excluded else value >= least)

    return fits, f"a number {'greater than' if excluded else 'of at least'} {least:g}"


def _one_of(choices: Collection[str]) -> tuple[Callable[[Any], bool], str]:
    return lambda value: isinstance(value, str) and value in choices, f"one of {', '.join(choices)}"


_COUNT = (lambda value: type(value) is int and value >= 1), "a whole number of at least 1"
_TRUTH = (lambda value: isinstance(value, bool)), "true or false"
_LAYERS = (lambda value: True), ""  # `_layers` looks at them
_COMMON = {"weight": _number(0.0), "weight_schedule": _one_of(SCHEDULES)}
_OF_LAYERS = {**_COMMON, "teacher": _LAYERS, "student": _LAYERS}
KEYS: Mapping[str, Mapping[str, tuple[Callable[[Any], bool], str]]] = {
    "states": {
        **_OF_LAYERS,
        "loss": _one_of(LOSSES),
        "project": _one_of(ACTIVATIONS),
        "shared": _TRUTH,
        "rate": _number(0.0, excluded=True),
    },
    "attention": {
        **_OF_LAYERS,
        "loss": _one_of(("mse", "ce", "kl")),
        "on": _one_of(("scores", "probabilities")),
        "heads": _one_of(("each", "sum", "mean")),
    },
    "relations": {
        **_OF_LAYERS,
        "num_relation_heads": _COUNT,
        "alpha": _number(0.0),
        "beta": _number(0.0),
        "pairs": (lambda value: isinstance(value, dict), "pairs of q, k, v, each with its weight, as in {q-q: 1}"),
    },
    "logits": {
        **_COMMON,
        "loss": _one_of(DIVERGENCES),
        "temperature": _number(0.0, excluded=True),
        "squared": _TRUTH,
        "probability_shift": _TRUTH,
        "temperature_schedule": _one_of(("constant", "flsw", "cwsm")),
        "beta": _number(0.0),
        "gamma": _number(0.0),
    },
    "labels": _COMMON,
}
"""What is compared -> the keys of its lines, what their values must be."""


@dataclass(frozen=True)
class Models:
    """What lines are for."""

    teacher: Shape
    student: Shape
    learning_rate: float
    """The student's."""
    gather_samples: bool = False
    """Of relations (`RelationLoss`)."""


def matches_of(lines: Sequence[str | Line], models: Models, option: str = "--matches") -> list[Match]:
    """The matches of a recipe's lines.

    Args:
        option: what has the lines.

    Raises:
        InputError: a line that makes no sense, or models that cannot be so compared; it names the line, what is wrong
            and what would fit.
    """
    if not lines:
        raise InputError(f"{option}: none given; a line is one of {', '.join(PRESETS)}, or as in {EXAMPLE}")
    numbers = count()
    found: list[Match] = []
    for place, line in _expanded(lines, option):
        try:
            made = list(_matches_of_line(_checked(line), models, numbers))
            for match in made:
                match.check(models.teacher, models.student)
        except InputError as error:
            raise InputError(f"{option}, {place}: {error}") from error
        found += made
    return found


EXAMPLE = "{of: states, teacher: 8, student: 2, loss: mse, project: linear}"


def _expanded(lines: Sequence[str | Line], option: str) -> Iterator[tuple[str, Line]]:
    """Lines, presets taken apart, each with where it is."""
    for number, line in enumerate(lines, 1):
        if not isinstance(line, str):
            yield f"line {number}", line
        elif line in PRESETS:
            yield from ((line, own) for own in PRESETS[line])
        else:
            near = difflib.get_close_matches(line, PRESETS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(PRESETS)}"
            if line.startswith("{"):
                hint = f"keys and values stand in a list, as in [{EXAMPLE}]"
            raise InputError(f"{option}, line {number}: no preset is called {line}; {hint}")


def _checked(line: Line) -> Line:
    """The line; raises InputError if a key or its value is none."""
    if not isinstance(line, Mapping):
        raise InputError(f"{line!r}: expected keys and values, as in {EXAMPLE}")
    kind = line.get("of")
    if not isinstance(kind, str) or kind not in KEYS:
        raise InputError(f"of: {kind}: must be one of {', '.join(KEYS)}")
    for key, value in line.items():
        if key == "of":
            continue
        if key not in KEYS[kind]:
            near = difflib.get_close_matches(str(key), KEYS[kind], n=1)
            raise InputError(f"{key}: unknown for {kind}; " + (f"did you mean {near[0]}?" if near else _keys(kind)))
        fits, wanted = KEYS[kind][key]
        if not fits(value):
            raise InputError(f"{key}: {value}: must be {wanted}")
    return line


def _keys(kind: str) -> str:
    return f"there are {', '.join(KEYS[kind])}"


def _matches_of_line(line: Line, models: Models, numbers: Iterator[int]) -> Iterator[Match]:
    """The matches of a line whose keys were checked.

    Args:
        numbers: names for projections.
    """
    kind = line["of"]
    weight: dict[str, Any] = {key: line[key] for key in ("weight", "weight_schedule") if key in line}
    own = {key: value for key, value in line.items() if key not in ("of", "teacher", "student", *_COMMON)}
    if kind == "logits":
        yield LogitsMatch(LogitsLoss(**own), **weight)
    elif kind == "labels":
        yield LabelsMatch(**weight)
    elif kind == "attention":
        if "compare" not in own and own.get("on") == "probabilities" and own.get("heads", "each") != "each":
            raise InputError(
                f"on: probabilities beside heads: {own['heads']}: sums and means are of scores; leave one out"
            )
        own["compare"] = own.pop("loss", "mse")
        shapes = models.teacher, models.student
        if line.get("teacher") == EMD:
            teachers, students = _all_layers(line, models, first=0)
            pairs = [[AttentionMatch(shapes, teacher, student, **own) for student in students] for teacher in teachers]
            yield TransportMatch(pairs, **weight)
            return
        for teacher, student in _layers(line, models, of_states=False):
            yield AttentionMatch(shapes, teacher, student, **own, **weight)
    elif kind == "relations":
        if "num_relation_heads" not in own:
            raise InputError("num_relation_heads: is missing; it must divide the widths of both sides' Q, K, V")
        relations = RelationLoss(**own, gather_samples=models.gather_samples)
        for teacher, student in _layers(line, models, of_states=False):
            yield RelationMatch(relations, teacher, student, **weight)
    else:
        yield from _states_matches(line, models, numbers, weight)


def _states_matches(line: Line, models: Models, numbers: Iterator[int], weight: Mapping[str, Any]) -> Iterator[Match]:
    loss = line.get("loss", "mse")
    if "project" not in line:
        for key in ("shared", "rate"):
            if key in line:
                raise InputError(f"{key}: has no effect without project; give project: linear, or leave it out")
    number = next(numbers)

    def projection() -> Projection | None:
        """That of the next layer."""
        nonlocal number
        if "project" not in line:
            return None
        made = Projection(number, line["project"], line.get("rate", models.learning_rate) / models.learning_rate)
        if not line.get("shared"):
            number = next(numbers)
        return made

    if line.get("teacher") == EMD:
        teachers, students = _all_layers(line, models, first=1)
        projected = [(student, projection()) for student in students]
        layers = LOSSES[loss].layers
        yield TransportMatch(
            [
                [StatesMatch((teacher,) * layers, (student,) * layers, loss, own) for student, own in projected]
                for teacher in teachers
            ],
            **weight,
        )
        return
    for teacher, student in _layers(line, models, of_states=True, two=LOSSES[loss].layers == 2):
        yield StatesMatch(teacher, student, loss, projection(), **weight)


def _all_layers(line: Line, models: Models, first: int) -> tuple[range, range]:
    """All layers of both, the first of which has this number, for `EMD`; raises InputError if the line names some."""
    if "student" in line:
        raise InputError(f"student: {line['student']}: has no effect beside teacher: {EMD}, which takes all layers")
    teachers, students = (range(first, first + len(shape.layers)) for shape in (models.teacher, models.student))
    return teachers, students


def _layers(line: Line, models: Models, of_states: bool, two: bool = False) -> list[tuple[Any, Any]]:
    """(teacher, student) pairs of layers, or, of states, of tuples of them.

    Args:
        two: whether a loss takes two layers of each model.
    """
    first = 0 if of_states else 1
    count_t, count_s = len(models.teacher.layers), len(models.student.layers)
    teacher, student = line.get("teacher", "uniform"), line.get("student")
    mapped = teacher in ("uniform", "last")
    if student is None:
        if not mapped:
            raise InputError(f"teacher: {teacher} without student: give as many of the student's layers")
        student = [*range(count_s + 1 if of_states else count_s)]
    students = _as_lists(student, "student", models.student, of_states, two)
    if not mapped:
        teachers = _as_lists(teacher, "teacher", models.teacher, of_states, two)
        if len(teachers) != len(students):
            raise InputError(
                f"teacher: {teacher}, student: {student}: {len(teachers)} layers and {len(students)}; give as many of "
                "the one as of the other"
            )
    elif teacher == "last" and count_t < count_s:
        raise InputError(f"teacher: last: the teacher has {count_t} layers, the student {count_s}; name the layers")
    elif teacher == "uniform" and (not count_s or count_t % count_s):
        raise InputError(
            f"teacher: uniform: the teacher's {count_t} layers are no multiple of the student's {count_s}; name the "
            "layers, or give teacher: last"
        )
    else:

        def of_teacher(layer: int) -> int:
            if teacher == "uniform":
                return (layer + first) * count_t // count_s - first
            return layer + count_t - count_s if layer or not of_states else 0

        teachers = [tuple(map(of_teacher, layers)) for layers in students]
    if of_states:
        return list(zip(teachers, students))
    return [(t[0], s[0]) for t, s in zip(teachers, students)]


def _as_lists(
    layers: Any, whose: Literal["teacher", "student"], shape: Shape, of_states: bool, two: bool
) -> list[tuple[int, ...]]:
    """Layers of each match, checked."""
    last = len(shape.layers) - (0 if of_states else 1)
    found = []
    for layer in layers if isinstance(layers, list) else [layers]:
        pair = layer if two and isinstance(layer, list) else [layer] * (2 if two else 1)
        for one in pair:
            if type(one) is not int:
                form = "a layer, or a list of layers" + (" or of pairs of them" if two else "")
                mapping = ", uniform or last" if whose == "teacher" else ""
                raise InputError(f"{whose}: {layers}: must be {form}{mapping}")
            if not 0 <= one <= last:
                what = "states 0 (the embeddings)" if of_states else "layers 0"
                raise InputError(f"{whose}: {one}: the {whose} has {what} to {last}")
        if two and len(pair) != 2:
            raise InputError(f"{whose}: {layer}: must be a layer, or two")
        found.append(tuple(pair))
    if not found:
        raise InputError(f"{whose}: no layer given")
    return found
