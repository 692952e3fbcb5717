"""``python -m export quantize``: INT8 and FP16 from a float32 ONNX file."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
from onnx import checker
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)

from backends.interface import ONNX_INPUTS, InputError
from backends.pretrained import atomically
from export.model import OnnxModel
from text.features import Features
from training.log import say

CALIBRATIONS = {
    "min-max": CalibrationMethod.MinMax,
    "entropy": CalibrationMethod.Entropy,
    "percentile": CalibrationMethod.Percentile,
}
FLAGS = Path("/proc/cpuinfo")


def has_vnni(flags: Path = FLAGS) -> bool:
    """Whether the processor adds products of 8 bits in 32. Others add pairs of them in 16 bits first, which
    saturate unless weights have 7 bits."""
    words = flags.read_text().split() if flags.exists() else []
    return "avx512_vnni" in words or "avx_vnni" in words
