"""``python -m export benchmark``: how fast, how accurate and how large a model is, in every form it is served in."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path

import backends
from backends.files import atomically, write_json
from backends.pretrained import find_model
from export.benchmark.arguments import BenchmarkArguments
from export.benchmark.deployments import ACCELERATORS, FRAMEWORKS, available_providers, prepare
from export.benchmark.measuring import measure
from export.benchmark.plots import plot
from export.benchmark.processes import Deployment, RemoteRunner
from export.benchmark.tables import csv_table, report
from export.schemes import has_vnni
from programs.console import say
from training.report import processor


def benchmark(arguments: BenchmarkArguments) -> Path:
    """Measures, prints the tables and writes them; returns their folder.

    Raises:
        InputError: the model is no classifier, or the task or an option is wrong.
    """
    folder, output = find_model(arguments.model, "model"), Path(arguments.output_dir)
    threads = arguments.threads or len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        deployments, examples, labels = prepare(arguments, folder, Path(temporary))
        workers = []
        for deployment in deployments:
            say(f"starts: {deployment.row}")
            workers.append(RemoteRunner(deployment, threads))
            stack.callback(workers[-1].close)
        results = measure(arguments, workers, examples, labels)
    results |= {
        "machine": processor(),
        "threads": threads,
        "vnni": has_vnni(),
        "versions": _versions(deployments),
        "model": arguments.shape or folder.name,
        "task": arguments.task_name,
        "examples": len(examples),
        "rounds": arguments.rounds,
        "not_there": [name for provider, name in ACCELERATORS.items() if provider not in available_providers()],
    }
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "benchmark.json", results)
    tables = report(results)
    with atomically(output / "benchmark.md") as file:
        file.write_text(tables, encoding="utf-8")
    with atomically(output / "benchmark.csv") as file:
        file.write_text(csv_table(results), encoding="utf-8")
    plot(output, results)
    print(tables)
    say(f"{output}: benchmark.md, .csv, .json, latency.png" + (", accuracy.png" if examples else ""))
    return output


def _versions(deployments: Sequence[Deployment]) -> dict[str, str]:
    versions: dict[str, str] = {}
    for name in {deployment.runtime for deployment in deployments}:
        if name in FRAMEWORKS:
            versions |= backends.load(name, "cpu").versions()
        else:
            versions[name] = import_module(name).__version__
    return versions
