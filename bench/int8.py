"""``python -m bench int8``: what INT8 loses on fine-tuned models' tasks, and whether answers depend on company."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from matplotlib.axes import Axes

from backends.files import InputError
from backends.pretrained import find_model, fingerprint
from bench.opening import opened, runtimes_of
from bench.report import machine, save
from export.benchmark.deployments import CALIBRATED
from export.benchmark.peers import quantized_by_nncf
from export.convert import OnnxArguments, export
from export.model import OnnxModel
from export.quantize import QuantizeArguments, TaskData, quantize, spread
from export.runtimes import NAMES, installed
from export.schemes import METHODS, Method
from programs.console import say
from text.answers import scores
from text.tasks import KINDS
from training.folder import RECORD, read_record
from training.report import markdown

INT8: list[Method] = [method for method in METHODS if method != "float16"]
SAME = 1e-5
"""Difference of probabilities that is none."""
COMPANIES = ("alone", "in another order")
"""What an answer in company of all, in their order, is compared with."""


class Tuned(NamedTuple):
    """A fine-tuned model and its task."""

    folder: Path
    data: TaskData

    @property
    def task(self) -> str:
        """The task's name; for a user's own data, its folder's."""
        name = str(self.data.task_name).lower()
        return Path(self.data.data_dir).name if name in KINDS else name


def int8(
    models: list[str],
    backends: list[Literal["auto", "torch", "paddle"]] = ["auto"],  # noqa: B006
    methods: list[Method] = INT8,
    examples: int = 0,
    output_dir: str = "output/bench",
) -> None:
    """Measures what INT8 loses: fine-tuned models, quantized by every method, on their tasks' dev sets.

    Every file is evaluated on every installed runtime, and so is what NNCF makes of the models where it is installed.
    The first model of each task of classification also answers each example alone, and all in another order.
    Files are kept in output_dir, and those that are there are not made again.

    Args:
        models: folders that python -m finetuning wrote; those of a task are different seeds, say.
        backends: frameworks that export them.
        methods: of quantization.
        examples: the first so many of the dev set; 0 takes all.
        output_dir: where the files, the tables, the plot and the figures go.
    """
    measured: list[dict[str, Any]] = []
    runs = [_tuned(name) for name in models]
    firsts = {run.task: run for run in reversed(runs)}
    for run in runs:
        for backend in backends:
            files = _files(run, backend, methods, Path(output_dir) / "int8")
            about = {"task": run.task, "backend": backend, "model": run.folder.name}
            for record in _measured(run, files, examples, in_company=run is firsts[run.task]):
                measured.append({**about, **record})
    results = {"machine": machine("cpu"), "measured": measured}
    tables = "\n\n".join([_losses(measured), *_dependences(measured)])
    save(Path(output_dir), "int8", tables, results, _plot)
    print(tables)


def _tuned(name: str) -> Tuned:
    """Raises InputError if a folder is not a run's."""
    folder = find_model(name, "models")
    try:
        record = read_record(folder / RECORD)
        return Tuned(folder, TaskData(**{field.name: record[field.name] for field in fields(TaskData)}))
    except (ValueError, KeyError) as error:
        raise InputError(f"{folder / RECORD}: not the arguments of python -m finetuning ({error})") from error


def _files(tuned: Tuned, backend: Any, methods: Sequence[Method], folder: Path) -> dict[str, Path]:
    """A file in float32 and of every method, by their names; made if they are not there."""
    work = folder / f"{tuned.folder.name}-{backend}-{fingerprint(tuned.folder)}"
    work.mkdir(parents=True, exist_ok=True)
    float32, nncf = work / "float32.onnx", work / "nncf.xml"
    files: dict[str, Path] = {"float32": float32, **{method: work / f"{method}.onnx" for method in methods}}
    if not float32.exists():
        export(OnnxArguments(str(tuned.folder), str(float32), backend))
    for method in methods:
        if not files[method].exists():
            output = str(files[method])
            quantize(QuantizeArguments(model=str(float32), output=output, methods=[method], **vars(tuned.data)))
    if find_spec("nncf") is not None and "openvino" in installed():
        files["NNCF's"] = nncf
        if not nncf.exists():
            source = OnnxModel(float32)
            texts = spread(source, tuned.data.read(source, "train", "calibration")[1], CALIBRATED)
            assert texts is not None
            with tempfile.TemporaryDirectory(dir=work) as temporary:
                weights = quantized_by_nncf(float32, texts, Path(temporary) / "nncf")
                weights.replace(nncf.with_suffix(".bin"))
                weights.with_suffix(".xml").replace(nncf)
    return files


