"""Models of paddlenlp, run layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import paddle
import paddle.nn.functional as F
import paddlenlp.transformers
from paddle.autograd import PyLayer
from paddlenlp.transformers.ppminilm.configuration import PPMiniLMConfig

from backends.files import InputError
from backends.interface import QKV, Batch, Head, Weights, check_shape, check_weights
from backends.packed import Packed, PackedModel
from backends.pretrained import CLASS_SUFFIXES, TIED, from_paddle_name, is_transposed

if TYPE_CHECKING:
    from backends.paddle.core import PaddleBackend

# paddlenlp's RobertaModel starts RoBERTa-wwm-ext's positions at 1, where the model was trained from 0: BERT it is.
FAMILIES = {"bert": "Bert", "roberta": "Bert", "ernie": "Ernie", "ppminilm": "PPMiniLM"}


class PaddleModel(PackedModel):
    backend: PaddleBackend

    def __init__(
        self,
        backend: PaddleBackend,
        config: Mapping[str, Any],
        weights: Weights | None,
        head: Head | None,
        trainable: bool,
    ) -> None:
        super().__init__(backend, config, head)
        family = FAMILIES[config["model_type"]]
        if self.settings["layer_norm_eps"] > 1e-3:
            told = self.settings["layer_norm_eps"]
            raise InputError(f"config.json: layer_norm_eps {told}: Paddle's LayerNorm takes 0.001 at most")
        library = paddlenlp.transformers
        if not hasattr(library, family + CLASS_SUFFIXES[head]):
            family = "Bert"  # what PPMiniLM is, whose heads are not all there
        config_class = PPMiniLMConfig if family == "PPMiniLM" else getattr(library, f"{family}Config")
        self.module = getattr(library, family + CLASS_SUFFIXES[head])(config_class(**self.settings))
        self.module.eval()
        for layer in self.module.sublayers():
            if isinstance(layer, paddle.nn.LayerNorm):
                layer._epsilon = self.settings["layer_norm_eps"]  # which paddlenlp's ERNIE does not read
        self.encoder = getattr(self.module, self.module.base_model_prefix, self.module)
        if weights is not None:
            check_weights(self.load_weights(weights))
        if not trainable:
            for layer in self.module.sublayers(include_self=True):
                for parameter in layer.parameters(include_sublayers=False):
                    parameter.stop_gradient = True
                if isinstance(layer, paddle.nn.Linear) and backend.precision != "float32":
                    layer.to(dtype=backend.precision)

    def _embed(self, packed: Packed) -> paddle.Tensor:
        return self.encoder.embeddings(
            input_ids=packed.input_ids[None],
            token_type_ids=packed.token_type_ids[None],
            position_ids=packed.position_ids[None],
        )[0]

    def _project(self, layer: int, x: paddle.Tensor, asking: paddle.Tensor) -> QKV:
        attention = self.encoder.encoder.layers[layer].self_attn
        return QKV(linear(attention.q_proj, asking), linear(attention.k_proj, x), linear(attention.v_proj, x))

    def _layer(self, layer: int, x: paddle.Tensor, qkv: QKV, packed: Packed) -> paddle.Tensor:
        modules = self.encoder.encoder.layers[layer]
        attention = modules.self_attn
        dropout = attention.dropout if attention.training else 0.0
        attend = attend_runs if x.place.is_cpu_place() and not packed.padded else attend_padded
        context = attend(qkv, packed, attention.num_heads, dropout)
        x = modules.norm1(x + modules.dropout1(linear(attention.out_proj, context)))
        inner = modules.dropout(modules.activation(linear(modules.linear1, x)))
        return modules.norm2(x + modules.dropout2(linear(modules.linear2, inner)))

    def masked_lm_loss(self, batch: Batch, positions: np.ndarray, labels: np.ndarray) -> paddle.Tensor:
        rows = self.backend.tensor(batch.rows_of(positions))
        logits = self.module.cls(self.hidden_states(batch)[rows])
        return F.cross_entropy(logits.astype("float32"), self.backend.tensor(labels))

    def logits(self, batch: Batch) -> paddle.Tensor:
        if self.head == "sequence_classification":
            x = self.encoder.pooler(self.first_states(batch).unsqueeze(1))
        else:
            x = self.hidden_states(batch)
        if self.head != "question_answering":
            x = self.module.dropout(x)
        return self.module.classifier(x)

    def train(self, mode: bool = True) -> None:
        self.module.train() if mode else self.module.eval()

    def weights(self) -> dict[str, np.ndarray]:
        weights = {}
        for name, tensor in self._named(self.module.state_dict()):
            array = self.backend.numpy(tensor.astype("float32"))
            weights[name] = np.ascontiguousarray(array.T) if is_transposed(name, array) else array
        # An Embedding with a padding index gives zeros for it, whatever stands in that row.
        if (padding := self.encoder.embeddings.word_embeddings._padding_idx) is not None:
            weights["embeddings.word_embeddings.weight"][padding] = 0.0
        return weights

    def load_weights(self, weights: Weights) -> list[str]:
        missing = []
        for name, tensor in self._named(self.module.state_dict()):
            if name not in weights:
                missing.append(name)
                continue
            array = weights[name]
            array = array.T if is_transposed(name, array) else array
            check_shape(name, array.shape, tensor.shape)
            tensor.set_value(np.ascontiguousarray(array, dtype=np.float32))
        return missing

    def export_onnx(self, path: Path) -> None:
        from backends.paddle.export import export_onnx

        export_onnx(self, path)

    def named_parameters(self) -> list[tuple[str, paddle.Tensor]]:
        """Trainable weights under the names of `backends.interface`."""
        return self._named(dict(self.module.named_parameters()))

    def _named(self, tensors: Mapping[str, paddle.Tensor]) -> list[tuple[str, paddle.Tensor]]:
        prefix = f"{self.module.base_model_prefix}."
        named = [(from_paddle_name(name.removeprefix(prefix), self.head), tensor) for name, tensor in tensors.items()]
        return [(name, tensor) for name, tensor in named if name not in TIED]


class CPULinear(PyLayer):
    """x W + b. Paddle's own adds b, and sums its gradient, at a fraction of the speed of a matrix product."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return x @ weight + bias

    @staticmethod
    def backward(ctx, g):
        x, weight = ctx.saved_tensor()
        ones = paddle.ones([1, g.shape[0]], dtype=g.dtype)
        return (
            paddle.matmul(g, weight, transpose_y=True),
            paddle.matmul(x, g, transpose_x=True),
            (ones @ g).reshape([-1]),
        )


