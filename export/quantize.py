"""``python -m export quantize``: INT8 and FP16 from a float32 ONNX file."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import onnx
import onnxruntime
from onnx import checker, numpy_helper, shape_inference
from onnxruntime.quantization import CalibrationMethod, QuantType, quantize_dynamic
from onnxruntime.quantization.calibrate import HistogramCollector, TensorsData
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

from backends.files import InputError, atomically
from backends.interface import ONNX_INPUTS
from export.convert import check_finite, check_strings
from export.method_choice import choose_method
from export.model import OnnxModel, check_output
from export.tokenizer_graph import with_tokenizer
from programs.console import say
from text.data import Split, read_split
from text.features import Features
from text.tasks import Task, find_task

Method = Literal["dynamic", "static-min-max", "static-percentile", "static-entropy", "static-mse", "float16"]
METHODS: tuple[Method, ...] = get_args(Method)
BINS, ENTROPY_BINS = 2048, 512
"""Bins of the histogram of a tensor's values; the least entropy takes the square of their number in time."""
PERCENTILE = 99.99
"""Percentage of a tensor's values that static-percentile keeps in range."""
CPU = Path("/proc/cpuinfo")


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
    """how, dynamic if nothing is said; of several the fastest that loses at most max_drop on the dev set is kept"""
    search: bool = False
    """try all methods"""
    max_drop: float = 0.3
    """points of the task's metric that may be lost where several methods are tried"""
    calibration_sizes: list[int] = field(default_factory=lambda: [128])
    """texts of the training set that static methods look at; of several, each is tried"""
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
        idle = {}
        if len(schemes) == 1:
            idle["max_drop"] = "where one method is tried; give several --methods, or --search"
        if not any(scheme.texts for scheme in schemes):
            idle["calibration_sizes"] = "without a static method"
            if len(schemes) == 1:
                names = ("task_name", "data_dir", "text_column", "text_pair_column", "label_column")
                idle |= dict.fromkeys(names, f"with {schemes[0]}, which needs no texts; --search tries other methods")
        if all(scheme.method == "float16" for scheme in schemes):
            idle |= dict.fromkeys(("per_channel", "reduce_range"), "with float16")
        return idle


def has_vnni(cpuinfo: Path = CPU) -> bool:
    """Returns whether the processor adds products of 8 bits in 32. Others add pairs of them in 16 bits first, which
    saturate unless weights have 7 bits. ARM's (which say so under Features) do not saturate."""
    words = cpuinfo.read_text().split() if cpuinfo.exists() else []
    return "avx512_vnni" in words or "avx_vnni" in words or "flags" not in words


@dataclass(frozen=True)
class Scheme:
    """A quantization scheme: a method and its settings."""

    method: Method
    texts: int = 0
    """Texts of the calibration; static methods only."""
    per_channel: bool = True
    reduce_range: bool = False

    def __str__(self) -> str:
        return f"{self.method}, {self.texts} texts" if self.texts else self.method


def quantize(arguments: QuantizeArguments) -> Path:
    """Writes a smaller, faster file; of several methods, the one that `choose_method` takes.

    Raises:
        InputError: the file, the task or an option is wrong, or no method keeps the accuracy.
    """
    source = OnnxModel(Path(arguments.model))
    description = source.description
    check_plain(source)
    if arguments.output is not None:
        check_output(Path(arguments.output), source.path)
    if arguments.tokenizer == "in-graph" and description.head != "sequence_classification":
        raise InputError(f"--tokenizer in-graph: {source.path} is no classifier; leave the tokenizer out")
    pairs = description.pairs_of_strings(arguments.pairs)
    schemes = schemes_of(arguments)
    static = [scheme for scheme in schemes if scheme.texts]
    examples: list[Any] = []
    if static:
        _, examples = arguments.read(source, "train", "calibration")
        most = max(scheme.texts for scheme in static)
        if len(examples) < most:
            available = f"{arguments.task_name} has {len(examples)} training texts"
            raise InputError(f"--calibration_sizes {most}: {available}; give at most that")
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for number, scheme in enumerate(schemes):
            files.append(Path(folder) / f"{number}.onnx")
            write_quantized(source, scheme, calibration_features(source, examples, scheme.texts), files[-1])
        best = 0
        if len(schemes) > 1:
            task, dev = arguments.read(source, "dev", "choosing a method")
            best = choose_method(source, dict(zip(map(str, schemes), files)), task, dev, arguments.max_drop)
        kind = "float16" if schemes[best].method == "float16" else "int8"
        output = Path(arguments.output or source.path.with_name(f"{source.path.stem}-{kind}.onnx"))
        written = onnx.load(files[best])
        if arguments.tokenizer == "in-graph":
            written = with_tokenizer(written, source.tokenizer, description.labels, pairs, description.max_seq_length)
        output.parent.mkdir(parents=True, exist_ok=True)
        with atomically(output) as temporary:
            onnx.save(written, temporary)
            checker.check_model(temporary)
            plain = OnnxModel(files[best])
            check_finite(plain)
            if arguments.tokenizer == "in-graph":
                check_strings(OnnxModel(temporary), plain)
    before, after = (path.stat().st_size / 2**20 for path in (source.path, output))
    say(f"{output}: {schemes[best]}; {after:.1f} MiB, of {before:.1f} in float32")
    return output


