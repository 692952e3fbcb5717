"""``python -m export quantize``: INT8 and FP16 from a float32 ONNX file."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import onnx
from onnx import checker

from backends.files import InputError, atomically
from export.convert import check_finite, check_strings, real_texts
from export.examples import read_examples
from export.method_choice import choose_method
from export.model import OnnxModel, check_output
from export.runtime_choice import RuntimeChoice
from export.runtimes import NAMES, RuntimeName, installed
from export.schemes import METHODS, Method, Scheme, has_vnni, write_quantized
from export.tokenizer_graph import with_tokenizer
from programs.console import say
from text.data import Split, read_split
from text.features import Features
from text.tasks import Task, find_task

STATIC: Method = "static-mse"
"""The method of those that have texts, unless they name one."""
COMPARED = 64
"""Texts on which a file is compared with the one it was made of."""


@dataclass
class TaskData:
    """Options that say where a task's texts are."""

    task_name: str | None = None
    """the task that the model was fine-tuned on; classification, reading or labelling for data of your own"""
    data_dir: str = "data/clue"
    """folder with the task's files, or with a folder of the task's name that has them"""
    text_column: str = "text"
    """classification of your own data: the column with the text"""
    text_pair_column: str | None = None
    """and the one with the second text, if texts come in pairs"""
    label_column: str = "label"
    """and the one with the class"""

    def read(self, model: OnnxModel, split: Split, wanted_for: str) -> tuple[Task, list[Any]]:
        """Returns the task, with the model's classes, and the examples of a split.

        Raises:
            InputError: no task was named, it is another than the model's, or its file cannot be read.
        """
        if self.task_name is None:
            raise InputError(f"--task_name: not given; {wanted_for} needs a task's texts (and --data_dir their folder)")
        task = find_task(self.task_name, self.text_column, self.text_pair_column, self.label_column)
        known, labels = model.task, model.task.labels or ()
        fitting = task.with_labels(labels) if task.kind == known.kind else None
        if fitting is None:
            classes = f"{len(labels)} classes ({', '.join(labels[:4])}, ...)"
            raise InputError(
                f"--task_name {task.name}: {model.path} does {known.kind} with {classes}; give its own task"
            )
        examples = list(read_split(fitting, Path(self.data_dir), split).examples)
        if task.kind == "classification" and model.takes_pairs not in (None, examples[0].pair is not None):
            texts = "pairs of texts" if model.takes_pairs else "single texts"
            raise InputError(f"--task_name {task.name}: {model.path} takes {texts}; give its own task")
        return fitting, examples


