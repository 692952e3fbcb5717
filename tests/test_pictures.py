"""Pictures: what a reader must be able to read, and the files beside them."""

from __future__ import annotations

import csv
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from matplotlib import colormaps

from export.benchmark import plots
from training import pictures

NAMES = ["体育", "财经", "news_story"]
MATRIX = np.array([[90, 5, 5], [0, 1, 99], [30, 30, 40]])


def contrast(color: str, background: tuple[float, ...]) -> float:
    """WCAG 2.1's contrast ratio, from 1 to 21."""

    def luminance(rgb: tuple[float, ...]) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb[:3]]
        return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))

    pair = sorted([luminance((0, 0, 0) if color == "black" else (1, 1, 1)), luminance(background)])
    return (pair[1] + 0.05) / (pair[0] + 0.05)


@pytest.mark.parametrize("share", np.linspace(0, 1, 21))
def test_a_number_can_be_read_on_every_blue(share: float) -> None:
    background = colormaps["Blues"](share)
    assert contrast(pictures.ink(background), background) >= 4.5


@pytest.fixture
def no_chinese_font(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "CHINESE_FONTS", ())
    monkeypatch.setattr(pictures, "find_spec", lambda name: None)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list:
    figures: list = []
    write = pictures.write_figure
    monkeypatch.setattr(pictures, "write_figure", lambda figure, path: (figures.append(figure), write(figure, path)))
    return figures


def test_names_that_no_font_draws_are_numbers_of_a_table(tmp_path: Path, drawn: list, no_chinese_font: None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns of glyphs that are missing
        pictures.draw_confusion(tmp_path / "confusion.png", MATRIX, "own: 模型", NAMES)
    axes = drawn[0].axes[0]
    assert drawn[0].get_suptitle().startswith("own: ??")
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0", "1", "2"]
    assert "confusion.csv" in axes.get_xlabel()
    with (tmp_path / "confusion.csv").open(encoding="utf-8-sig", newline="") as file:
        head, *rows = csv.reader(file)
    assert head[1:] == [row[0] for row in rows] == NAMES
    assert np.array_equal(np.array([row[1:] for row in rows], int), MATRIX)


def test_the_bundled_font_draws_chinese_names(tmp_path: Path, drawn: list, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mplfonts", reason="the extra fonts is not installed")
    monkeypatch.setattr(pictures, "CHINESE_FONTS", ())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pictures.draw_confusion(tmp_path / "confusion.png", MATRIX, "own: 模型", NAMES)
    assert [label.get_text() for label in drawn[0].axes[0].get_xticklabels()] == NAMES


def test_a_curve_marks_the_best_evaluation_and_where_its_axis_begins(tmp_path: Path, drawn: list) -> None:
    records = [
        {"step": 1, "loss": 2.0},
        {"step": 1, "dev/f1": 40.0, "dev/precision": 99.0},
        {"step": 2, "loss": None},  # a step whose loss was not finite
        {"step": 2, "dev/f1": 43.5, "dev/precision": 1.0},
        {"step": 3, "loss": 1.5},
        {"step": 3, "dev/f1": 42.0, "dev/precision": 1.0},
    ]
    folder = tmp_path / "六层" / "TNEWS" / "5e-5-32-torch"  # as run_clue.sh names it
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    pictures.draw_curve(folder, "tnews")
    assert "/TNEWS/5e-5-32-torch" in drawn[0].get_suptitle()
    loss, score = drawn[0].axes
    assert [line.get_xydata().tolist() for line in loss.lines] == [[[1, 2.0], [3, 1.5]]]
    assert score.get_legend().get_texts()[0].get_text() == "best: 43.50 at 2"
    assert "f1" in score.get_ylabel() and "not 0" in score.get_ylabel()
    assert (folder / pictures.CURVE).read_bytes().startswith(b"\x89PNG")


def test_a_run_without_records_draws_nothing(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    pictures.draw_curve(tmp_path, "tnews")
    assert not (tmp_path / pictures.CURVE).exists()


def test_equal_lines_have_different_widths() -> None:
    for count in (1, 2, 18):
        widths = pictures.nested_widths(count)
        assert len(set(widths)) == count and widths == sorted(widths, reverse=True)


@pytest.mark.parametrize("times", [(0.07, 120.0), (21.0, 90.0)])
def test_numbers_beside_times_do_not_overlap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: tuple) -> None:
    figures: list = []
    monkeypatch.setattr(plots, "write_figure", lambda figure, path: figures.append(figure))
    shapes = [{"batch": 1, "length": length, "p50_ms": ms} for length, ms in zip((8, 16), times)]
    contender = {"title": "a", "row": "a", "tokenizing": "tokenizers", "shapes": shapes, "accuracy": None}
    plots.plot(tmp_path, {"contenders": [contender], "model": "m", "machine": "x", "threads": 1})
    figures[0].canvas.draw()
    axis = figures[0].axes[0].yaxis
    labels = [label for label in axis.get_ticklabels(which="both") if label.get_text()]
    low, high = axis.get_view_interval()
    boxes = sorted(
        (box.y0, box.y1) for label in labels if low <= label.get_position()[1] <= high
        for box in [label.get_window_extent()]
    )  # fmt: skip
    assert len(boxes) >= 3 and all(below[1] <= above[0] for below, above in zip(boxes, boxes[1:]))
