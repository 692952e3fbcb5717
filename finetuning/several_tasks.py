"""Fine-tuning on several tasks together, a head each on one encoder (MT-DNN; Liu et al., 2019, arXiv:1901.11504), and
with a teacher each as TextBrewer's MultiTaskDistiller. Read `finetuning.finetune`, which is about one task, first.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

import numpy as np

import backends
from backends.files import InputError, atomically
from backends.interface import Backend, Tensor
from finetuning.arguments import FinetuneArguments
from finetuning.finetune import (
    FREE_TO_CHANGE,
    LearnTask,
    Run,
    batches_per_epoch,
    paths_read,
    prepare,
    trained,
    training_arguments,
)
from programs.console import say
from text.features import LabelledBatch
from text.folder import ModelFolder
from text.tasks import KINDS, Task, find_task
from training.folder import check_inputs, check_output
from training.loop import Objective, seed_of
from training.report import markdown
from training.stages import Phase, Stage

TABLE = "results.md"


def finetune_together(arguments: FinetuneArguments) -> dict[str, float]:
    """Runs fine-tuning on several tasks; returns the mean of the best model's metrics on the dev sets, and each.

    Raises:
        InputError, Occupied, TrainingFailed: as `finetuning.finetune.finetune`.
    """
    output = Path(arguments.output_dir)
    tasks = [_find(name, arguments) for name in arguments.tasks or []]
    for task in tasks:
        if not (Path(arguments.data_dir) / task.name).is_dir():
            raise InputError(f"--data_dir {arguments.data_dir}: no folder {task.name}; with --tasks each has one there")
    source = ModelFolder.find(arguments.model_name_or_path, "model_name_or_path", arguments.model_type)
    backend = backends.load(arguments.backend, arguments.device, arguments.precision)
    first = backend.rank == 0
    begun = check_output(output, arguments, FREE_TO_CHANGE, paths_read(arguments, source)) if first else {}
    runs = [prepare(_arguments_of(arguments, number, task), task, source, backend) for number, task in enumerate(tasks)]
    inputs: dict[str, str] = {}
    if first:
        inputs = {"model_name_or_path": source.identity()}
        inputs |= {f"{run.task.name}.{key}": value for run in runs for key, value in run.identity().items()}
        check_inputs(output, begun, inputs)

    stage = LearnTasks(arguments, backend, [LearnTask(run, source) for run in runs])
    with trained(arguments, backend, [stage], inputs):
        scores = {run.task.name: run.report_best() for run in runs}
        mean = mean_metric(runs, scores)
        if first:
            _write_table(output / TABLE, runs, scores, mean)
            say(f"mean {mean:.2f} of {len(runs)} tasks on the dev sets: {output / TABLE}")
        return {"mean": mean, **_flat(scores)}


def _find(name: str, arguments: FinetuneArguments) -> Task:
    """Finds a task; KIND:FOLDER is data of the user's own of a kind, called after its folder.

    Raises:
        InputError: no such task, or no name of a folder.
    """
    kind, colon, folder = name.partition(":")
    columns = arguments.text_column, arguments.text_pair_column, arguments.label_column
    task = find_task(kind, *columns, option="tasks")
    if not colon:
        return task
    if task.name not in KINDS or not re.fullmatch(r"\w[\w-]*", folder):
        raise InputError(f"--tasks {name}: expected {', '.join(f'{kind}:FOLDER' for kind in KINDS)}, or a task's name")
    return replace(task, name=folder)


def _arguments_of(arguments: FinetuneArguments, number: int, task: Task) -> FinetuneArguments:
    """Makes the arguments of one of the tasks."""
    teachers, cache = arguments.teacher_model_name_or_path, arguments.cache_teacher
    return replace(
        arguments,
        output_dir=str(Path(arguments.output_dir) / task.name),
        task_name=task.name,
        tasks=None,
        teacher_model_name_or_path=None if teachers is None else [teachers[number]],
        cache_teacher=None if cache is None else str(Path(cache) / task.name),
    )


@dataclass(frozen=True)
class TaskBatch:
    """A batch of one of the tasks."""

    task: str
    labelled: LabelledBatch

    @property
    def sequences(self) -> int:
        return self.labelled.sequences

    @property
    def tokens(self) -> int:
        return self.labelled.tokens

    @property
    def truncated(self) -> int:
        return self.labelled.truncated


def draw_shares(batches: Sequence[int], tau: float) -> np.ndarray:
    """Computes the probabilities of tasks with so many batches an epoch, in proportion to batches^tau."""
    powers = np.array(batches, np.float64) ** tau
    return powers / powers.sum()


def draw_tasks(shares: np.ndarray, seed: int, start: int = 0) -> tuple[np.ndarray, Iterator[int]]:
    """Draws the task of each batch, by its number: the order follows from the seed alone.

    Returns:
        How many of the first `start` batches are of each task; and the tasks from there on, without end.
    """
    random = np.random.default_rng((seed, 0, len(shares)))  # (seed, n) shuffles epochs
    ends = shares.cumsum()[:-1]
    before = np.bincount(np.searchsorted(ends, random.random(start), side="right"), minlength=len(shares))

    def tasks() -> Iterator[int]:
        while True:
            yield int(np.searchsorted(ends, random.random(), side="right"))

    return before, tasks()


def draw_batches(tasks: Sequence[LearnTask], shares: np.ndarray, seed: int, start: int) -> Iterator[TaskBatch]:
    """Makes this process' shares of the batches from the one numbered `start`, those of a task as it would have them
    alone."""
    before, numbers = draw_tasks(shares, seed, start)
    batches = [task.batches(count) for task, count in zip(tasks, before.tolist())]
    for number in numbers:
        yield TaskBatch(tasks[number].name, next(batches[number]))


@dataclass(frozen=True)
class Together:
    """The loss of whichever task a batch is of."""

    objectives: Mapping[str, Objective[LabelledBatch]]

    def __call__(self, batch: TaskBatch, done: float) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, which with its parts is a part under the task's name."""
        loss, parts = self.objectives[batch.task](batch.labelled, done)
        return loss, {f"{batch.task}/{key}": part for key, part in {"loss": loss.detach(), **parts}.items()}


