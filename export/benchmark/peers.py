"""Other tools' INT8: what they make of the same model, and what computes it."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from backends.interface import ONNX_INPUTS, Batch, Precision
from export.runtimes import OpenVino
from text.features import Features
from text.folder import ModelFolder


def quantized_by_nncf(float32: Path, texts: Features, output: Path) -> Path:
    """Writes what NNCF makes of a float32 file, with its settings for transformers, in OpenVINO's own format; returns
    the file of its weights, which has the graph beside it."""
    os.environ.setdefault("NNCF_CI", "1")  # or it reports its use to its makers
    import nncf
    import openvino

    logging.getLogger("nncf").setLevel(logging.ERROR)
    batches = [dict(zip(ONNX_INPUTS, texts.batch(np.array([i]))[:3])) for i in range(len(texts))]
    model = nncf.quantize(
        openvino.Core().read_model(float32),
        nncf.Dataset(batches),
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(texts),
    )
    openvino.save_model(model, output.with_suffix(".xml"), compress_to_fp16=False)
    return output.with_suffix(".bin")


class NncfModel(OpenVino):
    """A file that `quantized_by_nncf` wrote, in place of the ONNX file that it was made of."""

    def __init__(self, content: bytes, threads: int, file: Path, precision: Precision) -> None:
        self._file = file
        super().__init__(content, threads, precision)

    def _read(self, core: Any, content: bytes) -> Any:
        return core.read_model(self._file.with_suffix(".xml"))


def converted_for_ctranslate2(folder: Path, output: Path) -> Path:
    """Writes what CTranslate2's converter makes of a model's folder, in INT8; returns its largest file."""
    from ctranslate2.converters import TransformersConverter

    TransformersConverter(str(folder)).convert(str(output), quantization="int8")
    return output / "model.bin"


def ctranslate2_classifier(file: Path, folder: ModelFolder, threads: int) -> Callable[[Batch], np.ndarray]:
    """Returns a function that computes a batch's logits: the encoder by CTranslate2, the head, which it does not have,
    here."""
    import ctranslate2

    encoder = ctranslate2.Encoder(str(file.parent), "cpu", compute_type="int8", inter_threads=1, intra_threads=threads)
    weights = folder.weights()
    weight, bias = weights["classifier.weight"].T, weights["classifier.bias"]

    def logits(batch: Batch) -> np.ndarray:
        lengths = batch.attention_mask.sum(axis=1)
        rows = [ids[:length].tolist() for ids, length in zip(batch.input_ids, lengths)]
        types = [ids[:length].tolist() for ids, length in zip(batch.token_type_ids, lengths)]
        pooled = encoder.forward_batch(rows, token_type_ids=types).pooler_output
        return np.array(pooled) @ weight + bias

    return logits
