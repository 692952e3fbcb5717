"""``python -m bench runtimes``: ONNX files on every runtime: start, memory, batches, and operators."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from backends.files import InputError
from bench.opening import PARTS, Opening, opened, runtimes_of
from bench.report import machine, save
from export.runtimes import NAMES, RuntimeName
from programs.worker import Worker, WorkerFailed
from training.report import markdown

SHAPES = ((1, 16), (1, 32), (32, 32), (32, 128))
"""Texts and tokens of the batches that are computed."""
MEMORY = {"imports": "imported, MiB", "first answer": "by the first answer, MiB", "after batches": "after batches, MiB"}


def runtimes(
    models: list[str],
    threads: int = 0,
    rounds: int = 5,
    seconds: float = 0.5,
    operators: str | None = None,
    output_dir: str = "output/bench",
) -> None:
    """Measures ONNX files on every installed runtime: start, memory, batches and, if wanted, operators.

    Each file is opened by each runtime in a process of its own, once a round, in turns; figures are
    medians of the rounds. Batches are computed in parts, as all programs here do.

    Args:
        models: ONNX files without tokenizers, of fine-tuned models; or nncf.xml as python -m bench int8 leaves it.
        threads: that compute; 0 takes as many as there are cores.
        rounds: how often all is measured.
        seconds: time for each batch in a round.
        operators: texts x tokens of a batch, 4x128 say: measure too where its time goes, on one thread.
        output_dir: where the tables, the plot and the figures go.
    """
    batch = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", operators or "1x1")
    if batch is None:
        raise InputError(f"--operators {operators}: expected texts x tokens, 4x128 say")
    files = [Path(name) for name in models]
    limits = [_check(file) for file in files]
    shapes = [(texts, tokens) for texts, tokens in SHAPES if tokens <= min(limits)]
    measured: list[dict[str, Any]] = [
        {"file": str(file), "runtime": runtime, "rounds": []} for file in files for runtime in runtimes_of(file)
    ]
    for number in range(rounds):
        for record in measured:
            title = f"{record['file']} on {NAMES[record['runtime']]}"
            begun = time.perf_counter()
            worker = Worker(title, Opening, Path(record["file"]), record["runtime"], threads, begun)
            with closing(worker):
                try:
                    record["rounds"].append(worker.call("measure", shapes, seconds))
                    if operators and number == rounds - 1:
                        record["operators"] = worker.call("operators", int(batch[1]), int(batch[2]))
                except WorkerFailed as failure:
                    raise SystemExit(str(failure)) from None
    results = {"machine": machine("cpu"), "shapes": shapes, "operators": operators, "measured": measured}
    tables = _tables(results)
    save(Path(output_dir), "runtimes", tables, results, _plot)
    print(tables)


def _check(file: Path) -> int:
    """The tokens that a file takes; raises InputError if it cannot be measured."""
    for runtime in runtimes_of(file):
        model = opened(file, runtime)
        if model.in_graph:
            raise InputError(f"{file}: has its tokenizer inside; give the file without it")
        limit = model.description.max_seq_length
    return limit


def _tables(results: Mapping[str, Any]) -> str:
    measured, shapes = results["measured"], results["shapes"]
    rows = []
    for record in measured:
        parts = [_median(record, "seconds", part) for part in PARTS]
        total = statistics.median(sum(run["seconds"].values()) for run in record["rounds"])
        memory = [_median(record, "bytes", moment) / 2**20 for moment in MEMORY]
        batches = [f"{_median(record, 'milliseconds', i):.1f}" for i in range(len(shapes))]
        rows.append(
            [
                _title(record),
                *(f"{value:.2f}" for value in (*parts, total)),
                *(f"{value:.0f}" for value in memory),
                *batches,
            ]
        )
    head = ["", *(f"{part}, s" for part in PARTS), "from the start, s", *MEMORY.values()]
    head += [f"{texts} x {tokens}, ms" for texts, tokens in shapes]
    caption = f"Medians of {len(measured[0]['rounds'])} processes of each; {results['machine']}"
    tables = [caption, markdown(head, rows)]
    if results["operators"]:
        tables.append(f"Milliseconds of {results['operators']} tokens on one thread, in brackets how many operators:")
        tables += [_operators(measured, runtime) for runtime in dict.fromkeys(record["runtime"] for record in measured)]
    return "\n\n".join(tables)


def _operators(measured: Sequence[Mapping[str, Any]], runtime: RuntimeName) -> str:
    """Kinds of operators, the slowest first, on a runtime."""
    files = {record["file"]: record["operators"] for record in measured if record["runtime"] == runtime}
    most = {
        kind: max(operators.get(kind, (0.0, 0))[0] for operators in files.values())
        for kind in dict.fromkeys(kind for operators in files.values() for kind in operators)
    }
    rows = [
        [kind, *(_time(*operators[kind]) if kind in operators else "" for operators in files.values())]
        for kind in sorted(most, key=most.__getitem__, reverse=True)
    ]
    rows.append(["sum", *(_time(*map(sum, zip(*operators.values()))) for operators in files.values())])
    return markdown([NAMES[runtime], *files], rows)


def _time(milliseconds: float, count: int) -> str:
    return f"{milliseconds:.2f} ({count})"


def _title(record: Mapping[str, Any]) -> str:
    return f"{record['file']}, {NAMES[record['runtime']]}"


def _median(record: Mapping[str, Any], kind: str, key: Any) -> float:
    return statistics.median(run[kind][key] for run in record["rounds"])


def _plot(axes: Axes, results: dict[str, Any]) -> None:
    """A line a file and runtime: milliseconds of the batches, on a logarithmic scale."""
    names = [f"{texts} x {tokens}" for texts, tokens in results["shapes"]]
    for record in results["measured"]:
        axes.plot(names, [_median(record, "milliseconds", i) for i in range(len(names))], "o-", label=_title(record))
    axes.set(yscale="log", ylabel="ms", title=results["machine"])
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=7)