def _measured(tuned: Tuned, files: dict[str, Path], examples: int, in_company: bool) -> Iterator[dict[str, Any]]:
    """The score of each file on each runtime; and, if wanted, how its answers depend on company."""
    task, dev = tuned.data.read(OnnxModel(files["float32"]), "dev", "evaluation")
    dev = dev[: examples or None]
    exact: float | None = None
    for name, file in files.items():
        for runtime in runtimes_of(file):
            model = opened(file, runtime)
            answers = model.answers(dev)
            score = scores(task, dev, answers)[task.metric]
            exact = score if exact is None else exact
            say(f"{file} on {NAMES[runtime]}: {task.metric} {score:.2f} on {len(dev)} examples of {tuned.task}")
            record = {"file": name, "runtime": runtime, "metric": task.metric, "examples": len(dev)}
            record |= {"score": score, "difference": score - exact}
            if in_company and task.kind == "classification":
                order = np.random.default_rng(1).permutation(len(dev))
                shuffled = dict(zip(order.tolist(), model.answers([dev[i] for i in order])))
                others = ([model.answers([example])[0] for example in dev], [shuffled[i] for i in range(len(dev))])
                record["company"] = {way: _changes(answers, other) for way, other in zip(COMPANIES, others)}
            yield record


def _changes(answers: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How many labels and probabilities differ, and the largest difference of probabilities."""
    differences = [abs(a["probability"] - b["probability"]) for a, b in zip(answers, others)]
    return {
        "labels": sum(a["label"] != b["label"] for a, b in zip(answers, others)),
        "probabilities": sum(difference > SAME for difference in differences),
        "largest": max(differences),
    }


def _by_row(measured: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Rows of tables -> what was measured of a file, exported by a framework, on a runtime."""
    several = len({record["backend"] for record in measured}) > 1
    rows: dict[str, list[dict[str, Any]]] = {}
    for record in measured:
        row = f"{record['file']}, {NAMES[record['runtime']]}" + several * f", by {record['backend']}"
        rows.setdefault(row, []).append(record)
    return rows


def _losses(measured: Sequence[dict[str, Any]]) -> str:
    """A column a task: float32's score, the others' differences from it."""
    columns = {record["task"]: f"{record['task']}, {record['metric']}" for record in measured}
    rows = []
    for row, records in _by_row(measured).items():
        cells = []
        for task in columns:
            of_task = [record for record in records if record["task"] == task]
            differences = [record["difference"] for record in of_task]
            if row.startswith(f"float32, {NAMES['onnxruntime']}"):
                cells.append(f"{statistics.mean(record['score'] for record in of_task):.2f}")
            else:
                mean, least, largest = statistics.mean(differences), min(differences), max(differences)
                cells.append(f"{mean:+.2f} ({least:+.2f} to {largest:+.2f})")
        rows.append([row, *cells])
    caption = "Float32 in per cent, the others' differences from it: the mean of the models (the least to the largest)."
    return f"{caption}\n\n{markdown(['', *columns.values()], rows)}"


def _dependences(measured: Sequence[dict[str, Any]]) -> Iterator[str]:
    """A table a task: labels and probabilities of its first model that depend on company."""
    compared = [record for record in measured if "company" in record]
    for task in dict.fromkeys(record["task"] for record in compared):
        of_task = [record for record in compared if record["task"] == task]
        rows = []
        for row, [record] in _by_row(of_task).items():
            cells = []
            for way in COMPANIES:
                change = record["company"][way]
                most = f" (by up to {change['largest']:.2g})" if change["probabilities"] else ""
                cells.append(f"{change['labels']:,}, {change['probabilities']:,}{most}")
            rows.append([row, *cells])
        caption = (
            f"{task}, {of_task[0]['examples']:,} examples, {of_task[0]['model']}: how many labels, and probabilities "
            f"by more than {SAME:.0e}, are others if an example is asked alone, or all are in another order."
        )
        yield f"{caption}\n\n{markdown(['', *COMPANIES], rows)}"


def _plot(axes: Axes, results: dict[str, Any]) -> None:
    """A line a task: the mean of differences from float32, and from the least to the largest."""
    rows = _by_row(results["measured"])
    tasks = list(dict.fromkeys(record["task"] for record in results["measured"]))
    for number, task in enumerate(tasks):
        for place, records in enumerate(rows.values()):
            differences = [record["difference"] for record in records if record["task"] == task]
            x = place + 0.6 * ((number + 0.5) / len(tasks) - 0.5)
            axes.plot([x, x], [min(differences), max(differences)], color=f"C{number}")
            axes.plot(x, statistics.mean(differences), "o", color=f"C{number}", label=None if place else task)
    axes.set_xticks(range(len(rows)), list(rows), rotation=30, ha="right", fontsize=6)
    axes.set_ylabel("points from float32")
    axes.set_title(results["machine"], fontsize=9)
    axes.legend()
