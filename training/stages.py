"""Runs as lists of stages: each trains one model, from the newest checkpoint in its folder, and leaves it whole."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from backends.interface import Backend, Trainable
from training.loop import Objective, Selection, TrainingArguments, train


class Phase(NamedTuple):
    """What `train` is given."""

    model: Trainable
    objective: Objective[Any]
    batches: Callable[[int, int], Iterator[Any]]
    training: TrainingArguments


class Stage(ABC):
    """A part of a run that one model, or several that share an encoder, go through."""

    name: str
    folder: Path
    """For checkpoints, logs, and the model in the end."""
    lines: int
    """That make an epoch."""
    lines_per_update: int | None = None
    """Of all processes, if always the same."""
    selection: Selection | None = None
    """Chooses the best model, if not the last counts."""

    @abstractmethod
    def finished(self) -> bool:
        """Whether what it leaves is there, whole."""

    @abstractmethod
    def begin(self) -> Phase:
        """Makes what is trained; what earlier stages leave is there. Nothing is written yet."""

    def enter(self, phase: Phase) -> None:  # noqa: B027, few stages write anything
        """Writes what belongs beside the model, such as its tokenizer, before it is trained."""

    @abstractmethod
    def leave(self, phase: Phase, kept: str | None) -> None:
        """Writes what comes of it, from one process, before any goes on.

        Args:
            kept: what the selection told of the best model.
        """


def run_stages(backend: Backend, stages: Sequence[Stage], resume: bool, claim: Callable[[], None]) -> None:
    """Goes through stages in order.

    Args:
        resume: those that are finished are passed over.
        claim: makes the stages' folders this run's; it is called once the first model could be made.

    Raises:
        InputError, TrainingFailed, Preempted: as `training.loop.train`.
    """
    left = [stage for stage in stages if not (resume and stage.finished())]
    for stage in left:
        phase = stage.begin()
        if stage is left[0]:
            claim()
        stage.enter(phase)
        kept = train(backend, *phase, stage.folder, stage.name, stage.lines, stage.lines_per_update, stage.selection)
        stage.leave(phase, kept)
        del phase  # the next stage's models take its memory
        backend.barrier()  # the others find all written