def linear(layer: paddle.nn.Linear, x: paddle.Tensor) -> paddle.Tensor:
    return CPULinear.apply(x, layer.weight, layer.bias) if x.place.is_cpu_place() else layer(x)


def attend_runs(qkv: QKV, packed: Packed, heads: int, dropout: float) -> paddle.Tensor:
    """Multi-head attention over [T, D], equally long neighbours at a time."""
    contexts = []
    sizes = packed.asked(qkv.q), packed.sizes, packed.sizes
    for (count, _), *run in zip(packed.runs, *(x.split(of) for x, of in zip(qkv, sizes))):
        context = _attend(*(x.reshape([count, x.shape[0] // count, heads, -1]) for x in run), None, dropout)
        contexts.append(context.reshape([run[0].shape[0], -1]))
    return paddle.concat(contexts)


def attend_padded(qkv: QKV, packed: Packed, heads: int, dropout: float) -> paddle.Tensor:
    """The same, all sequences at once, padded: more arithmetic, fewer operations."""
    count, length = packed.shape

    def spread(x: paddle.Tensor) -> paddle.Tensor:
        if packed.rows is not None and x.shape[0] == packed.tokens:
            x = paddle.zeros([count * length, x.shape[1]], dtype=x.dtype).scatter(packed.rows, x)
        return x.reshape([count, x.shape[0] // count, heads, -1])

    context = _attend(*(spread(x) for x in qkv), packed.mask, dropout).flatten(0, 1).flatten(1)
    return context if context.shape[0] == qkv.q.shape[0] else context.gather(packed.rows)


def _attend(
    q: paddle.Tensor, k: paddle.Tensor, v: paddle.Tensor, mask: paddle.Tensor | None, dropout: float
) -> paddle.Tensor:
    """softmax(Q K^T / sqrt(d)) V; all [count, length, heads, d]."""
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    scores = paddle.matmul(q * q.shape[-1] ** -0.5, k, transpose_y=True)
    if mask is not None:
        scores = paddle.where(mask, scores, paddle.full([], -1e4, dtype=scores.dtype))
    probabilities = F.softmax(scores)
    if dropout:
        probabilities = F.dropout(probabilities, dropout)
    return (probabilities @ v).swapaxes(1, 2)
