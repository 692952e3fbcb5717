"""The deployments that are compared: a model's files, each with a runtime and a tokenizer."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import onnx
import onnxruntime

import backends
from backends.files import InputError
from backends.interface import Head
from backends.shape import LayerShape
from export.benchmark.arguments import BenchmarkArguments
from export.benchmark.peers import converted_for_ctranslate2, quantized_by_nncf
from export.benchmark.processes import Deployment, Engine
from export.convert import OnnxArguments, export, max_seq_length
from export.model import OnnxModel
from export.quantize import STATIC, spread
from export.runtimes import installed
from export.schemes import Scheme, has_vnni, write_quantized
from export.tokenizer_graph import with_tokenizer
from programs.console import say
from text.folder import ModelFolder, write_folder

CALIBRATED = 128
"""Texts that static methods look at."""
BASE = "BERT-base float32"
"""Title of the baseline, whose weights are random."""
BASE_SHAPE = "12x768"
FRAMEWORKS: dict[Engine, str] = {"torch": "PyTorch", "paddle": "Paddle Inference"}
TITLES = (
    BASE,
    f"{BASE}, in parts",
    "ONNX Runtime float32, as it comes",
    "ONNX Runtime INT8 dynamic, as it comes",
    *(f"ONNX Runtime {kind}" for kind in ("float32", "float16", "INT8 dynamic", "INT8 token", "INT8 static")),
    *(f"OpenVINO {kind}" for kind in ("float32", "bfloat16", "INT8 static", "INT8 static and bfloat16")),
    *(f"OpenVINO INT8 by NNCF{beside}" for beside in ("", " and bfloat16")),
    "CTranslate2 INT8",
    *(f"{name} {precision}" for name in FRAMEWORKS.values() for precision in ("float32", "bfloat16")),
)
"""Titles of deployments on a CPU; each has a colour of its own in every plot."""
ACCELERATORS = {"CUDAExecutionProvider": "CUDA", "TensorrtExecutionProvider": "TensorRT"}


def available_providers() -> list[str]:
    """Returns the execution providers of the installed ONNX Runtime."""
    return list(onnxruntime.get_available_providers())


def prepare(
    arguments: BenchmarkArguments, folder: Path, temporary: Path
) -> tuple[list[Deployment], list[Any], list[str]]:
    """Writes the files of all deployments into `temporary`.

    Returns:
        The deployments; the task's examples; the labels of the examples.
    """
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
    static: list[Scheme] = []
    if arguments.task_name is not None:
        task, examples = arguments.read(source, "dev", "answering")
        if arguments.examples:
            examples = examples[:: max(1, len(examples) // arguments.examples)][: arguments.examples]
        if any(example.label is None for example in examples):
            raise InputError(f"--task_name {arguments.task_name}: its dev set has no labels")
        truth = [(task.labels or ())[example.label] for example in examples]
        static = [Scheme(STATIC, CALIBRATED)]
    labels = source.description.labels
    pairs = examples[0].pair is not None if examples else bool(source.description.pairs)
    schemes = [
        replace(scheme, reduce_range=not has_vnni())
        for scheme in (Scheme("float16"), Scheme("dynamic"), Scheme("token"), *static)
    ]
    files = {"float32": float32}
    training = arguments.read(source, "train", "calibration")[1] if static else []
    for scheme in schemes:
        title = {"float16": "float16"}.get(scheme.method, f"INT8 {scheme.method.partition('-')[0]}")
        files[title] = temporary / f"{scheme.method}.onnx"
        write_quantized(source, scheme, spread(source, training, scheme.texts), files[title])
    deployments = [
        Deployment(BASE, "onnxruntime", base_folder, base, labels, limit, tokenizing="python", trained=False),
        Deployment(f"{BASE}, in parts", "onnxruntime", base_folder, base, labels, limit, trained=False),
    ]

    def wanted(row: str) -> bool:
        return not arguments.only or any(word in row for word in arguments.only)

    def add(title: str, file: Path, runtime: Engine = "onnxruntime", **settings: Any) -> None:
        deployments.append(Deployment(title, runtime, folder, file, labels, limit, trained=trained, **settings))

    for title in ("float32", "INT8 dynamic"):
        add(f"ONNX Runtime {title}, as it comes", files[title], tokenizing="python")
    for title, file in files.items():
        inside = file.with_name(f"{file.stem}-text.onnx")
        onnx.save(with_tokenizer(onnx.load(file), source.tokenizer, labels, pairs, limit), inside)
        add(f"ONNX Runtime {title}", file)
        add(f"ONNX Runtime {title}", inside, tokenizing="in-graph")
        for provider, name in ACCELERATORS.items():
            if provider in available_providers():
                add(f"ONNX Runtime, {name}, {title}", file, provider=provider)
    if "openvino" in installed():
        features = spread(source, training, CALIBRATED if static else 0)
        by_nncf = None
        rows = [f"OpenVINO INT8 by NNCF{beside}, tokenizers" for beside in ("", " and bfloat16")]
        if features is not None and any(map(wanted, rows)) and find_spec("nncf") is not None:
            by_nncf = quantized_by_nncf(float32, features, temporary / "nncf")
        for precision in ("float32", "bfloat16"):
            add(f"OpenVINO {precision}", float32, "openvino", precision=precision)
            beside = "" if precision == "float32" else f" and {precision}"
            if static:
                add(f"OpenVINO INT8 static{beside}", files["INT8 static"], "openvino", precision=precision)
            if by_nncf is not None:
                add(f"OpenVINO INT8 by NNCF{beside}", by_nncf, "nncf", precision=precision)
    convertible = find_spec("ctranslate2") is not None and not backends.missing_packages("torch")
    if convertible and wanted("CTranslate2 INT8, tokenizers"):
        try:
            add("CTranslate2 INT8", converted_for_ctranslate2(folder, temporary / "ctranslate2"), "ctranslate2")
        except Exception as error:  # its own, for each kind of model that it does not know
            say(f"CTranslate2 does not convert {folder} ({' '.join(str(error).split())[:100]}); not measured")
    for runtime, name in FRAMEWORKS.items():
        for precision in ("float32", "bfloat16") if not backends.missing_packages(runtime) else ():
            add(f"{name} {precision}", float32, runtime, precision=precision)
    kept = [deployment for deployment in deployments if deployment.title == BASE or wanted(deployment.row)]
    return kept, examples, truth


def _random_model(like: Path, shape: str, folder: Path) -> Path:
    """Writes a folder of a model with random weights, of a shape, with the vocabulary and classes of another."""
    layers, _, width = shape.partition("x")
    if not (layers.isdigit() and width.isdigit() and int(layers) and int(width) and int(width) % 64 == 0):
        raise InputError(f"--shape {shape}: expected layers x width, 6x768 say, the width a multiple of 64")
    source = ModelFolder.find(like, "model")
    random_shape = replace(
        source.shape,
        positions=512,
        hidden=int(width),
        layers=(LayerShape(int(width) // 64, 64, 4 * int(width)),) * int(layers),
    )
    config = {**source.config, **random_shape.settings()}
    backend = backends.load("auto", "cpu")
    backend.seed(0)
    folder.mkdir()
    head: Head = "sequence_classification"
    write_folder(folder, config, source.tokenizer, backend.model(config, None, head).weights(), head)
    return folder
