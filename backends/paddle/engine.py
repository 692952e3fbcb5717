"""What Paddle and paddlenlp offer for answering texts, to be measured beside ONNX Runtime."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import paddlenlp

from backends.files import InputError
from backends.interface import ONNX_INPUTS, Batch, Precision, Weights
from backends.paddle.core import PaddleBackend
from backends.paddle.export import save_inference_model


def classifier(config: Mapping[str, Any], weights: Weights, precision: Precision) -> Callable[[Batch], np.ndarray]:
    """A classifier as Paddle Inference runs it on a CPU, with OMP_NUM_THREADS threads: a function from a padded batch
    to float32 logits [B, classes]."""
    model = PaddleBackend("cpu").model(config, weights, "sequence_classification", trainable=False)
    with tempfile.TemporaryDirectory() as folder:
        save_inference_model(model, Path(folder) / "model")
        return _load(Path(folder) / "model", precision)


def python_tokenizer(folder: Path) -> Callable[[Sequence[str], Sequence[str] | None, int], Batch]:
    """The library's BertTokenizer, in Python, of a model folder: a function of texts, second texts
    and how many tokens are kept of a pair, to a batch padded to the longest."""
    tokenizer = paddlenlp.transformers.BertTokenizer.from_pretrained(str(folder))

    def encode(texts: Sequence[str], pairs: Sequence[str] | None, max_seq_length: int) -> Batch:
        encoded = tokenizer(
            list(texts),
            None if pairs is None else list(pairs),
            max_length=max_seq_length,
            truncation=True,
            padding=True,
            return_attention_mask=True,
        )
        return Batch(*(np.array(encoded[name], np.int64) for name in ONNX_INPUTS))

    return encode


def _load(prefix: Path, precision: Precision) -> Callable[[Batch], np.ndarray]:
    """Paddle Inference of a saved model on a CPU, through oneDNN: a function from a padded batch to the first output.

    Raises:
        InputError: another precision than float32 and bfloat16.
    """
    config = paddle.inference.Config(f"{prefix}.json", f"{prefix}.pdiparams")
    config.disable_gpu()
    config.disable_glog_info()
    config.set_cpu_math_library_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    config.enable_mkldnn()
    if precision == "bfloat16":
        config.enable_mkldnn_bfloat16()
    elif precision != "float32":
        raise InputError(f"{precision}: Paddle Inference has float32 and bfloat16 on a CPU")
    predictor = paddle.inference.create_predictor(config)
    inputs = [predictor.get_input_handle(name) for name in ONNX_INPUTS]
    output = predictor.get_output_handle(predictor.get_output_names()[0])

    def run(batch: Batch) -> np.ndarray:
        for handle, array in zip(inputs, batch[:3]):
            handle.reshape(array.shape)
            handle.copy_from_cpu(array)
        predictor.run()
        return output.copy_to_cpu()

    return run
