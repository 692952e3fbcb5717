"""Models of paddlenlp, run layer by layer, and layers of the user's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import paddle
import paddle.nn.functional as F
import paddlenlp.transformers
from paddle.autograd import PyLayer
from paddlenlp.transformers.ppminilm.configuration import PPMiniLMConfig

from backends.adapted import AdaptedModel
from backends.files import InputError
from backends.interface import PROJECTIONS, Head, Trainable, Weights
from backends.joined import Joined
from backends.packed import Layer, Packed, PackedModel
from backends.pretrained import CLASS_SUFFIXES, TIED, from_paddle_name, is_transposed
from backends.shape import LayerShape, check_missing, check_shape

if TYPE_CHECKING:
    from backends.paddle.core import PaddleBackend

# paddlenlp's RobertaModel starts RoBERTa-wwm-ext's positions at 1, where the model was trained from 0: BERT it is.
FAMILIES = {"bert": "Bert", "roberta": "Bert", "ernie": "Ernie", "ppminilm": "PPMiniLM"}


class PaddleModule(Trainable):
    """What every layer does as a model, whatever it computes."""

    backend: PaddleBackend
    module: paddle.nn.Layer

    def train(self, mode: bool = True) -> None:
        self.module.train() if mode else self.module.eval()

    def weights(self) -> dict[str, np.ndarray]:
        weights = {}
        for name, tensor in self._named(self.module.state_dict()):
            array = self.backend.numpy(tensor.astype("float32"))
            weights[name] = np.ascontiguousarray(array.T) if self._is_transposed(name, array) else array
        return weights

    def load_weights(self, weights: Weights) -> list[str]:
        missing = []
        for name, tensor in self._named(self.module.state_dict()):
            if name not in weights:
                missing.append(name)
                continue
            array = weights[name]
            array = array.T if self._is_transposed(name, array) else array
            check_shape(name, array.shape, tensor.shape)
            tensor.set_value(paddle.to_tensor(np.asarray(array, order="C")).astype(tensor.dtype))
        return missing

    def add_projection(self, number: int, weight: np.ndarray, rate: float) -> Callable[[paddle.Tensor], paddle.Tensor]:
        if not hasattr(self.module, "projections"):
            self.module.projections = paddle.nn.LayerDict()
        projection = paddle.nn.Linear(weight.shape[1], weight.shape[0])
        self.module.projections[str(number)] = projection
        name = f"{PROJECTIONS}{number}"
        self.load_weights({f"{name}.weight": weight, f"{name}.bias": np.zeros(len(weight), np.float32)})
        self.rates |= {f"{name}.weight": rate, f"{name}.bias": rate}
        return partial(linear, projection)

    def named_parameters(self) -> list[tuple[str, paddle.Tensor]]:
        """Trainable weights under the names of `backends.interface`."""
        return self._named(dict(self.module.named_parameters()))

    def _named(self, tensors: Mapping[str, paddle.Tensor]) -> list[tuple[str, paddle.Tensor]]:
        """Weights under the names that they have outside."""
        return [*tensors.items()]

    def _is_transposed(self, name: str, array: np.ndarray) -> bool:
        """Whether a weight stands as [in, out] here."""
        owner, _, own = name.rpartition(".")
        layers = dict(self.module.named_sublayers(include_self=True))
        return own == "weight" and isinstance(layers.get(owner), paddle.nn.Linear)


class AdaptedPaddleModel(PaddleModule, AdaptedModel):
    """A layer of the user's."""


