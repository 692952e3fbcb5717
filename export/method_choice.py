"""Choice of a quantization method and a runtime: the fastest that is as accurate as it must be."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from backends.files import InputError
from export.model import OnnxModel
from export.runtimes import NAMES, RUNTIMES, RuntimeName
from programs.console import say
from text.answers import scores
from text.tasks import Task
from training.report import markdown

ROUNDS = 3


def choose_method(
    source: OnnxModel,
    files: Mapping[str, Path],
    runtimes: Sequence[RuntimeName],
    task: Task,
    examples: Sequence[Any],
    max_drop: float,
) -> tuple[int, RuntimeName]:
    """Returns the index of the file, and the runtime, that answer the examples fastest, of those that lose at most
    `max_drop` points of the task's metric against `source`. Prints a table of all; times are medians of `ROUNDS`
    rounds, in which all take turns.

    Raises:
        InputError: all of them lose more.
    """
    contenders = {
        (name, runtime): OnnxModel(path, 0, RUNTIMES[runtime]) for name, path in files.items() for runtime in runtimes
    }
    exact = ("float32", source.runtime.name)
    models = {exact: source, **contenders}
    seconds: dict[tuple[str, RuntimeName], list[float]] = {key: [] for key in models}
    points: dict[tuple[str, RuntimeName], float] = {}
    for _ in range(ROUNDS):
        for key, model in models.items():
            start = time.perf_counter()
            answers = model.answers(examples)
            seconds[key].append(time.perf_counter() - start)
            points[key] = scores(task, examples, answers)[task.metric]
    medians = {key: statistics.median(values) for key, values in seconds.items()}
    kept = [key for key in contenders if points[exact] - points[key] <= max_drop]
    best = min(kept, key=medians.__getitem__, default=None)
    rows = [
        [
            key[0],
            NAMES[key[1]],
            f"{points[key]:.2f}",
            f"{points[key] - points[exact]:+.2f}",
            f"{len(examples) / medians[key]:.0f}",
            f"{medians[exact] / medians[key]:.2f}x",
            f"{models[key].path.stat().st_size / 2**20:.1f}",
            "taken" if key == best else "" if key in kept or key == exact else f"loses more than {max_drop}",
        ]
        for key in models
    ]
    head = ["method", "runtime", task.metric, "difference", "examples/s", "speed-up", "MiB", ""]
    print(markdown(head, rows), flush=True)
    if best is None:
        raise InputError(f"--max_drop {max_drop}: every method loses more; allow more, or take the float32 file")
    say(f"{len(examples)} examples of {task.name}, median of {ROUNDS} rounds")
    return list(files).index(best[0]), best[1]
