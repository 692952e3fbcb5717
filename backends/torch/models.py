"""Models of transformers, run layer by layer, and modules of the user's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers

from backends.adapted import AdaptedModel
from backends.interface import PROJECTIONS, QKV, Head, Trainable, Weights
from backends.joined import Joined
from backends.packed import Layer, Packed, PackedModel
from backends.pretrained import CLASS_SUFFIXES, TIED
from backends.shape import LayerShape, check_missing, check_shape

if TYPE_CHECKING:
    from backends.torch.core import TorchBackend

FAMILIES = {"bert": "Bert", "roberta": "Bert", "ppminilm": "Bert", "ernie": "Ernie"}


class TorchModule(Trainable):
    """What every module does as a model, whatever it computes."""

    backend: TorchBackend
    module: torch.nn.Module

    def train(self, mode: bool = True) -> None:
        self.module.train(mode)

    def weights(self) -> dict[str, np.ndarray]:
        return {name: self.backend.numpy(tensor.float()) for name, tensor in self._named(self.module.state_dict())}

    def load_weights(self, weights: Weights) -> list[str]:
        missing = []
        with torch.no_grad():
            for name, tensor in self._named(self.module.state_dict(keep_vars=True)):
                if name not in weights:
                    missing.append(name)
                else:
                    check_shape(name, weights[name].shape, tensor.shape)
                    tensor.copy_(torch.from_numpy(np.asarray(weights[name], order="C")))
        return missing

    def add_projection(self, number: int, weight: np.ndarray, rate: float) -> torch.nn.Linear:
        if not hasattr(self.module, "projections"):
            self.module.projections = torch.nn.ModuleDict()
        projection = torch.nn.Linear(weight.shape[1], weight.shape[0], device=self.backend.device)
        self.module.projections[str(number)] = projection
        name = f"{PROJECTIONS}{number}"
        self.load_weights({f"{name}.weight": weight, f"{name}.bias": np.zeros(len(weight), np.float32)})
        self.rates |= {f"{name}.weight": rate, f"{name}.bias": rate}
        return projection

    def named_parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        """Trainable weights under the names of `backends.interface`."""
        return self._named(dict(self.module.named_parameters()))

    def _named(self, tensors: Mapping[str, torch.Tensor]) -> list[tuple[str, torch.Tensor]]:
        """Weights under the names that they have outside."""
        return [*tensors.items()]


class AdaptedTorchModel(TorchModule, AdaptedModel):
    """A module of the user's."""


