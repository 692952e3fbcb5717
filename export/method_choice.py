"""Choice of a quantization method: the fastest of several files that is as accurate as it must be."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from backends.files import InputError
from export.model import OnnxModel
from programs.console import say
from text.answers import scores
from text.tasks import Task
from training.report import markdown

ROUNDS = 3


def choose_method(
    source: OnnxModel, files: Mapping[str, Path], task: Task, examples: Sequence[Any], max_drop: float
) -> int:
    """Returns the index of the file that answers the examples fastest, among those that lose at most `max_drop`
    points of the task's metric against `source`. Prints a table of all; times are medians of `ROUNDS` rounds, in
    which all files take turns.

    Raises:
        InputError: all of them lose more.
    """
    models = {"float32": source, **{name: OnnxModel(path) for name, path in files.items()}}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    points: dict[str, float] = {}
    for _ in range(ROUNDS):
        for name, model in models.items():
            start = time.perf_counter()
            answers = model.answers(examples)
            seconds[name].append(time.perf_counter() - start)
            points[name] = scores(task, examples, answers)[task.metric]
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    kept = [name for name in files if points["float32"] - points[name] <= max_drop]
    best = min(kept, key=medians.__getitem__, default=None)
    rows = [
        [
            name,
            f"{points[name]:.2f}",
            f"{points[name] - points['float32']:+.2f}",
            f"{len(examples) / medians[name]:.0f}",
            f"{medians['float32'] / medians[name]:.2f}x",
            f"{models[name].path.stat().st_size / 2**20:.1f}",
            "taken" if name == best else "" if name in kept or name == "float32" else f"loses more than {max_drop}",
        ]
        for name in models
    ]
    print(markdown(["method", task.metric, "difference", "examples/s", "speed-up", "MiB", ""], rows), flush=True)
    if best is None:
        raise InputError(f"--max_drop {max_drop}: every method loses more; allow more, or take the float32 file")
    say(f"{len(examples)} examples of {task.name}, median of {ROUNDS} rounds")
    return list(files).index(best)