def check_plain(model: OnnxModel) -> None:
    """Raises InputError if a file holds its tokenizer or no float32 weights."""
    if model.in_graph:
        raise InputError(
            f"{model.path}: has its tokenizer inside; give the file without it, and --tokenizer in-graph here"
        )
    if model.description.quantized:
        raise InputError(f"{model.path}: is {model.description.quantized} already; give the float32 file")


def schemes_of(arguments: QuantizeArguments) -> list[Scheme]:
    """Returns the schemes that the options ask for, each once."""
    reduced = arguments.reduce_range == "true" or (arguments.reduce_range == "auto" and not has_vnni())
    schemes = (
        Scheme(method, texts, arguments.per_channel, reduced)
        for method in (METHODS if arguments.search else arguments.methods or ("dynamic",))
        for texts in (arguments.calibration_sizes if method.startswith("static") else [0])
    )
    return list(dict.fromkeys(schemes))


def calibration_features(model: OnnxModel, examples: Sequence[Any], texts: int) -> Features | None:
    """Returns the features of as many examples as `texts` says, spread over all; none of 0."""
    if not texts:
        return None
    return model.features([examples[i] for i in np.linspace(0, len(examples) - 1, texts).astype(int)])


def write_quantized(source: OnnxModel, scheme: Scheme, calibration: Features | None, output: Path) -> None:
    """Writes a quantized file with the source's inputs, outputs and metadata.

    Weights of INT8 are signed and symmetric, activations unsigned. Dynamic quantization takes each
    tensor's range as it comes; static quantization fixes the ranges that `calibration` shows and writes
    QuantizeLinear and DequantizeLinear around matrix products. Both keep embeddings in INT8, with a scale
    for each token.
    """
    if scheme.method == "float16":
        written = _float16(onnx.load(source.path, load_external_data=False))
    elif scheme.method == "dynamic":
        with _quietly():
            quantize_dynamic(
                source.path,
                output,
                per_channel=scheme.per_channel,
                reduce_range=scheme.reduce_range,
                weight_type=QuantType.QInt8,
                op_types_to_quantize=["MatMul"],
                extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
            )
        written = _small_embeddings(onnx.load(output))
    else:
        assert calibration is not None
        written = _small_embeddings(_static(source, scheme, calibration))
    description = replace(source.description, quantized=str(scheme))
    onnx.helper.set_model_props(written, description.metadata())
    onnx.save(written, output)


