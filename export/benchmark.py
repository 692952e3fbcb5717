"""``python -m export benchmark``: how fast, how accurate and how large a model is, in every form it is served in."""

from __future__ import annotations

import csv
import io
import os
import statistics
import tempfile
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

import backends
from backends.files import InputError, atomically, write_json
from backends.interface import Head
from backends.pretrained import find_model
from backends.shape import LayerShape
from export.contenders import Contender, RemoteRunner, Runtime
from export.convert import OnnxArguments, export, max_seq_length
from export.model import OnnxModel
from export.quantize import Recipe, TaskData, calibration_features, has_vnni, write_quantized
from export.tokenizer import with_tokenizer
from programs.console import say
from text.folder import ModelFolder, write_folder
from training.pictures import mark_zoom, nested_widths, new_figure, write_figure
from training.report import markdown, processor

STATIC: Recipe = Recipe("static-mse", 128)
BASE = "BERT-base float32"
"""What all is compared with; its weights are random."""
BASE_SHAPE = "12x768"
LENGTHS = (16, 32, 64, 128)
FRAMEWORKS: dict[Runtime, str] = {"torch": "PyTorch", "paddle": "Paddle Inference"}
TITLES = (
    BASE,
    f"{BASE}, in parts",
    "ONNX Runtime float32, as it comes",
    "ONNX Runtime INT8 dynamic, as it comes",
    *(f"ONNX Runtime {kind}" for kind in ("float32", "float16", "INT8 dynamic", "INT8 static")),
    *(f"{name} {precision}" for name in FRAMEWORKS.values() for precision in ("float32", "bfloat16")),
)
"""Of contenders on a CPU; each has a colour of its own in every picture."""
ACCELERATORS = {"CUDAExecutionProvider": "CUDA", "TensorrtExecutionProvider": "TensorRT"}


@dataclass
class BenchmarkArguments(TaskData):
    """Speed, accuracy and size in every form, over ONNX Runtime, Paddle Inference and PyTorch."""

    model: str = field(kw_only=True)
    """folder of a classifier"""
    output_dir: str = "output/benchmark"
    """folder for tables (Markdown, CSV), figures (JSON) and plots"""
    shape: str | None = None
    """layers and width, 6x768 say: measure a model of that shape with random weights instead"""
    batch_sizes: list[int] = field(default_factory=lambda: [1, 8, 32])
    """sequences that are computed together"""
    lengths: list[int] | None = None
    """tokens of each; without, 16, 32, 64 and 128 as far as the model takes them"""
    examples: int = 0
    """texts of the task's dev set, spread over it; 0 takes all"""
    rounds: int = 3
    """how often all is measured, in turns"""
    seconds: float = 0.5
    """time for a batch size and length in a round"""
    threads: int = 0
    """that compute; 0 takes as many as there are cores"""
    only: list[str] = field(default_factory=list)
    """words that a contender's title must contain one of"""

    def __post_init__(self) -> None:
        if min(self.batch_sizes, default=0) < 1:
            raise InputError(f"--batch_sizes {self.batch_sizes}: must be numbers from 1 on")
        if self.lengths is not None and min(self.lengths, default=0) < 3:
            raise InputError(f"--lengths {self.lengths}: must be numbers from 3 on")
        if self.rounds < 1 or self.seconds < 0 or self.examples < 0:
            told = f"--rounds {self.rounds} --seconds {self.seconds} --examples {self.examples}"
            raise InputError(f"{told}: the first must be at least 1, the others not negative")

    def without_effect(self, given: Collection[str]) -> dict[str, str]:
        """Options that others keep from having an effect, each with the reason."""
        names = ("data_dir", "text_column", "text_pair_column", "label_column", "examples")
        return dict.fromkeys(names, "without --task_name") if self.task_name is None else {}


def benchmark(arguments: BenchmarkArguments) -> Path:
    """Measures, prints the tables and writes them; returns their folder.

    Raises:
        InputError: the model is no classifier, or the task or an option is wrong.
    """
    folder, output = find_model(arguments.model, "model"), Path(arguments.output_dir)
    threads = arguments.threads or len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        contenders, examples, metric_labels = _prepare(arguments, folder, Path(temporary))
        workers = []
        for contender in contenders:
            say(f"starts: {contender.row}")
            workers.append(RemoteRunner(contender, threads))
            stack.callback(workers[-1].close)
        results = _measure(arguments, workers, examples, metric_labels)
    results |= {
        "machine": processor(),
        "threads": threads,
        "vnni": has_vnni(),
        "versions": _versions(contenders),
        "model": arguments.shape or folder.name,
        "task": arguments.task_name,
        "examples": len(examples),
        "rounds": arguments.rounds,
        "not_there": [name for provider, name in ACCELERATORS.items() if provider not in _providers()],
    }
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "benchmark.json", results)
    told = report(results)
    with atomically(output / "benchmark.md") as file:
        file.write_text(told, encoding="utf-8")
    with atomically(output / "benchmark.csv") as file:
        file.write_text(_csv(results), encoding="utf-8")
    _plot(output, results)
    print(told)
    say(f"{output}: benchmark.md, .csv, .json, latency.png" + (", accuracy.png" if examples else ""))
    return output