class PaddleModel(PaddleModule, PackedModel):
    """A model of paddlenlp."""

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
            epsilon = self.settings["layer_norm_eps"]
            raise InputError(f"config.json: layer_norm_eps {epsilon}: Paddle's LayerNorm takes 0.001 at most")
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
        if not self.shape.even:
            for layer, shape in zip(self.encoder.encoder.layers, self.shape.layers):
                self._resize(layer, shape)
        if weights is not None:
            check_missing(self.load_weights(weights))
        if not trainable:
            for layer in self.module.sublayers(include_self=True):
                for parameter in layer.parameters(include_sublayers=False):
                    parameter.stop_gradient = True
                if isinstance(layer, paddle.nn.Linear) and backend.precision != "float32":
                    layer.to(dtype=backend.precision)

        self.layers = [self._parts(*layer) for layer in zip(self.encoder.encoder.layers, self.shape.layers)]

    @staticmethod
    def _parts(layer: paddle.nn.Layer, shape: LayerShape) -> Layer:
        attention = layer.self_attn
        return Layer(
            query=partial(linear, attention.q_proj),
            key=partial(linear, attention.k_proj),
            value=partial(linear, attention.v_proj),
            output=partial(linear, attention.out_proj),
            attention_norm=layer.norm1,
            widen=partial(linear, layer.linear1),
            activation=layer.activation,
            narrow=partial(linear, layer.linear2),
            norm=layer.norm2,
            dropout=layer.dropout2,
            shape=shape,
        )

    def _resize(self, layer: paddle.nn.Layer, shape: LayerShape) -> None:
        """Gives a layer sizes that paddlenlp does not give to a single one."""
        hidden, attention = self.shape.hidden, layer.self_attn

        def linear(inputs: int, outputs: int) -> paddle.nn.Linear:
            new = paddle.nn.Linear(inputs, outputs)
            self.module._init_weights(new)
            return new

        attention.q_proj, attention.k_proj, attention.v_proj = (linear(hidden, shape.width) for _ in range(3))
        attention.out_proj = linear(shape.width, hidden)
        layer.linear1, layer.linear2 = linear(hidden, shape.intermediate), linear(shape.intermediate, hidden)

    def _embed(self, packed: Packed) -> paddle.Tensor:
        return self.encoder.embeddings(
            input_ids=packed.input_ids[None],
            token_type_ids=packed.token_type_ids[None],
            position_ids=packed.position_ids[None],
        )[0]

    def _attend(
        self, q: paddle.Tensor, k: paddle.Tensor, v: paddle.Tensor, mask: paddle.Tensor | None
    ) -> paddle.Tensor:
        scores = paddle.matmul(q * q.shape[-1] ** -0.5, k, transpose_y=True)
        if mask is not None:
            scores = paddle.where(mask, scores, paddle.full([], -1e4, dtype=scores.dtype))
        probabilities = F.softmax(scores)
        attention = self.encoder.encoder.layers[0].self_attn
        if attention.training and attention.dropout:
            probabilities = F.dropout(probabilities, attention.dropout)
        return probabilities @ v

    def _spread(self, x: paddle.Tensor, rows: paddle.Tensor, count: int) -> paddle.Tensor:
        return paddle.zeros([count, x.shape[1]], dtype=x.dtype).scatter(rows, x)

    def _take(self, x: paddle.Tensor, rows: paddle.Tensor) -> paddle.Tensor:
        return x.gather(rows)

    def _ask_head(self, x: paddle.Tensor) -> paddle.Tensor:
        if self.head == "masked_lm":
            return self.module.cls(x)
        if self.head == "sequence_classification":
            x = self.encoder.pooler(x.unsqueeze(1))
        if self.head != "question_answering":
            x = self.module.dropout(x)
        return self.module.classifier(x)

    def weights(self) -> dict[str, np.ndarray]:
        weights = super().weights()
        # An Embedding with a padding index gives zeros for it, whatever stands in that row.
        if (padding := self.encoder.embeddings.word_embeddings._padding_idx) is not None:
            weights["embeddings.word_embeddings.weight"][padding] = 0.0
        return weights

    def export_onnx(self, path: Path) -> None:
        from backends.paddle.export import export_onnx

        export_onnx(self, path)

    def _named(self, tensors: Mapping[str, paddle.Tensor]) -> list[tuple[str, paddle.Tensor]]:
        prefix = f"{self.module.base_model_prefix}."
        named = [(from_paddle_name(name.removeprefix(prefix), self.head), tensor) for name, tensor in tensors.items()]
        return [(name, tensor) for name, tensor in named if name not in TIED]

    def _is_transposed(self, name: str, array: np.ndarray) -> bool:
        return is_transposed(name, array)


class JoinedPaddleModels(Joined, PaddleModule):
    """Models of paddlenlp on one encoder."""

    def __init__(self, backend: PaddleBackend, models: Iterable[tuple[str, PaddleModel]]) -> None:
        super().__init__(models)
        self.backend = backend
        self.module = paddle.nn.LayerList(model.module for model in self.models.values())

    def _is_transposed(self, name: str, array: np.ndarray) -> bool:
        return is_transposed(name, array)


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
    if paddle.in_dynamic_mode() and x.place.is_cpu_place():
        return CPULinear.apply(x, layer.weight, layer.bias)
    return layer(x)