def _float16(model: onnx.ModelProto) -> onnx.ModelProto:
    """Returns the model with weights and arithmetic in half precision; outputs stay float32."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    with _quietly():
        return convert_float_to_float16(model, keep_io_types=True, disable_shape_infer=True)


def _small_embeddings(model: onnx.ModelProto) -> onnx.ModelProto:
    """Returns the model with large tables in INT8: rows are looked up, then scaled, each with a scale of its own."""
    tables = {table.name: table for table in model.graph.initializer}
    nodes = list(model.graph.node)
    uses = Counter(name for node in nodes for name in node.input)
    for node in list(nodes):
        table = tables.get(node.input[0]) if node.op_type == "Gather" and uses[node.input[0]] == 1 else None
        if table is None or table.data_type != onnx.TensorProto.FLOAT or len(table.dims) != 2 or table.dims[0] < 256:
            continue
        rows = numpy_helper.to_array(table)
        scales = np.maximum(np.abs(rows).max(axis=1, keepdims=True), np.float32(1e-12)) / np.float32(127)
        name = node.output[0]
        small = numpy_helper.from_array(np.round(rows / scales).astype(np.int8), f"{table.name}_quantized")
        model.graph.initializer.extend([small, numpy_helper.from_array(scales, f"{table.name}_scales")])
        model.graph.initializer.remove(table)
        place = nodes.index(node)
        nodes[place : place + 1] = [
            onnx.helper.make_node("Gather", [small.name, node.input[1]], [f"{name}_quantized"]),
            onnx.helper.make_node("Cast", [f"{name}_quantized"], [f"{name}_cast"], to=onnx.TensorProto.FLOAT),
            onnx.helper.make_node("Gather", [f"{table.name}_scales", node.input[1]], [f"{name}_scales"]),
            onnx.helper.make_node("Mul", [f"{name}_cast", f"{name}_scales"], [name]),
        ]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


# Static quantization

QUANTIZED = ["MatMul", "Gemm"]


def _static(source: OnnxModel, scheme: Scheme, calibration: Features) -> onnx.ModelProto:
    model = onnx.load(source.path, load_external_data=False)
    floats = {weight.name for weight in model.graph.initializer if weight.data_type == onnx.TensorProto.FLOAT}
    nodes = [node for node in model.graph.node if node.op_type in QUANTIZED and node.input[1] in floats]
    wanted = sorted({name for node in nodes for name in (node.input[0], node.output[0])} - floats)
    with _quietly():
        ranges = _ranges(model, wanted, scheme.method, calibration)
        quantizer = QDQQuantizer(
            shape_inference.infer_shapes(model),
            scheme.per_channel,
            scheme.reduce_range,
            QuantType.QInt8,
            QuantType.QUInt8,
            TensorsData(CalibrationMethod.MinMax, ranges),
            [node.name for node in nodes],
            [],
            QUANTIZED,
            {"MatMulConstBOnly": True},
        )
        quantizer.quantize_model()
        quantizer.model.topological_sort()
    return quantizer.model.model


def _ranges(
    model: onnx.ModelProto, wanted: Sequence[str], method: Method, calibration: Features
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns the range of each tensor's values over all calibration texts, one at a time: no padding is among them."""
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    outputs = {output.name for output in model.graph.output}
    watched.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in wanted if name not in outputs
    )
    session = onnxruntime.InferenceSession(watched.SerializeToString(), providers=["CPUExecutionProvider"])
    bins = ENTROPY_BINS if method == "static-entropy" else BINS
    collector = HistogramCollector("entropy", False, bins, 128, PERCENTILE, "same")
    for i in range(len(calibration)):
        feed = dict(zip(ONNX_INPUTS, calibration.batch(np.array([i]))[:3]))
        values: Any = session.run(list(wanted), feed)
        collector.collect(dict(zip(wanted, values)))
    choose: dict[str, Callable[[], Any]] = {
        "static-min-max": lambda: {name: histogram[2:4] for name, histogram in collector.histogram_dict.items()},
        "static-percentile": collector.compute_percentile,
        "static-entropy": collector.compute_entropy,
        "static-mse": lambda: {
            name: least_error(*histogram[:4]) for name, histogram in collector.histogram_dict.items()
        },
    }
    return {
        name: (np.asarray(values[0], np.float32), np.asarray(values[1], np.float32))
        for name, values in choose[method]().items()
    }


def least_error(histogram: np.ndarray, edges: np.ndarray, low: float, high: float) -> tuple[float, float]:
    """Returns the part of a tensor's range [low, high] that, in 255 steps, gives its values back with the least
    mean square error: what lies outside is cut off, what lies inside is rounded.

    Args:
        histogram: numbers of values between `edges`.
    """
    centers = (edges[:-1] + edges[1:]) / 2
    best, chosen = np.inf, (low, high)
    for share in np.linspace(1.0, 0.2, 81):
        first, last = min(0.0, share * low), max(0.0, share * high)
        step = (last - first) / 255 or 1.0
        back = np.clip(np.round((centers - first) / step), 0, 255) * step + first
        error = float((histogram * (back - centers) ** 2).sum())
        if error < best:
            best, chosen = error, (first, last)
    return chosen


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Keeps ONNX Runtime's advice back, which it prints and logs."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)
