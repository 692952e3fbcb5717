"""What measurements share: the text, tables, plots and files."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")

from matplotlib import pyplot  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402

from programs.console import say
from text.corpus import Corpus  # noqa: E402
from text.tokenizer import WordPiece  # noqa: E402
from training.report import processor  # noqa: E402

ROOT = Path(__file__).parents[1]
DATA = Path(os.environ.get("MINILM_DATA", ROOT.parent / "shared" / "data"))


def corpus_and_tokenizer(input_dir: str | None, vocab_file: str | None, index: Path) -> tuple[Corpus, WordPiece]:
    """The text and vocabulary to measure on: those given, else the data folder's, else the demo's."""
    source = Path(input_dir) if input_dir else DATA / "corpus" / "train"
    if input_dir is None and not source.is_dir():
        source = ROOT / "general_distill" / "demo"
    corpus = Corpus(source, index)
    vocabulary = Path(vocab_file) if vocab_file else DATA / "vocab" / "vocab.txt"
    if vocab_file is None and not vocabulary.is_file():
        return corpus, WordPiece.trained(corpus, 4000)
    return corpus, WordPiece.from_file(vocabulary)


def machine(device: str) -> str:
    """What a measurement ran on, in words."""
    if device == "gpu":
        import torch

        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    return processor()


def save(
    folder: Path, name: str, table: str, results: dict[str, Any], plot: Callable[[Axes, dict[str, Any]], None]
) -> None:
    """Writes name.md, name.json and name.png."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.md").write_text(table + "\n", encoding="utf-8")
    (folder / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    figure, axes = pyplot.subplots(figsize=(9, 4), layout="constrained")
    plot(axes, results)
    figure.savefig(folder / f"{name}.png", dpi=120)
    pyplot.close(figure)
    say(f"{folder}: {name}.md, .json and .png")


def step_plot(axes: Axes, results: dict[str, Any]) -> None:
    """A bar a contender: the seconds of a step, by phase, with sequences a second beside it."""
    contenders = results["contenders"][::-1]
    titles = [contender["title"] for contender in contenders]
    left = [0.0] * len(contenders)
    for phase in contenders[0]["phase_seconds"]:
        widths = [contender["phase_seconds"][phase] for contender in contenders]
        axes.barh(titles, widths, left=left, label=phase)
        left = [a + b for a, b in zip(left, widths)]
    for contender, end in zip(contenders, left):
        axes.text(end, contender["title"], f"  {contender['sequences_per_second']:.1f} sequences/s", va="center")
    axes.set_xlim(0, max(left) * 1.25)
    axes.set_xlabel(f"seconds a step of {results['batch_size']} sequences")
    axes.set_title(f"{results['size']}: {results['machine']}", fontsize=9)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))


def loss_plot(axes: Axes, results: dict[str, Any]) -> None:
    """A pair of bars a relation and framework: memory beyond the inputs, on a logarithmic scale."""
    records = results["measured"]
    places = range(len(records))
    for shift, kind in ((-0.2, "ours"), (0.2, "full")):
        heights = [record[f"{kind}_bytes"] / 2**20 for record in records]
        axes.bar([place + shift for place in places], heights, 0.4, label=kind)
    axes.set_xticks(list(places), [f"{record['framework']}\n{record['relation']}" for record in records])
    axes.set_yscale("log")
    axes.set_ylabel("MiB beyond the inputs")
    axes.set_title(f"batch {results['batch_size']}, length {results['length']}: {results['machine']}", fontsize=9)
    axes.legend()