class TorchModel(TorchModule, PackedModel):
    """A model of transformers."""

    def __init__(
        self,
        backend: TorchBackend,
        config: Mapping[str, Any],
        weights: Weights | None,
        head: Head | None,
        trainable: bool,
    ) -> None:
        super().__init__(backend, config, head)
        family = FAMILIES[config["model_type"]]
        model_config = getattr(transformers, f"{family}Config")(**self.settings)
        self.module = getattr(transformers, f"{family}{CLASS_SUFFIXES[head]}")(model_config).to(backend.device).eval()
        self.encoder = self.module.base_model
        if not self.shape.even:
            for layer, shape in zip(self.encoder.encoder.layer, self.shape.layers):
                self._resize(layer, shape)
        if weights is not None:
            check_missing(self.load_weights(weights))
        on_cpu = backend.device == "cpu"
        if not trainable:
            self.module.requires_grad_(False)
            for module in self.module.modules():
                if isinstance(module, torch.nn.Linear):
                    module.to(backend.dtype)
            if on_cpu and backend.dtype == torch.bfloat16:
                self._replace(torch.nn.Linear, FrozenCPULinear)
        elif on_cpu:
            self._replace(torch.nn.Dropout, CPUDropout)
        self.layers = [self._parts(*layer) for layer in zip(self.encoder.encoder.layer, self.shape.layers)]
        self.attention_dropout = self.encoder.encoder.layer[0].attention.self.dropout

    def share_encoder(self, other: TorchModel) -> None:
        if other.encoder.pooler is None:  # as that of a model for reading or labelling
            other.encoder.pooler = self.encoder.pooler
        super().share_encoder(other)
        self.attention_dropout = other.attention_dropout

    @staticmethod
    def _parts(layer: torch.nn.Module, shape: LayerShape) -> Layer:
        attention = layer.attention
        return Layer(
            query=attention.self.query,
            key=attention.self.key,
            value=attention.self.value,
            output=attention.output.dense,
            attention_norm=attention.output.LayerNorm,
            widen=layer.intermediate.dense,
            activation=layer.intermediate.intermediate_act_fn,
            narrow=layer.output.dense,
            norm=layer.output.LayerNorm,
            dropout=layer.output.dropout,
            shape=shape,
        )

    def _resize(self, layer: torch.nn.Module, shape: LayerShape) -> None:
        """Gives a layer sizes that transformers does not give to a single one."""
        hidden, attention = self.shape.hidden, layer.attention.self

        def linear(inputs: int, outputs: int) -> torch.nn.Linear:
            new = torch.nn.Linear(inputs, outputs, device=self.backend.device)
            self.module._init_weights(new)
            return new

        attention.query, attention.key, attention.value = (linear(hidden, shape.width) for _ in range(3))
        layer.attention.output.dense = linear(shape.width, hidden)
        layer.intermediate.dense, layer.output.dense = (
            linear(hidden, shape.intermediate),
            linear(shape.intermediate, hidden),
        )

    def _replace(self, kind: type[torch.nn.Module], by: Callable[[Any], torch.nn.Module]) -> None:
        """Puts another module into the place of each one of a kind."""
        for parent in list(self.module.modules()):
            for name, child in parent.named_children():
                if type(child) is kind:
                    setattr(parent, name, by(child))

    def _embed(self, packed: Packed) -> torch.Tensor:
        return self.encoder.embeddings(
            input_ids=packed.input_ids[None],
            token_type_ids=packed.token_type_ids[None],
            position_ids=packed.position_ids[None],
        )[0]

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        dropout = self.attention_dropout
        if mask is None and q.device.type == "cpu":
            scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
            return dropout(scores.softmax(-1)) @ v
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout.p * dropout.training
        )

    def _context_of_runs(self, layer: Layer, qkv: QKV, packed: Packed) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):  # products this small are no faster in low precision
            return super()._context_of_runs(layer, QKV(*(x.float() for x in qkv)), packed)

    def _spread(self, x: torch.Tensor, rows: torch.Tensor, count: int) -> torch.Tensor:
        return x.new_zeros(count, x.shape[1]).index_copy(0, rows, x)

    def _take(self, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return x.index_select(0, rows)

    def _ask_head(self, x: torch.Tensor) -> torch.Tensor:
        if self.head == "masked_lm":
            return self.module.cls(x)
        if self.head == "question_answering":
            return self.module.qa_outputs(x)
        if self.head == "sequence_classification":
            x = self.encoder.pooler(x[:, None])
        return self.module.classifier(self.module.dropout(x))

    def load_weights(self, weights: Weights) -> list[str]:
        missing = super().load_weights(weights)
        for module in self.module.modules():
            if isinstance(module, FrozenCPULinear):
                module.reorder()
        return missing

    def export_onnx(self, path: Path) -> None:
        from backends.torch.export import export_onnx

        export_onnx(self, path)

    def _named(self, tensors: Mapping[str, torch.Tensor]) -> list[tuple[str, torch.Tensor]]:
        prefix = f"{self.module.base_model_prefix}."
        named = [(name.removeprefix(prefix), tensor) for name, tensor in tensors.items()]
        return [(name, tensor) for name, tensor in named if name not in TIED and "position_ids" not in name]


class JoinedTorchModels(Joined, TorchModule):
    """Models of transformers on one encoder."""

    def __init__(self, backend: TorchBackend, models: Iterable[tuple[str, TorchModel]]) -> None:
        super().__init__(models)
        self.backend = backend
        self.module = torch.nn.ModuleList(model.module for model in self.models.values())


class FrozenCPULinear(torch.nn.Linear):
    """A linear layer whose weights lie in memory as the processor's bfloat16 products read them,
    the form that `torch.compile` gives to frozen weights; a quarter faster than reordering them each time."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.reorder()

    def reorder(self) -> None:
        self._reordered = [torch.ops.mkldnn._reorder_linear_weight(self.weight, 512)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(torch.bfloat16)
        return torch.ops.mkldnn._linear_pointwise(x, self._reordered[0], self.bias, "none", [], "")


class CPUDropout(torch.nn.Dropout):
    """Dropout that takes 16 random bits an element, a quarter of what drawing from a
    distribution costs; p is rounded to a 65,536th."""

    def __init__(self, dropout: torch.nn.Dropout) -> None:
        super().__init__(dropout.p)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or self.p == 0.0:
            return x
        bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
        dropped = round(self.p * 2**16)
        kept = bits[: x.numel()].view_as(x) >= dropped - 2**15
        return x * kept.to(x.dtype).mul_(2**16 / (2**16 - dropped))