def _providers() -> list[str]:
    return list(onnxruntime.get_available_providers())


def _versions(contenders: Sequence[Contender]) -> dict[str, str]:
    found = {"onnxruntime": onnxruntime.__version__}
    for name in {contender.runtime for contender in contenders} - {"onnxruntime"}:
        found |= backends.load(name, "cpu").versions()
    return found


# What is measured


def _prepare(
    arguments: BenchmarkArguments, folder: Path, temporary: Path
) -> tuple[list[Contender], list[Any], list[str]]:
    """The contenders, with their files; the examples, and their labels."""
    trained, limit = arguments.shape is None, max_seq_length(None, ModelFolder.find(folder, "model"))
    if arguments.lengths is not None and max(arguments.lengths) > limit:
        raise InputError(f"--lengths {max(arguments.lengths)}: the model's sequences are cut to {limit} tokens")
    if arguments.shape is not None:
        folder = _random_model(folder, arguments.shape, temporary / "student")
    float32 = export(OnnxArguments(str(folder), str(temporary / "float32.onnx"), max_seq_length=limit))
    source = OnnxModel(float32)
    if source.description.head != "sequence_classification":
        raise InputError(f"{folder}: is no classifier; give one that was fine-tuned on a task of classification")
    base_folder = _random_model(folder, BASE_SHAPE, temporary / "base")
    base = export(OnnxArguments(str(base_folder), str(temporary / "base.onnx"), max_seq_length=limit))
    examples: list[Any] = []
    truth: list[str] = []
    static: list[Recipe] = []
    if arguments.task_name is not None:
        task, examples = arguments.read(source, "dev", "answering")
        if arguments.examples:
            examples = examples[:: max(1, len(examples) // arguments.examples)][: arguments.examples]
        if any(example.label is None for example in examples):
            raise InputError(f"--task_name {arguments.task_name}: its dev set has no labels")
        truth = [(task.labels or ())[example.label] for example in examples]
        static = [Recipe(STATIC.method, STATIC.texts, reduce_range=not has_vnni())]
    labels = source.description.labels
    pairs = examples[0].pair is not None if examples else bool(source.description.pairs)
    recipes = [Recipe("float16"), Recipe("dynamic", reduce_range=not has_vnni()), *static]
    files = {"float32": float32}
    training = arguments.read(source, "train", "calibration")[1] if static else []
    for recipe in recipes:
        title = {"float16": "float16", "dynamic": "INT8 dynamic"}.get(recipe.method, "INT8 static")
        files[title] = temporary / f"{recipe.method}.onnx"
        write_quantized(source, recipe, calibration_features(source, training, recipe.texts), files[title])
    every = [
        Contender(BASE, "onnxruntime", base_folder, base, labels, limit, tokenizing="python", trained=False),
        Contender(f"{BASE}, in parts", "onnxruntime", base_folder, base, labels, limit, trained=False),
    ]

    def add(title: str, file: Path, runtime: Runtime = "onnxruntime", **how: Any) -> None:
        every.append(Contender(title, runtime, folder, file, labels, limit, trained=trained, **how))

    for title in ("float32", "INT8 dynamic"):
        add(f"ONNX Runtime {title}, as it comes", files[title], tokenizing="python")
    for title, file in files.items():
        inside = file.with_name(f"{file.stem}-text.onnx")
        written = with_tokenizer(onnx.load(file), source.tokenizer, labels, pairs, limit)
        onnx.save(written, inside)
        add(f"ONNX Runtime {title}", file)
        add(f"ONNX Runtime {title}", inside, tokenizing="in-graph")
        for provider, name in ACCELERATORS.items():
            if provider in _providers():
                add(f"ONNX Runtime, {name}, {title}", file, provider=provider)
    for runtime, name in FRAMEWORKS.items():
        for precision in ("float32", "bfloat16") if not backends.missing_packages(runtime) else ():
            add(f"{name} {precision}", float32, runtime, precision=precision)
    kept = [one for one in every if one.title == BASE or any(word in one.row for word in arguments.only or [""])]
    return kept, examples, truth


def _random_model(like: Path, shape: str, folder: Path) -> Path:
    """A folder of a model with random weights, of a shape, with the vocabulary and classes of another."""
    layers, _, width = shape.partition("x")
    if not (layers.isdigit() and width.isdigit() and int(layers) and int(width) and int(width) % 64 == 0):
        raise InputError(f"--shape {shape}: expected layers x width, 6x768 say, the width a multiple of 64")
    source = ModelFolder.find(like, "model")
    own = replace(
        source.shape,
        positions=512,
        hidden=int(width),
        layers=(LayerShape(int(width) // 64, 64, 4 * int(width)),) * int(layers),
    )
    config = {**source.config, **own.settings()}
    backend = backends.load("auto", "cpu")
    backend.seed(0)
    folder.mkdir()
    head: Head = "sequence_classification"
    write_folder(folder, config, source.tokenizer, backend.model(config, None, head).weights(), head)
    return folder


# Measuring


def _measure(
    arguments: BenchmarkArguments, workers: Sequence[RemoteRunner], examples: Sequence[Any], truth: Sequence[str]
) -> dict[str, Any]:
    limit = workers[0].contender.max_seq_length
    lengths = arguments.lengths or [length for length in LENGTHS if length <= limit]
    shapes = [(size, length) for size in arguments.batch_sizes for length in lengths]
    runs: list[dict[tuple[int, int], list[list[float]]]] = [{shape: [] for shape in shapes} for _ in workers]
    answered: list[list[float]] = [[] for _ in workers]
    accuracy: list[float | None] = [None] * len(workers)
    for number in range(arguments.rounds):
        for shape in shapes:
            for worker, found in zip(workers, runs):
                found[shape].append(worker.latencies(*shape, arguments.seconds))
        for i, worker in enumerate(workers) if examples else ():
            seconds, labels = worker.answer(examples)
            answered[i].append(seconds)
            if worker.contender.trained:
                accuracy[i] = 100 * float(np.mean([a == b for a, b in zip(labels, truth)]))
        say(f"round {number + 1} of {arguments.rounds} is done")
    return {
        "contenders": [
            {
                "title": worker.contender.title,
                "row": worker.contender.row,
                "runtime": worker.contender.runtime,
                "tokenizing": worker.contender.tokenizing,
                "bytes": worker.contender.file.stat().st_size,
                "peak_bytes": worker.peak_memory(),
                "shapes": [{"batch": b, "length": n, **_summary(b, found[b, n])} for b, n in shapes],
                "answering_seconds": answered[i],
                "accuracy": accuracy[i],
            }
            for i, (worker, found) in enumerate(zip(workers, runs))
        ]
    }


def _summary(batch_size: int, rounds: list[list[float]]) -> dict[str, float]:
    every = [value for one in rounds for value in one]
    medians = [statistics.median(one) for one in rounds]
    median = statistics.median(every)
    return {
        **{f"p{p}_ms": 1000 * float(np.percentile(every, p)) for p in (50, 90, 99)},
        "spread": (max(medians) - min(medians)) / median,
        "runs": len(every),
        "sequences_per_second": batch_size / median,
    }


# Telling


def report(results: dict[str, Any]) -> str:
    """All tables, in Markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in sorted(results["versions"].items()))
    parts = [
        f"{results['model']}, {results['machine']}, {results['threads']} threads, "
        f"{'with' if results['vnni'] else 'without'} VNNI; {versions}; {results['rounds']} rounds in turns.",
        *(f"{name}: ONNX Runtime's provider is not there, not measured." for name in results["not_there"]),
    ]
    largest = {key: max(one[key] for one in results["contenders"][0]["shapes"]) for key in ("batch", "length")}
    parts += [_overview(results, largest), _latencies(results)]
    return "\n\n".join(parts) + "\n"


def _at(contender: dict[str, Any], shape: dict[str, int]) -> dict[str, Any]:
    return next(one for one in contender["shapes"] if all(one[key] == value for key, value in shape.items()))


def _overview(results: dict[str, Any], shape: dict[str, int]) -> str:
    """PP-MiniLM's table of what quantization and tokenizer bring over BERT-base."""
    base = results["contenders"][0]
    rows = []
    for one in results["contenders"]:
        at, of = _at(one, shape), _at(base, shape)
        row = [one["row"], f"{at['p50_ms']:.1f}", f"{of['p50_ms'] / at['p50_ms']:.2f}x"]
        if results["examples"]:
            ours, theirs = (statistics.median(each["answering_seconds"]) for each in (one, base))
            ratios = [b / a for a, b in zip(one["answering_seconds"], base["answering_seconds"])]
            row += [
                f"{results['examples'] / ours:.0f}",
                f"{theirs / ours:.2f}x ({min(ratios):.1f} to {max(ratios):.1f})",
                "random weights" if one["accuracy"] is None else f"{one['accuracy']:.2f}",
            ]
        rows.append([*row, f"{one['bytes'] / 2**20:.1f}", f"{one['peak_bytes'] / 2**20:.0f}"])
    head = ["", f"{shape['batch']} x {shape['length']}, ms", "speed-up"]
    if results["examples"]:
        head += [f"{results['task']}, texts/s", "speed-up (of rounds)", "accuracy"]
    told = (
        f"The speed-up is over {base['row']} (in PP-MiniLM's set-up: batches of 32 as they come). Times of a batch "
        "are without the tokenizer, unless it is in the graph; texts a second are from string to label."
    )
    return f"{told}\n\n{markdown([*head, 'file, MiB', 'peak memory, MiB'], rows)}"


def _latencies(results: dict[str, Any]) -> str:
    rows = [
        [
            one["row"],
            str(at["batch"]),
            str(at["length"]),
            *(f"{at[f'p{p}_ms']:.2f}" for p in (50, 90, 99)),
            f"{100 * at['spread']:.0f} %",
            f"{at['sequences_per_second']:.0f}",
        ]
        for one in results["contenders"]
        for at in one["shapes"]
    ]
    head = ["", "batch", "length", "p50, ms", "p90, ms", "p99, ms", "spread", "sequences/s"]
    return f"Spread is that of the rounds' medians.\n\n{markdown(head, rows)}"


def _csv(results: dict[str, Any]) -> str:
    out = io.StringIO()
    names = ["title", "runtime", "tokenizing", "accuracy", "bytes", "peak_bytes"]
    table = csv.writer(out, lineterminator="\n")
    table.writerow([*names, "texts_per_second", *results["contenders"][0]["shapes"][0]])
    for one in results["contenders"]:
        seconds = one["answering_seconds"]
        speed = f"{results['examples'] / statistics.median(seconds):.2f}" if seconds else ""
        for at in one["shapes"]:
            table.writerow([*("" if one[name] is None else one[name] for name in names), speed, *at.values()])
    return out.getvalue()


def _color(title: str, others: Sequence[str]) -> Any:
    from matplotlib import colormaps

    return colormaps["tab20"]((TITLES.index(title) if title in TITLES else len(TITLES) + others.index(title)) % 20)


def _plot(folder: Path, results: dict[str, Any]) -> None:
    """latency.png, a part for each batch size; accuracy.png, accuracy against texts a second."""
    from matplotlib.ticker import LogLocator, NullFormatter

    contenders = results["contenders"]
    others = sorted({one["title"] for one in contenders} - set(TITLES))
    colors = [_color(one["title"], others) for one in contenders]
    about = f"{results['model']}: {results['machine']}, {results['threads']} threads"
    widths = nested_widths(len(contenders))
    sizes = sorted({at["batch"] for at in contenders[0]["shapes"]})
    figure = new_figure(5 * len(sizes) + 3.5, 5.5, f"Time of a batch, median; {about}")
    for number, size in enumerate(sizes, 1):
        axes = figure.add_subplot(1, len(sizes), number)
        for one, color, width in zip(contenders, colors, widths):
            some = [at for at in one["shapes"] if at["batch"] == size]
            lengths, times = [at["length"] for at in some], [at["p50_ms"] for at in some]
            style, edge = ("^--", "black") if one["tokenizing"] == "in-graph" else ("o-", color)
            [line] = axes.plot(lengths, times, style, color=color, linewidth=width, label=one["row"])
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
    scored = [(one, color) for one, color in zip(contenders, colors) if one["accuracy"] is not None]
    if not scored:
        return
    figure = new_figure(10, 4.8, f"{results['task']}, {results['examples']} examples of the dev set; {about}")
    axes = figure.add_subplot()
    points = [(results["examples"] / statistics.median(one["answering_seconds"]), one["accuracy"]) for one, _ in scored]
    for (one, color), point, width in zip(scored, points, nested_widths(len(scored))):
        style, edge = ("^", "black") if one["tokenizing"] == "in-graph" else ("o", color)
        [dot] = axes.plot(*point, style, color=color, markersize=3 + 2 * width, label=one["row"])
        dot.set(markeredgecolor=edge)
    front = sorted(a for a in points if not any(b != a and b[0] >= a[0] and b[1] >= a[1] for b in points))
    axes.plot(*zip(*front), "k:", zorder=0, label="best at their speed")
    axes.plot(*front[-1], "o", color="black", markersize=20, fillstyle="none", label="fastest")
    axes.set(xlabel="texts/s, from string to label", ylabel="accuracy, %")
    mark_zoom(axes)
    figure.legend(loc="outside right center", fontsize=7)
    write_figure(figure, folder / "accuracy.png")
