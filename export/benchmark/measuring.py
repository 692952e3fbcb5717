"""Measurements of all deployments, in turns."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from export.benchmark.arguments import BenchmarkArguments
from export.benchmark.processes import RemoteRunner
from programs.console import say

LENGTHS = (16, 32, 64, 128)


def measure(
    arguments: BenchmarkArguments, workers: Sequence[RemoteRunner], examples: Sequence[Any], truth: Sequence[str]
) -> dict[str, Any]:
    """Returns the times, memory and accuracy of every worker's deployment, as ``benchmark.json`` holds them."""
    limit = workers[0].deployment.max_seq_length
    lengths = arguments.lengths or [length for length in LENGTHS if length <= limit]
    shapes = [(size, length) for size in arguments.batch_sizes for length in lengths]
    runs: list[dict[tuple[int, int], list[list[float]]]] = [{shape: [] for shape in shapes} for _ in workers]
    answering: list[list[float]] = [[] for _ in workers]
    accuracy: list[float | None] = [None] * len(workers)
    for number in range(arguments.rounds):
        for shape in shapes:
            for worker, rounds in zip(workers, runs):
                rounds[shape].append(worker.latencies(*shape, arguments.seconds))
        for i, worker in enumerate(workers) if examples else ():
            seconds, labels = worker.answer(examples)
            answering[i].append(seconds)
            if worker.deployment.trained:
                accuracy[i] = 100 * float(np.mean([a == b for a, b in zip(labels, truth)]))
        say(f"round {number + 1} of {arguments.rounds} is done")
    return {
        "contenders": [
            {
                "title": worker.deployment.title,
                "row": worker.deployment.row,
                "runtime": worker.deployment.runtime,
                "tokenizing": worker.deployment.tokenizing,
                "bytes": worker.deployment.file.stat().st_size,
                "peak_bytes": worker.peak_memory(),
                "shapes": [{"batch": b, "length": n, **_summary(b, rounds[b, n])} for b, n in shapes],
                "answering_seconds": answering[i],
                "accuracy": accuracy[i],
            }
            for i, (worker, rounds) in enumerate(zip(workers, runs))
        ]
    }


def _summary(batch_size: int, rounds: list[list[float]]) -> dict[str, float]:
    seconds = [value for values in rounds for value in values]
    medians = [statistics.median(values) for values in rounds]
    median = statistics.median(seconds)
    return {
        **{f"p{p}_ms": 1000 * float(np.percentile(seconds, p)) for p in (50, 90, 99)},
        "spread": (max(medians) - min(medians)) / median,
        "runs": len(seconds),
        "sequences_per_second": batch_size / median,
    }
