"""``python -m export triton``: a model repository for Triton Inference Server."""

from __future__ import annotations

import shlex
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from onnx import TensorProto

from backends.files import InputError
from export.admission import Put
from export.model import OnnxModel, public_name
from programs.console import say

TYPES: Mapping[int, str] = {
    TensorProto.INT64: "TYPE_INT64",
    TensorProto.FLOAT: "TYPE_FP32",
    TensorProto.STRING: "TYPE_STRING",
}
"""ONNX's types -> Triton's."""


@dataclass
class TritonArguments:
    """A model repository for Triton Inference Server."""

    model: str = field(kw_only=True)
    """the ONNX file"""
    output: str = field(kw_only=True)
    """the repository's folder, which may hold other models"""
    name: str | None = None
    """the model's name; without, the file's"""
    device: Literal["cpu", "gpu"] = "cpu"
    """where Triton runs it"""
    instances: int = 1
    """copies that run side by side, on each GPU if there are any"""
    threads: int = 0
    """threads of an operator; 0 takes as many as there are cores"""
    max_batch_size: int = 64
    """texts that are computed together"""
    max_delay_us: int = 1000
    """microseconds that a text waits for company"""
    max_queue_size: int = 1024
    """requests that may wait"""

    def __post_init__(self) -> None:
        for name in ("instances", "max_batch_size", "max_queue_size"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} {getattr(self, name)}: must be at least 1")
        if min(self.threads, self.max_delay_us) < 0:
            raise InputError(f"--threads {self.threads} --max_delay_us {self.max_delay_us}: must not be negative")


def triton(arguments: TritonArguments) -> Path:
    """Writes ``<output>/<name>/config.pbtxt`` and ``<output>/<name>/1/model.onnx``.

    Raises:
        InputError: the file is not one of ours, or the repository has a model of that name.
    """
    model = OnnxModel(Path(arguments.model))
    name = public_name(arguments.name, model.path)
    folder = Path(arguments.output) / name
    if folder.exists():
        raise InputError(f"{folder}: is there already; give another --name, or remove it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".") as temporary:
        model_folder = Path(temporary) / name
        (model_folder / "1").mkdir(parents=True)
        shutil.copyfile(model.path, model_folder / "1" / "model.onnx")
        (model_folder / "config.pbtxt").write_text(configuration(model, name, arguments), encoding="utf-8")
        model_folder.rename(folder)
    say(f"{folder}: to serve it, where Triton Inference Server is installed:")
    say(f"    tritonserver --model-repository={shlex.quote(str(folder.parent))}")
    return folder


def configuration(model: OnnxModel, name: str, arguments: TritonArguments) -> str:
    """Returns the text of a ``config.pbtxt``: dynamic batching with a bounded queue, instances, threads."""
    parts = [
        f'name: "{name}"',
        'backend: "onnxruntime"',
        f"max_batch_size: {arguments.max_batch_size}",
        *(_entry("input", *put) for put in model.inputs.items()),
        *(_entry("output", *put) for put in model.outputs.items()),
        f"""dynamic_batching {{
  max_queue_delay_microseconds: {arguments.max_delay_us}
  default_queue_policy {{ max_queue_size: {arguments.max_queue_size} }}
}}""",
        f"instance_group [ {{ count: {arguments.instances} kind: KIND_{arguments.device.upper()} }} ]",
    ]
    if arguments.threads:
        parts.append(f'parameters {{ key: "intra_op_thread_count" value {{ string_value: "{arguments.threads}" }} }}')
    return "\n".join(parts) + "\n"


def _entry(kind: str, name: str, put: Put) -> str:
    """Returns the entry of an input or output. Triton adds the batch's axis, and wants at least one beside it."""
    sizes = list(put.shape[1:])
    reshape = "" if sizes else " reshape { shape: [ ] }"
    return f'{kind} [ {{ name: "{name}" data_type: {TYPES[put.type]} dims: {sizes or [1]}{reshape} }} ]'