@dataclass
class QuantizeArguments(TaskData):
    """INT8 or FP16 from a float32 ONNX file."""

    model: str = field(kw_only=True)
    """the file that python -m export onnx wrote, without a tokenizer"""
    output: str | None = None
    """the file to write; without, model.onnx becomes model-int8.onnx, or model-float16.onnx"""
    methods: list[Method] | None = None
    """how; without, static-mse where there are texts to calibrate on, else token; of several the fastest that loses at
    most max_drop on the dev set is kept. Answers of dynamic depend on what is computed with them, others' do not"""
    search: bool = False
    """try all methods"""
    runtime: RuntimeChoice = "auto"
    """where several methods are tried: what computes them; auto tries all that are installed"""
    max_drop: float = 0.3
    """points of the task's metric that may be lost where several methods are tried"""
    calibration: str | None = None
    """texts that static methods look at: a text a line, or JSON lines as predict takes them; without, the task's
    training set"""
    calibration_sizes: list[int] = field(default_factory=lambda: [128])
    """how many of them, spread over all; of several numbers, each is tried"""
    per_channel: bool = True
    """a scale for each column of a weight, instead of one for all"""
    reduce_range: Literal["auto", "true", "false"] = "auto"
    """weights of 7 bits, which cannot saturate on processors without VNNI; auto asks this processor"""
    tokenizer: Literal["none", "in-graph"] = "none"
    """in-graph: the file takes strings and gives labels and probabilities; classifiers only"""
    pairs: bool = False
    """such a file takes pairs of texts"""

    def __post_init__(self) -> None:
        if self.methods is not None and (self.search or not self.methods):
            reason = "--search tries all" if self.search else f"none given; there are {', '.join(METHODS)}"
            raise InputError(f"--methods: {reason}")
        if self.pairs and self.tokenizer != "in-graph":
            raise InputError(
                "--pairs: goes with --tokenizer in-graph; a file of tokens takes single texts and pairs alike"
            )
        if any(size < 1 for size in self.calibration_sizes) or not self.calibration_sizes:
            raise InputError(f"--calibration_sizes {self.calibration_sizes}: must be at least one number from 1 on")

    def without_effect(self, options: Collection[str]) -> dict[str, str]:
        """Returns the options that others keep from having an effect, each with the reason."""
        schemes = schemes_of(self)
        static = any(scheme.texts for scheme in schemes)
        idle: dict[str, str] = {}
        if not static:
            idle |= dict.fromkeys(("calibration", "calibration_sizes"), "without a static method")
        if len(schemes) == 1:
            idle |= dict.fromkeys(("max_drop", "runtime"), "where one method is tried; give several --methods")
            names = ("task_name", "data_dir", "text_column", "text_pair_column", "label_column")
            if self.calibration is not None:
                idle |= dict.fromkeys(names, "with --calibration, where one method is tried; --search tries others")
            elif not static:
                idle |= dict.fromkeys(names, f"with {schemes[0]}, which needs no texts; --search tries other methods")
        elif self.tokenizer == "in-graph":
            idle["runtime"] = "with --tokenizer in-graph, which ONNX Runtime alone runs"
        if all(scheme.method == "float16" for scheme in schemes):
            idle |= dict.fromkeys(("per_channel", "reduce_range"), "with float16")
        return idle


class Quantized(NamedTuple):
    """A file that was written."""

    path: Path
    runtime: RuntimeName | None
    """The runtime that is fastest; None if it was not looked for."""


def quantize(arguments: QuantizeArguments) -> Quantized:
    """Writes a smaller, faster file; of several methods, the one that `choose_method` takes.

    Raises:
        InputError: the file, the task, the texts or an option is wrong, or no method keeps the accuracy.
    """
    source = OnnxModel(Path(arguments.model))
    description = source.description
    check_plain(source)
    if arguments.output is not None:
        check_output(Path(arguments.output), source.path)
    if arguments.tokenizer == "in-graph" and description.head != "sequence_classification":
        raise InputError(f"--tokenizer in-graph: {source.path} is no classifier; leave the tokenizer out")
    pairs = description.pairs_of_strings(arguments.pairs)
    check_finite(source)
    several = len(schemes_of(arguments)) > 1
    runtimes = installed() if arguments.runtime == "auto" else [arguments.runtime]
    if missing := [name for name in runtimes if name not in installed()]:
        raise InputError(f"--runtime {missing[0]}: not installed; pip install {missing[0]}")
    if arguments.tokenizer == "in-graph":
        runtimes = ["onnxruntime"]
    task, dev = arguments.read(source, "dev", "choosing a method") if several else (None, [])
    texts: list[Any] = []
    if any(scheme.texts for scheme in schemes_of(arguments)):
        texts = _calibration_texts(arguments, source)
    schemes = schemes_of(arguments, len(texts))
    runtime: RuntimeName | None = None
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for number, scheme in enumerate(schemes):
            files.append(Path(folder) / f"{number}.onnx")
            write_quantized(source, scheme, spread(source, texts, scheme.texts), files[-1])
        best = 0
        if task is not None:
            named = dict(zip(map(str, schemes), files))
            best, runtime = choose_method(source, named, runtimes, task, dev, arguments.max_drop)
        scheme, plain = schemes[best], OnnxModel(files[best])
        output = Path(
            arguments.output
            or source.path.with_name(f"{source.path.stem}-{'float16' if scheme.method == 'float16' else 'int8'}.onnx")
        )
        written = onnx.load(files[best])
        if arguments.tokenizer == "in-graph":
            written = with_tokenizer(written, source.tokenizer, description.labels, pairs, description.max_seq_length)
        output.parent.mkdir(parents=True, exist_ok=True)
        with atomically(output) as temporary:
            onnx.save(written, temporary)
            checker.check_model(temporary)
            check_finite(plain)
            if arguments.tokenizer == "in-graph":
                check_strings(OnnxModel(temporary), plain)
        error = _error(source, plain, texts)
    if arguments.methods is None and scheme.method == "token":
        say(f"--methods: token, for want of texts; with --calibration FILE it is {STATIC}, which is faster")
    before, after = (path.stat().st_size / 2**20 for path in (source.path, output))
    compared = f"{min(len(texts), COMPARED)} of the texts" if texts else "sentences of this project"
    say(
        f"{output}: {scheme}; {after:.1f} MiB, of {before:.1f} in float32; {next(iter(plain.outputs))} off by "
        f"{error:.1%} of their spread, on {compared}"
    )
    if scheme.method == "dynamic":
        say("its answers depend on what is computed with them; those of token and of static methods do not")
    if runtime is not None:
        say(f"the fastest within {arguments.max_drop:g} points: {scheme}, on {NAMES[runtime]}")
    return Quantized(output, runtime)