@dataclass(frozen=True)
class Mean:
    """A `training.loop.Selection` by the mean of the tasks' metrics."""

    runs: Sequence[Run]

    def evaluate(self) -> dict[str, float]:
        """Computes the mean of the metrics on the dev sets, then each task's scores."""
        scores = {run.task.name: run.evaluate() for run in self.runs}
        return {"mean": mean_metric(self.runs, scores), **_flat(scores)}

    def keep(self) -> str:
        """Writes each task's model to its folder; returns their fingerprints."""
        return " ".join(run.keep() for run in self.runs)


class LearnTasks(Stage):
    """Models that share an encoder learn a task each, the best on all dev sets together being kept."""

    name = "tasks"

    def __init__(self, arguments: FinetuneArguments, backend: Backend, tasks: Sequence[LearnTask]) -> None:
        self.arguments, self.backend, self.tasks = arguments, backend, tasks
        self.folder, self.selection = Path(arguments.output_dir), Mean([task.run for task in tasks])
        sizes = [task.lines for task in tasks]
        self.lines = sum(sizes)
        self.training = training_arguments(arguments, *sizes)
        self.shares = draw_shares([batches_per_epoch(arguments, size) for size in sizes], arguments.task_tau)

    def finished(self) -> bool:
        return False  # answers and scores are written anew

    def begin(self) -> Phase:
        self.backend.seed(seed_of(self.arguments.seed))
        joined = self.backend.join((task.name, task.make_model()) for task in self.tasks)
        objective = Together({task.name: task.objective(task.run.model) for task in self.tasks})
        if self.backend.rank == 0:
            drawn = ", ".join(f"{task.name} {share:.1%}" for task, share in zip(self.tasks, self.shares))
            say(f"batches are of {drawn}")

        def batches(start: int, _: int) -> Iterator[TaskBatch]:
            return draw_batches(self.tasks, self.shares, self.arguments.seed, start)

        return Phase(joined, objective, batches, self.training)

    def enter(self, phase: Phase) -> None:
        for task in self.tasks:
            task.enter(phase)

    def leave(self, phase: Phase, kept: str | None) -> None:
        for task, kept_of_task in zip(self.tasks, (kept or "").split()):
            task.leave(phase, kept_of_task)


def mean_metric(runs: Sequence[Run], scores: Mapping[str, Mapping[str, float]]) -> float:
    """Computes the mean of the tasks' metrics, of all their scores."""
    return fmean(scores[run.task.name][run.task.metric] for run in runs)


def _flat(scores: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    return {f"{task}/{key}": value for task, of_task in scores.items() for key, value in of_task.items()}


def _write_table(path: Path, runs: Sequence[Run], scores: Mapping[str, Mapping[str, float]], mean: float) -> None:
    """Writes the scores of all tasks on their dev sets."""
    rows = []
    for run in runs:
        name, metric = run.task.name, run.task.metric
        examples = len(run.parts["dev"].data.examples)
        rows.append([name, metric, f"{scores[name][metric]:.2f}", str(examples), str(run.output)])
    rows.append(["mean", "", f"{mean:.2f}", "", ""])
    head = ["Task", "metric", "dev", "examples", "model"]
    note = "In per cent, of the evaluation whose mean over the tasks was the best."
    with atomically(path) as temporary:
        temporary.write_text(f"{markdown(head, rows)}\n\n{note}\n", encoding="utf-8")
