"""Tables of a benchmark's results."""

from __future__ import annotations

import csv
import io
import statistics
from typing import Any

from training.report import markdown

SHORT = (16, 32)
"""Tokens of single requests that the first table has."""


def report(results: dict[str, Any]) -> str:
    """Returns all tables, in Markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in sorted(results["versions"].items()))
    parts = [
        f"{results['model']}, {results['machine']}, {results['threads']} threads, "
        f"{'with' if results['vnni'] else 'without'} VNNI; {versions}; {results['rounds']} rounds in turns.",
        *(f"{name}: ONNX Runtime's provider is not there, not measured." for name in results["not_there"]),
    ]
    shapes = results["contenders"][0]["shapes"]
    largest = {key: max(shape[key] for shape in shapes) for key in ("batch", "length")}
    parts += [_overview(results, largest), _latencies(results)]
    return "\n\n".join(parts) + "\n"


def _overview(results: dict[str, Any], largest: dict[str, int]) -> str:
    """Returns PP-MiniLM's table of what quantization and tokenizer bring over BERT-base."""
    base = results["contenders"][0]
    measured = [(shape["batch"], shape["length"]) for shape in base["shapes"]]
    short = [{"batch": 1, "length": length} for length in SHORT if (1, length) in measured]
    base_ms = _median_ms(base, largest)
    rows = []
    for deployment in results["contenders"]:
        median_ms = _median_ms(deployment, largest)
        row = [deployment["row"], f"{median_ms:.1f}", f"{base_ms / median_ms:.2f}x"]
        row += [f"{_median_ms(deployment, shape):.1f}" for shape in short]
        if results["examples"]:
            seconds = statistics.median(deployment["answering_seconds"])
            base_seconds = statistics.median(base["answering_seconds"])
            ratios = [b / a for a, b in zip(deployment["answering_seconds"], base["answering_seconds"])]
            row += [
                f"{results['examples'] / seconds:.0f}",
                f"{base_seconds / seconds:.2f}x ({min(ratios):.1f} to {max(ratios):.1f})",
                "random weights" if deployment["accuracy"] is None else f"{deployment['accuracy']:.2f}",
            ]
        rows.append([*row, f"{deployment['bytes'] / 2**20:.1f}", f"{deployment['peak_bytes'] / 2**20:.0f}"])
    head = ["", f"{largest['batch']} x {largest['length']}, ms", "speed-up"]
    head += [f"1 x {shape['length']}, ms" for shape in short]
    if results["examples"]:
        head += [f"{results['task']}, texts/s", "speed-up (of rounds)", "accuracy"]
    explanation = (
        f"The speed-up is over {base['row']} (in PP-MiniLM's set-up: batches of 32 as they come). Times of a batch "
        "are without the tokenizer, unless it is in the graph; texts a second are from string to label."
    )
    return f"{explanation}\n\n{markdown([*head, 'file, MiB', 'peak memory, MiB'], rows)}"


def _median_ms(deployment: dict[str, Any], wanted: dict[str, int]) -> float:
    """Returns the median time of a batch of the wanted size and length."""
    return next(
        shape["p50_ms"] for shape in deployment["shapes"] if all(shape[key] == value for key, value in wanted.items())
    )


def _latencies(results: dict[str, Any]) -> str:
    rows = [
        [
            deployment["row"],
            str(shape["batch"]),
            str(shape["length"]),
            *(f"{shape[f'p{p}_ms']:.2f}" for p in (50, 90, 99)),
            f"{100 * shape['spread']:.0f} %",
            f"{shape['sequences_per_second']:.0f}",
        ]
        for deployment in results["contenders"]
        for shape in deployment["shapes"]
    ]
    head = ["", "batch", "length", "p50, ms", "p90, ms", "p99, ms", "spread", "sequences/s"]
    return f"Spread is that of the rounds' medians.\n\n{markdown(head, rows)}"


def csv_table(results: dict[str, Any]) -> str:
    """Returns a line for each deployment, batch size and length, as CSV."""
    out = io.StringIO()
    names = ["title", "runtime", "tokenizing", "accuracy", "bytes", "peak_bytes"]
    table = csv.writer(out, lineterminator="\n")
    table.writerow([*names, "texts_per_second", *results["contenders"][0]["shapes"][0]])
    for deployment in results["contenders"]:
        seconds = deployment["answering_seconds"]
        speed = f"{results['examples'] / statistics.median(seconds):.2f}" if seconds else ""
        values = ["" if deployment[name] is None else deployment[name] for name in names]
        for shape in deployment["shapes"]:
            table.writerow([*values, speed, *shape.values()])
    return out.getvalue()
