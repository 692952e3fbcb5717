"""Models of transformers as ONNX files."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from backends.interface import ONNX_INPUTS, ONNX_OPSET, ONNX_OUTPUTS

if TYPE_CHECKING:
    from backends.packed import Layer
    from backends.torch.models import TorchModel


def export_onnx(model: TorchModel, path: Path) -> None:
    """`backends.interface.Model.export_onnx`, by PyTorch's older exporter: half a second instead of a
    quarter of a minute, the same operators, and no paths of this machine in the file."""
    example = torch.ones(2, 8, dtype=torch.int64, device=model.backend.device)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            PaddedModel(model),
            (example, 0 * example, example),
            str(path),
            input_names=list(ONNX_INPUTS),
            output_names=list(ONNX_OUTPUTS[model.head]),
            dynamic_axes={name: {0: "batch", 1: "length"} for name in ONNX_INPUTS},
            opset_version=ONNX_OPSET,
            dynamo=False,
        )


class PaddedModel(torch.nn.Module):
    """A model on padded batches; classifiers compute the last layer for [CLS] alone."""

    def __init__(self, model: TorchModel) -> None:
        super().__init__()
        self.module, self.encoder, self.head, self.layers = model.module, model.encoder, model.head, model.layers
        if self.head == "sequence_classification":
            heads, size, _ = self.layers[-1].shape
            self.register_buffer("columns", torch.eye(heads).repeat_interleave(size, 1))  # of each head
        self.eval()

    def forward(self, input_ids, token_type_ids, attention_mask):
        # ERNIE's task is 0, which the libraries would make as a constant of the batch's shape.
        task = {"task_type_ids": token_type_ids * 0} if getattr(self.encoder.embeddings, "use_task_id", False) else {}
        x = self.encoder.embeddings(input_ids=input_ids, token_type_ids=token_type_ids, **task)
        bias = (1.0 - attention_mask[:, None, None, :].to(x.dtype)) * -10000.0
        *layers, last = self.layers
        for layer in layers:
            x = _layer(layer, x, bias)
        if self.head == "sequence_classification":
            return self.module.classifier(self.encoder.pooler(_layer_of_first(last, x, bias, self.columns)))
        x = _layer(last, x, bias)
        if self.head == "question_answering":
            return self.module.qa_outputs(x).unbind(-1)
        if self.head == "token_classification":
            return self.module.classifier(x)
        return x, self.encoder.pooler(x)


def _layer(layer: Layer, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """A layer's output, of its input x [B, L, D]."""
    heads, size, _ = layer.shape

    def split(y: torch.Tensor) -> torch.Tensor:  # without -1, which of no rows cannot be told
        return y.view(*y.shape[:2], heads, size).transpose(1, 2)

    q, k, v = layer.project(x, x)
    q, k, v = split(q * size**-0.5), split(k), split(v)
    scores = q @ k.transpose(-1, -2) + bias
    context = (scores.softmax(-1) @ v).transpose(1, 2).reshape(*x.shape[:2], heads * size)
    return layer.finish(x, context)


def _layer_of_first(layer: Layer, x: torch.Tensor, bias: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """A layer's output for each sequence's first token, [B, 1, D].

    For one query it is less work to multiply the weights of keys by the query, and those of values by what the heads
    attend to of x, than to project all of x: q (x K)^T = (q K^T) x^T and p (x V) = (p x) V. The bias of keys adds the
    same to all scores of a query. x is the first factor of scores, since ONNX Runtime groups sums by the width of the
    second: an answer would depend on the length of the texts beside it.

    Args:
        columns: 1 where a column of queries, keys and values is the head's, else 0 [heads, W].
    """
    first = x[:, :1]
    q = layer.query(first) * layer.shape[1] ** -0.5 * columns
    scores = (x @ (q @ layer.key.weight).transpose(1, 2)).transpose(1, 2) + bias[:, 0]
    context = (scores.softmax(-1) @ x) @ layer.value.weight.T * columns
    return layer.finish(first, context.sum(1, keepdim=True) + layer.value.bias)
