"""``python -m bench scaling``: how an update scales over devices, predicted by a formula that is checked here."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes

from bench.contenders import DistillationJob
from bench.distill import SIZES, job_of
from bench.report import corpus_and_tokenizer, machine, save
from bench.scaling_check import PAYLOADS, check, small_arguments
from bench.scaling_prediction import ENOUGH, OBJECTIVES, Cluster, Link, limit, predict
from general_distill.estimate import line_lengths
from training.report import markdown

DEVICES = (1, 8, 64, 512)


def scaling(
    batch_size: int = 32,
    global_batch_size: int = 1024,
    max_seq_length: int = 128,
    devices_a_node: int = 8,
    node_gigabytes: float = 120.0,
    network_gigabits: float = 100.0,
    microseconds: float = 20.0,
    overlap: float = 0.7,
    teraflops: float = 125.0,
    utilisation: float = 0.3,
    memory_gigabytes: float = 720.0,
    frameworks: list[Literal["torch", "paddle"]] = ["torch", "paddle"],  # noqa: B006
    measured_batch_size: int = 16,
    input_dir: str | None = None,
    vocab_file: str | None = None,
    output_dir: str = "output/bench",
) -> None:
    """Predicts how PP-MiniLM's distillation scales over devices, after checking the model of it on two processes here.

    What is measured is a small pair of models on one CPU process and on two; what is predicted is 24x1024 to 6x768 on
    nodes of V100, whose speed is assumed, not measured.

    Args:
        batch_size: lines of a device's batch, for weak scaling.
        global_batch_size: lines of all devices to an update, for strong scaling, at most batch_size at a time.
        max_seq_length: tokens of a line that are kept.
        devices_a_node: GPUs that NVLink or PCIe joins.
        node_gigabytes: GB/s of all-reduce among them; 120 is NVLink on V100, 10 PCIe.
        network_gigabits: Gbit/s between nodes.
        microseconds: latency of a message.
        overlap: share of the gradients' all-reduce that can go on beside the backward pass; the rest, the embeddings',
            is there when that is over.
        teraflops: a device's products in float16; an eighth of it in float32.
        utilisation: share of teraflops that is reached.
        memory_gigabytes: GB/s of a device's memory that are reached.
        frameworks: what is measured: torch, paddle, both or, with [], none.
        measured_batch_size: lines of a process' batch there.
        input_dir: folder of text, one sentence a line; without, the project's data folder or its demo corpus.
        vocab_file: vocab.txt; without, the data folder's, or one trained on the text.
        output_dir: where the tables, the plot and the figures go.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        corpus, tokenizer = corpus_and_tokenizer(input_dir, vocab_file, folder / "index")
        lengths = line_lengths(corpus, tokenizer, max_seq_length)
        tokenizer.save(folder, max_seq_length)
        checks = []
        for name in frameworks:
            arguments = small_arguments(name, corpus.files[0].parent, folder, measured_batch_size, max_seq_length)
            checks += [check(replace(arguments, beta=beta)) for beta in (0.0, 1.0)]
    reached = 1e12 * teraflops * utilisation
    cluster = Cluster(
        devices_a_node,
        Link(1e9 * node_gigabytes, 1e-6 * microseconds),
        Link(1e9 * network_gigabits / 8, 1e-6 * microseconds),
        overlap,
        reached,
        reached / 8,
        1e9 * memory_gigabytes,
    )
    job = job_of(SIZES["large"], len(tokenizer), max_seq_length, True, "float16")

    def shares(devices: int) -> tuple[int, int]:
        lines = max(1, min(batch_size, global_batch_size // devices))
        return lines, max(1, global_batch_size // (lines * devices))

    results: dict[str, Any] = {
        "machine": machine("cpu"),
        "checks": checks,
        "weak": _predictions(job, lengths, cluster, lambda devices: (batch_size, 1)),
        "strong": _predictions(job, lengths, cluster, shares),
        "limits": [
            [objective.name] + [limit(job, lengths, objective, cluster, *variant) for variant in _variants(batch_size)]
            for objective in OBJECTIVES
        ],
    }
    tables = [_checks_table(checks)] if checks else []
    for kind in ("weak", "strong"):
        tables.append(f"Predicted, not measured: {kind} scaling, milliseconds\n\n{_predictions_table(results[kind])}")
    head = ["", *(f"{lines} lines, {micro} to an update" for lines, micro in _variants(batch_size))]
    tables.append(
        f"Predicted, not measured: the most devices, in powers of 2 up to 4096, at {ENOUGH:.0%} of one's efficiency\n\n"
        + markdown(head, [[str(cell) for cell in row] for row in results["limits"]])
    )
    table = "\n\n".join([f"{results['machine']}", *tables])
    save(Path(output_dir), "scaling", table, results, _plot)
    print(table)


def _variants(lines: int) -> list[tuple[int, int]]:
    """(lines of a device, micro-batches to an update)."""
    return [(lines, 1), (4 * lines, 1), (16 * lines, 1), (lines, 4), (lines, 16)]


def _predictions(
    job: DistillationJob, lengths: np.ndarray, cluster: Cluster, share_of: Callable[[int], tuple[int, int]]
) -> list[dict[str, Any]]:
    """Updates on `DEVICES`; `share_of` them is a device's (lines of a micro-batch, micro-batches to an update)."""
    predictions: list[dict[str, Any]] = []
    for objective in OBJECTIVES:
        for devices in DEVICES:
            share = share_of(devices)
            parts = predict(job, lengths, objective, cluster, devices, *share)
            rate = devices * share[0] * share[1] / parts["step"]
            row = {"objective": objective.name, "devices": devices, "share": share, "rate": rate, **parts}
            predictions.append(row)
            row["efficiency"] = rate / devices / predictions[-1 - DEVICES.index(devices)]["rate"]
    return predictions


def _predictions_table(predictions: Sequence[Mapping[str, Any]]) -> str:
    head = ["objective", "devices", "lines each", "models", "largest batch", "relations", "gather", "all-reduce"]
    rows = [
        [row["objective"], f"{row['devices']}", "{} x {}".format(*row["share"])]
        + [f"{1e3 * row['compute']:,.1f}", f"x {row['late']:.2f}"]
        + [f"{1e3 * row[key]:,.1f}" for key in ("relation", "gather", "reduce", "exposed", "step")]
        + [f"{row['rate']:,.0f}", f"{row['efficiency']:.0%}"]
        for row in predictions
    ]
    return markdown([*head, "of it exposed", "update", "lines/s", "efficiency"], rows)


def _plot(axes: Axes, results: dict[str, Any]) -> None:
    """Efficiency over devices, a line an objective and kind of scaling."""
    for kind, style in (("weak", "-"), ("strong", "--")):
        for number, objective in enumerate(OBJECTIVES):
            rows = [row for row in results[kind] if row["objective"] == objective.name]
            x, y = [row["devices"] for row in rows], [row["efficiency"] for row in rows]
            axes.plot(x, y, style, color=f"C{number}", label=f"{objective.name}, {kind}")
    axes.set_xscale("log", base=2)
    axes.set_ylim(0, 1.05)
    axes.set_xlabel("devices (predicted)")
    axes.set_ylabel("efficiency")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))


def _checks_table(checks: Sequence[Mapping[str, Any]]) -> str:
    head = ["", "1 process", "2 apart", "+ largest batch", "+ relations", "+ gather"]
    rows = [
        [f"{row['framework']}, beta {row['beta']:g}"]
        + [f"{1e3 * row['alone']:,.1f}"]
        + [f"{1e3 * row[f'predicted {key}']:,.1f}" for key in ("compute", "late", "relation", "gather", "reduce")]
        + [f"{1e3 * row['predicted']:,.1f}", f"{1e3 * row['two']:,.1f}", f"{row['predicted'] / row['two'] - 1:+.0%}"]
        for row in checks
    ]
    table = markdown([*head, "+ all-reduce", "2, predicted", "2, measured", "error"], rows)
    sent = [
        [row["framework"], name.replace("_", "-"), *(f"{1e3 * seconds:.2f}" for seconds in row[f"{name} seconds"])]
        for row in checks
        if row["beta"]
        for name in ("all_reduce", "gather")
    ]
    return (
        f"Measured: a step of one process, of two apart and of two together, a core each, milliseconds\n\n{table}\n\n"
        "Measured: what two processes (beta 1) send each other, milliseconds\n\n"
        + markdown(["", "", *(f"{size // 1024:,} KiB" for size in PAYLOADS)], sent)
    )
