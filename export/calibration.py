"""Ranges of a graph's tensors, from what they are on texts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import onnx
import onnxruntime
from onnxruntime.quantization.calibrate import HistogramCollector

from backends.interface import ONNX_INPUTS
from text.features import Features

Calibration = Literal["static-min-max", "static-percentile", "static-entropy", "static-mse"]
BINS, ENTROPY_BINS = 2048, 512
"""Bins of the histogram of a tensor's values; the least entropy takes the square of their number in time."""
PERCENTILE = 99.99
"""Percentage of a tensor's values that static-percentile keeps in range."""


def ranges(
    model: onnx.ModelProto, wanted: Sequence[str], method: Calibration, texts: Features
) -> dict[str, tuple[float, float]]:
    """Returns the range of each tensor's values over all texts, one at a time: no padding is among them."""
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    outputs = {output.name for output in model.graph.output}
    watched.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in wanted if name not in outputs
    )
    session = onnxruntime.InferenceSession(watched.SerializeToString(), providers=["CPUExecutionProvider"])
    bins = ENTROPY_BINS if method == "static-entropy" else BINS
    collector = HistogramCollector("entropy", False, bins, 128, PERCENTILE, "same")
    for i in range(len(texts)):
        feed = dict(zip(ONNX_INPUTS, texts.batch(np.array([i]))[:3]))
        values: Any = session.run(list(wanted), feed)
        collector.collect(dict(zip(wanted, values)))
    choose: Mapping[Calibration, Callable[[], Any]] = {
        "static-min-max": lambda: {name: histogram[2:4] for name, histogram in collector.histogram_dict.items()},
        "static-percentile": collector.compute_percentile,
        "static-entropy": collector.compute_entropy,
        "static-mse": lambda: {
            name: least_error(*histogram[:4]) for name, histogram in collector.histogram_dict.items()
        },
    }
    return {name: (float(low), float(high)) for name, (low, high, *_) in choose[method]().items()}


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
