"""Plots of a benchmark's results."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from export.benchmark.deployments import TITLES
from training.pictures import mark_zoom, nested_widths, new_figure, write_figure


def plot(folder: Path, results: dict[str, Any]) -> None:
    """Writes latency.png, and accuracy.png if a trained model answered a task's texts."""
    deployments = results["contenders"]
    others = sorted({deployment["title"] for deployment in deployments} - set(TITLES))
    colors = [_color(deployment["title"], others) for deployment in deployments]
    about = f"{results['model']}: {results['machine']}, {results['threads']} threads"
    _plot_latency(folder, deployments, colors, about)
    scored = [entry for entry in zip(deployments, colors) if entry[0]["accuracy"] is not None]
    if scored:
        _plot_accuracy(folder, results, scored, about)


def _color(title: str, others: Sequence[str]) -> Any:
    from matplotlib import colormaps

    return colormaps["tab20"]((TITLES.index(title) if title in TITLES else len(TITLES) + others.index(title)) % 20)


def _plot_latency(folder: Path, deployments: Sequence[dict[str, Any]], colors: Sequence[Any], about: str) -> None:
    """Writes latency.png, a part for each batch size."""
    from matplotlib.ticker import LogLocator, NullFormatter

    widths = nested_widths(len(deployments))
    sizes = sorted({shape["batch"] for shape in deployments[0]["shapes"]})
    figure = new_figure(5 * len(sizes) + 3.5, 5.5, f"Time of a batch, median; {about}")
    for number, size in enumerate(sizes, 1):
        axes = figure.add_subplot(1, len(sizes), number)
        for deployment, color, width in zip(deployments, colors, widths):
            shapes = [shape for shape in deployment["shapes"] if shape["batch"] == size]
            lengths, times = [shape["length"] for shape in shapes], [shape["p50_ms"] for shape in shapes]
            style, edge = ("^--", "black") if deployment["tokenizing"] == "in-graph" else ("o-", color)
            [line] = axes.plot(lengths, times, style, color=color, linewidth=width, label=deployment["row"])
            line.set(markersize=3 + width, markeredgecolor=edge)
        axes.set(title=f"batch of {size}", xlabel="tokens of a sequence", ylabel="ms", xscale="log", yscale="log")
        axes.set_xticks(lengths, [str(length) for length in lengths], minor=False)
        axes.set_xticks([], minor=True)
        low, high = axes.get_ylim()
        axes.yaxis.set_major_locator(LogLocator(subs=range(1, 10) if high < 10 * low else (1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", fontsize=7)
    write_figure(figure, folder / "latency.png")


def _plot_accuracy(
    folder: Path, results: dict[str, Any], scored: Sequence[tuple[dict[str, Any], Any]], about: str
) -> None:
    """Writes accuracy.png, accuracy against texts a second."""
    count = results["examples"]
    figure = new_figure(10, 4.8, f"{results['task']}, {count} examples of the dev set; {about}")
    axes = figure.add_subplot()
    seconds = [statistics.median(deployment["answering_seconds"]) for deployment, _ in scored]
    points = [(count / median, deployment["accuracy"]) for median, (deployment, _) in zip(seconds, scored)]
    for (deployment, color), point, width in zip(scored, points, nested_widths(len(scored))):
        style, edge = ("^", "black") if deployment["tokenizing"] == "in-graph" else ("o", color)
        [dot] = axes.plot(*point, style, color=color, markersize=3 + 2 * width, label=deployment["row"])
        dot.set(markeredgecolor=edge)
    front = sorted(a for a in points if not any(b != a and b[0] >= a[0] and b[1] >= a[1] for b in points))
    axes.plot(*zip(*front), "k:", zorder=0, label="best at their speed")
    axes.plot(*front[-1], "o", color="black", markersize=20, fillstyle="none", label="fastest")
    axes.set(xlabel="texts/s, from string to label", ylabel="accuracy, %")
    mark_zoom(axes)
    figure.legend(loc="outside right center", fontsize=7)
    write_figure(figure, folder / "accuracy.png")
