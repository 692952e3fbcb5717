"""Pictures that programs leave beside their tables: drawn without a screen, written whole."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from backends.files import atomically
from training.report import processor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.font_manager import FontProperties

CHINESE_FONTS = (
    "Noto Sans CJK SC",
    "Source Han Sans SC",
    "WenQuanYi Zen Hei",
    "WenQuanYi Micro Hei",
    "SimHei",
    "Microsoft YaHei",
    "PingFang SC",
)
BUNDLED_FONT = "fonts/NotoSansCJKsc-Regular.otf"
"""In the package mplfonts, which the extra `fonts` installs."""
CURVE = "training_curve.png"


def new_figure(width: float, height: float, title: str) -> Figure:
    """A figure of so many inches, its title above all its parts; what no font here draws of that is a question mark."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    font = font_for([title])
    figure.suptitle(title if font else title.encode("ascii", "replace").decode(), fontproperties=font, fontsize=9)
    return figure


def write_figure(figure: Figure, path: Path) -> None:
    """Writes a PNG."""
    with atomically(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def font_for(names: Sequence[str]) -> FontProperties | None:
    """A font that can draw names: matplotlib's own, one of `CHINESE_FONTS` here, or that of the package mplfonts;
    None if there is none."""
    from matplotlib import font_manager

    paths = [str(font_manager.findfont("DejaVu Sans"))]
    there = {font.name: font.fname for font in font_manager.fontManager.ttflist}
    paths += [str(there[name]) for name in CHINESE_FONTS if name in there]
    package = find_spec("mplfonts")
    if package is not None and package.origin is not None:
        paths.append(str(Path(package.origin).parent / BUNDLED_FONT))
    characters = {ord(character) for name in names for character in name if character.isprintable()}
    for path in paths:
        if Path(path).is_file() and characters <= font_manager.get_font(path).get_charmap().keys():
            return font_manager.FontProperties(fname=path)
    return None


def ink(color: Sequence[float]) -> str:
    """What can be read on a colour, RGB from 0 to 1: black or white, whichever has the higher contrast (WCAG 2.1)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in color[:3]]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "black" if luminance > 0.179 else "white"


def nested_widths(count: int) -> list[float]:
    """Widths for so many lines, each narrower than the one before, so that equal lines are all seen."""
    return np.linspace(1.5 + min(4.0, 0.8 * (count - 1)), 1.5, count).tolist()


def mark_zoom(axes: Axes) -> None:
    """Says so beneath the label of an ordinate that does not begin at 0."""
    low, _ = axes.get_ylim()
    if low > 0 and axes.get_yscale() == "linear":
        axes.set_ylabel(f"{axes.get_ylabel()}\n(axis begins at {low:.4g}, not 0)")


def draw_curve(folder: Path, phase: str) -> None:
    """Draws `CURVE` from a run's ``metrics.jsonl``: the loss and, if there are any, the scores on the dev set, the best
    evaluation marked."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records: list[dict[str, Any]] = [json.loads(line) for line in lines]
    losses = [(record["step"], record["loss"]) for record in records if record.get("loss") is not None]
    scores = [(record["step"], value) for record in records if (value := _score(record)) is not None]
    if not losses:
        return
    place = "/".join(folder.parts[-3:])  # the model and the task are in it where the folder is not of the user's choice
    figure = new_figure(7, 5.5 if scores else 3.2, f"{phase}, {place}: {processor()}")
    parts = figure.subplots(2 if scores else 1, sharex=True, squeeze=False)[:, 0]
    parts[0].plot(*zip(*losses), marker="." if len(losses) < 50 else None)
    parts[0].set(ylabel="loss, mean between records")
    mark_zoom(parts[0])
    if scores:
        best = max(scores, key=lambda score: score[1])
        name = next(key for record in records for key in record if key.startswith("dev/")).removeprefix("dev/")
        parts[1].plot(*zip(*scores), marker=".", color="C1")
        parts[1].plot(*best, marker="*", markersize=14, color="C3", label=f"best: {best[1]:.2f} at {best[0]}")
        parts[1].set(ylabel=f"{name} on the dev set, %")
        parts[1].legend(fontsize=8)
        mark_zoom(parts[1])
    parts[-1].set(xlabel="updates")
    write_figure(figure, folder / CURVE)


def _score(record: dict[str, Any]) -> float | None:
    """The score that a model is chosen by, which comes first."""
    return next((value for key, value in record.items() if key.startswith("dev/")), None)


def draw_confusion(path: Path, matrix: np.ndarray, title: str, names: Sequence[str]) -> None:
    """A picture of what was taken for what, and the same numbers as a table beside it.

    Args:
        path: the PNG; the table, CSV with the classes' names, has its name otherwise.
        matrix: int64 [classes, classes], how many of a class (row) were predicted as another (column).
        names: the classes'; where no font here can draw them, the picture shows their numbers in the table.
    """
    from matplotlib import colormaps

    table = path.with_suffix(".csv")
    with atomically(table) as temporary, temporary.open("w", encoding="utf-8-sig", newline="") as file:  # for Excel
        csv.writer(file).writerows(
            [["right \\ predicted", *names], *([n, *row] for n, row in zip(names, matrix.tolist()))]
        )
    font = font_for(names)
    shown = list(names) if font is not None else [str(number) for number in range(len(names))]
    count = len(matrix)
    size = min(40.0, max(4.5, 0.32 * count + 2.5))
    figure = new_figure(size, size, f"{title}\n{processor()}")
    axes = figure.add_subplot()
    shares = matrix / np.maximum(1, matrix.sum(axis=1, keepdims=True))
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    ticks = range(count)
    style: dict[str, Any] = {"fontsize": 7} if font is None else {"fontproperties": font, "fontsize": 7}
    axes.set_xticks(ticks, shown, rotation=90, **style)
    axes.set_yticks(ticks, shown, **style)
    note = "" if font is not None else f"\n(no font here draws the names;\nnumbers are rows of {table.name})"
    axes.set(xlabel=f"predicted class{note}", ylabel="right class")
    if count <= 20:
        for i in ticks:
            for j in ticks:
                color = ink(colormaps["Blues"](shares[i, j]))
                axes.text(j, i, str(matrix[i, j]), ha="center", va="center", fontsize=7, color=color)
    figure.colorbar(image, shrink=0.8, label="share of a class' examples")
    write_figure(figure, path)
