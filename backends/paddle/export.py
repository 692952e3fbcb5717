"""Models of paddlenlp as ONNX files, and as Paddle's own for inference."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import paddle
import paddle.inference
import paddle.nn.functional as F

from backends.files import InputError
from backends.interface import ONNX_INPUTS, ONNX_OPSET

if TYPE_CHECKING:
    from backends.packed import Layer
    from backends.paddle.models import PaddleModel


def export_onnx(model: PaddleModel, path: Path) -> None:
    """`backends.interface.Model.export_onnx`, by paddle2onnx.

    Raises:
        InputError: paddle2onnx is not installed; there is none for Python 3.13.
    """
    try:
        import paddle2onnx
    except ModuleNotFoundError as error:
        raise InputError(
            "--backend paddle: paddle2onnx is not installed, and has no build for Python 3.13; --backend torch writes "
            "the same file from the same folder, as does Python 3.10 to 3.12"
        ) from error

    with tempfile.TemporaryDirectory() as folder, _silenced():
        save_inference_model(model, Path(folder) / "model")
        paddle2onnx.export(f"{folder}/model.json", f"{folder}/model.pdiparams", str(path), opset_version=ONNX_OPSET)


@contextmanager
def _silenced() -> Iterator[None]:
    """Without what Paddle's and paddle2onnx's C++ write to both outputs, names of temporary files among it."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        for number in (1, 2):
            os.dup2(nowhere, number)
        yield
    finally:
        for number, before in zip((1, 2), kept):
            os.dup2(before, number)
        for descriptor in (nowhere, *kept):
            os.close(descriptor)


def save_inference_model(model: PaddleModel, prefix: Path) -> None:
    """Writes what Paddle Inference loads, ``<prefix>.json`` and ``<prefix>.pdiparams``."""
    inputs = [paddle.static.InputSpec([None, None], "int64", name) for name in ONNX_INPUTS]
    paddle.jit.save(PaddedModel(model), str(prefix), input_spec=inputs)


class PaddedModel(paddle.nn.Layer):
    """A model on padded batches; classifiers compute the last layer for [CLS] alone."""

    def __init__(self, model: PaddleModel) -> None:
        super().__init__()
        self.module, self.encoder, self.head, self.parts = model.module, model.encoder, model.head, model.layers
        words = self.encoder.embeddings.word_embeddings
        if words._padding_idx is not None:  # for which paddle2onnx multiplies by a second table of this size
            table = words.weight.numpy()
            table[words._padding_idx] = 0.0
            words.weight.set_value(table)
            words._padding_idx = None
        if self.head == "sequence_classification":
            heads, size, _ = self.parts[-1].shape
            columns = paddle.eye(heads).repeat_interleave(size, axis=1)
            self.register_buffer("columns", columns)  # of each head
            self.register_buffer("keys", self.encoder.encoder.layers[-1].self_attn.k_proj.weight.t())
        self.eval()

    def forward(self, input_ids, token_type_ids, attention_mask):
        # ERNIE's task is 0, which the libraries would make as a constant of the batch's shape.
        task = {"task_type_ids": token_type_ids * 0} if getattr(self.encoder.embeddings, "use_task_id", False) else {}
        x = self.encoder.embeddings(input_ids=input_ids, token_type_ids=token_type_ids, **task)
        bias = (1.0 - attention_mask.astype(x.dtype)).unsqueeze([1, 2]) * -10000.0
        *layers, last = self.parts
        for layer in layers:
            x = _layer(layer, x, bias)
        if self.head == "sequence_classification":
            return self.module.classifier(self.encoder.pooler(self._layer_of_first(x, bias)))
        x = _layer(last, x, bias)
        if self.head == "question_answering":
            return self.module.classifier(x).unbind(-1)
        if self.head == "token_classification":
            return self.module.classifier(x)
        return x, self.encoder.pooler(x)

    def _layer_of_first(self, x, bias):
        """The last layer's output of each sequence's first token, [B, 1, D], by fewer products; `backends.torch.export`
        explains them."""
        layer, value, first = self.parts[-1], self.encoder.encoder.layers[-1].self_attn.v_proj, x[:, :1]
        q = layer.query(first) * _scale(layer.shape[1], x.dtype) * self.columns
        scores = paddle.matmul(x, q @ self.keys, transpose_y=True).transpose([0, 2, 1]) + bias[:, 0]
        context = (F.softmax(scores) @ x) @ value.weight * self.columns
        return layer.finish(first, context.sum(1, keepdim=True) + value.bias)


def _layer(layer: Layer, x: paddle.Tensor, bias: paddle.Tensor) -> paddle.Tensor:
    """A layer's output, of its input x [B, L, D]."""
    heads, size, _ = layer.shape

    def split(y):  # without -1, which of no rows cannot be told
        return y.reshape([0, 0, heads, size]).transpose([0, 2, 1, 3])

    q, k, v = layer.project(x, x)
    q, k, v = split(q * _scale(size, q.dtype)), split(k), split(v)
    scores = paddle.matmul(q, k, transpose_y=True) + bias
    context = (F.softmax(scores) @ v).transpose([0, 2, 1, 3]).reshape([0, 0, heads * size])
    return layer.finish(x, context)


def _scale(size: int, dtype: paddle.dtype) -> paddle.Tensor:
    return paddle.full([1], size**-0.5, dtype)  # a number would be written with its own shape of what it multiplies
