"""Schemes of quantization: how a float32 file becomes a smaller, faster one."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, cast, get_args

import onnx
from onnxruntime.quantization import QuantType, quantize_dynamic

from export.calibration import Calibration, ranges
from export.int8 import IntegerGraph, factors, products, shrink_embeddings
from export.model import OnnxModel
from text.features import Features

Method = Literal["token", "static-min-max", "static-percentile", "static-entropy", "static-mse", "dynamic", "float16"]
METHODS: tuple[Method, ...] = get_args(Method)
MOST, MOST_REDUCED = 127, 64
"""The largest number that a weight becomes, of 8 bits and of 7."""
CPU = Path("/proc/cpuinfo")


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

    @property
    def calibration(self) -> Calibration:
        """How a static method chooses ranges."""
        return cast(Calibration, self.method)

    def __str__(self) -> str:
        return f"{self.method}, {self.texts} texts" if self.texts else self.method


def write_quantized(source: OnnxModel, scheme: Scheme, texts: Features | None, output: Path) -> None:
    """Writes a quantized file with the source's inputs, outputs and metadata.

    In INT8 weights are signed and symmetric, inputs of products unsigned. ``token`` takes the range of each token's
    values, static methods fix the ranges that `texts` show: an answer does not depend on what is computed with it.
    ``dynamic`` takes the range of each tensor over all that is computed together. All keep embeddings in INT8, with a
    scale for each token.
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
        written = onnx.load(output)
    else:
        written = onnx.load(source.path, load_external_data=False)
        nodes = products(written, source.description.head is not None)
        known = None
        if scheme.method != "token":
            assert texts is not None
            with _quietly():
                wanted = {node.input[0] for node in nodes} | factors(written).keys()
                known = ranges(written, sorted(wanted), scheme.calibration, texts)
        most = MOST_REDUCED if scheme.reduce_range else MOST
        IntegerGraph(written, scheme.per_channel, most).write(nodes, known)
    if scheme.method != "float16":
        shrink_embeddings(written)
    description = replace(source.description, quantized=str(scheme))
    onnx.helper.set_model_props(written, description.metadata())
    onnx.save(written, output)


def _float16(model: onnx.ModelProto) -> onnx.ModelProto:
    """Returns the model with weights and arithmetic in half precision; outputs stay float32."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    with _quietly():
        return convert_float_to_float16(model, keep_io_types=True, disable_shape_infer=True)


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
