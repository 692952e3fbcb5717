"""Tables of a search's results: Markdown, CSV and a plot."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from backends.files import atomically
from training.pictures import mark_zoom, nested_widths, new_figure, write_figure
from training.report import processor


@dataclass(frozen=True)
class Point:
    """A point of the grid, whatever the seed, with its trials."""

    batch_size: int
    learning_rate: float
    num_train_epochs: int
    trials: tuple[FrozenTrial, ...]
    """Complete trials, each of another seed, the best first."""

    @property
    def scores(self) -> tuple[float, ...]:
        """The metric on the dev set, in per cent."""
        return tuple(trial.value or 0.0 for trial in self.trials)

    @property
    def mean(self) -> float:
        return mean(self.scores)

    def __str__(self) -> str:
        """Returns the mean and, with several seeds, the sample deviation."""
        return f"{self.mean:.2f}" + (f" ± {stdev(self.scores):.2f}" if len(self.scores) > 1 else "")


def points_of(study: optuna.Study) -> list[Point]:
    """Returns the points with most seeds done, the best first; of equal points the one with the best trial is first."""
    trials_at: dict[tuple[int, float, int], list[FrozenTrial]] = {}
    for trial in _best_first(study):
        params = trial.params
        key = params["batch_size"], params["learning_rate"], params["num_train_epochs"]
        trials_at.setdefault(key, []).append(trial)
    most = max(map(len, trials_at.values()), default=0)
    points = [Point(*key, tuple(trials)) for key, trials in trials_at.items() if len(trials) == most]
    return sorted(points, key=lambda point: -point.mean)


def _best_first(study: optuna.Study) -> list[FrozenTrial]:
    """Sorts complete trials by their scores; of equal trials the one that began first is first."""
    done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return sorted(done, key=lambda trial: (-(trial.value or 0.0), trial.number))


def grid_size(grid: Mapping[str, Sequence[Any]]) -> int:
    """Counts the points of a grid."""
    return math.prod(map(len, grid.values()))


def write_tables(folder: Path, model: str, studies: Sequence[optuna.Study], absent: Mapping[str, str]) -> None:
    """Writes ``results.md``, ``results.csv`` and ``results.png``.

    Args:
        absent: tasks that were left out, and why.
    """
    done = {study.user_attrs["settings"]["task"]: points_of(study) for study in studies}
    with atomically(folder / "results.md") as temporary:
        temporary.write_text(_markdown(model, studies, done, absent), encoding="utf-8")
    with atomically(folder / "results.csv") as temporary:
        temporary.write_text(_csv(studies), encoding="utf-8")
    _plot(folder / "results.png", model, studies, done)


def _markdown(
    model: str, studies: Sequence[optuna.Study], done: dict[str, list[Point]], absent: Mapping[str, str]
) -> str:
    best = {task: points[0] for task, points in done.items() if points}
    cells = [str(best[task]) if task in best else "not done" for task in done]
    average = f"{mean(point.mean for point in best.values()):.2f}" if len(best) == len(done) else "not done"
    lines = [
        f"| Model | {' | '.join(task.upper() for task in done)} | Avg |",
        "| --- " * (len(done) + 2) + "|",
        f"| {_cell(model)} | {' | '.join(cells)} | {average} |",
        "",
        "In per cent, on the dev set, which is looked at every save_steps: the best evaluation of a run counts.",
        "",
        "| Task | metric | dev | batch size | learning rate | epochs | best single model | trials done | failed |",
        "| --- " * 9 + "|",
    ]
    for study in studies:
        settings = study.user_attrs["settings"]
        task, metric = settings["task"], settings["metric"]
        trials = study.get_trials(deepcopy=False)
        complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
        failed = [trial for trial in trials if "error" in trial.user_attrs]
        counts = f"{len(complete)} of {grid_size(settings['grid'])} | {len(failed)}"
        if task not in best:
            lines.append(f"| {task} | {metric} | not done | | | | | {counts} |")
            continue
        point, trial = best[task], _best_first(study)[0]
        single = _cell(trial.user_attrs["folder"])
        if len(settings["grid"]["seed"]) > 1:
            params = trial.params
            single += (
                f" ({trial.value:.2f}: seed {params['seed']}, batch size {params['batch_size']}, learning rate "
                f"{params['learning_rate']:g}, {params['num_train_epochs']} epochs)"
            )
        lines.append(
            f"| {task} | {metric} | {point} | {point.batch_size} | {point.learning_rate:g} | "
            f"{point.num_train_epochs} | {single} | {counts} |"
        )
    lines += ["", *(f"Left out: {task} ({_cell(reason)})." for task, reason in absent.items())] if absent else []
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    """Escapes text for a cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")


def _csv(studies: Sequence[optuna.Study]) -> str:
    """Makes a table with a line for each trial."""
    out = io.StringIO()
    table = csv.writer(out, lineterminator="\n")
    grid = ("batch_size", "learning_rate", "num_train_epochs", "seed")
    table.writerow(["task", *grid, "state", "metric", "score", "folder", "error"])
    for study in studies:
        for trial in study.get_trials(deepcopy=False):
            if trial.state in (TrialState.COMPLETE, TrialState.RUNNING) or "error" in trial.user_attrs:
                values = [trial.params.get(name, "") for name in grid]
                notes = [trial.user_attrs.get(name, "") for name in ("folder", "error")]
                score = "" if trial.value is None else f"{trial.value:.4f}"
                settings = study.user_attrs["settings"]
                table.writerow([settings["task"], *values, trial.state.name, settings["metric"], score, *notes])
    return out.getvalue()


def _plot(path: Path, model: str, studies: Sequence[optuna.Study], done: dict[str, list[Point]]) -> None:
    """Plots scores against learning rates, a line for each batch size and number of epochs, the best point marked."""
    columns = min(4, len(studies))
    rows = -(-len(studies) // columns)
    figure = new_figure(4.5 * columns, 3.4 * rows + 0.4, f"{model}: {processor()}")
    for number, study in enumerate(studies, 1):
        axes = figure.add_subplot(rows, columns, number)
        settings = study.user_attrs["settings"]
        task, metric = settings["task"], settings["metric"]
        lines: dict[tuple[int, int], list[Point]] = {}
        for point in sorted(done[task], key=lambda point: point.learning_rate):
            lines.setdefault((point.batch_size, point.num_train_epochs), []).append(point)
        for width, ((batch_size, epochs), points) in zip(nested_widths(len(lines)), sorted(lines.items())):
            deviations = [stdev(point.scores) if len(point.scores) > 1 else 0.0 for point in points]
            label = f"batch {batch_size}, {epochs} epochs"
            rates, means = [point.learning_rate for point in points], [point.mean for point in points]
            axes.errorbar(rates, means, deviations, marker="o", markersize=3 + width, linewidth=width, label=label)
        axes.set(title=task, xlabel="learning rate", ylabel=f"{metric} on the dev set, %", xscale="log")
        if lines:
            best = done[task][0]
            axes.plot(best.learning_rate, best.mean, "*", markersize=13, color="black", label=f"best: {best}")
            axes.legend(fontsize=7)
            mark_zoom(axes)
    write_figure(figure, path)