def check_plain(model: OnnxModel) -> None:
    """Raises InputError if a file holds its tokenizer or no float32 weights."""
    if model.in_graph:
        raise InputError(
            f"{model.path}: has its tokenizer inside; give the file without it, and --tokenizer in-graph here"
        )
    if model.description.quantized:
        raise InputError(f"{model.path}: is {model.description.quantized} already; give the float32 file")


def schemes_of(arguments: QuantizeArguments, available: int | None = None) -> list[Scheme]:
    """Returns the schemes that the options ask for, each once.

    Args:
        available: texts to calibrate on, if that is known: no scheme takes more.
    """
    reduced = arguments.reduce_range == "true" or (arguments.reduce_range == "auto" and not has_vnni())
    has_texts = arguments.calibration is not None or arguments.task_name is not None
    usual: Sequence[Method] = (STATIC,) if has_texts else ("token",)
    schemes = (
        Scheme(method, texts if available is None else min(texts, available), arguments.per_channel, reduced)
        for method in (METHODS if arguments.search else arguments.methods or usual)
        for texts in (arguments.calibration_sizes if method.startswith("static") else [0])
    )
    return list(dict.fromkeys(schemes))


def _error(source: OnnxModel, quantized: OnnxModel, texts: Sequence[Any]) -> float:
    """Returns the root mean square of what quantization changes in the first output, relative to its spread."""
    features = spread(source, texts, min(len(texts), COMPARED))
    if features is None:
        batch = source.tokenizer.encode(real_texts(8, 2), source.description.max_seq_length).batch
    else:
        batch = features.batch(np.arange(len(features)))
    exact, rounded = (model.run(batch)[0] for model in (source, quantized))
    if next(iter(source.outputs)) in source.by_token:
        kept = batch.attention_mask.astype(bool)
        exact, rounded = exact[kept], rounded[kept]
    return float(np.sqrt(((exact - rounded) ** 2).mean()) / max(exact.std(), np.finfo(np.float32).tiny))


def _calibration_texts(arguments: QuantizeArguments, model: OnnxModel) -> list[Any]:
    if arguments.calibration is None:
        return arguments.read(model, "train", "calibration (or --calibration FILE)")[1]
    return read_examples(model, Path(arguments.calibration), max(*arguments.calibration_sizes, COMPARED))


def spread(model: OnnxModel, examples: Sequence[Any], texts: int) -> Features | None:
    """Returns the features of as many examples as `texts` says, spread over all; none of 0."""
    if not texts:
        return None
    return model.features([examples[i] for i in np.linspace(0, len(examples) - 1, texts).astype(int)])
