"""Models of transformers, run layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers

from backends.interface import QKV, Batch, Head, Weights, check_shape, check_weights
from backends.packed import Packed, PackedModel
from backends.pretrained import CLASS_SUFFIXES, TIED

if TYPE_CHECKING:
    from backends.torch.core import TorchBackend

FAMILIES = {"bert": "Bert", "roberta": "Bert", "ppminilm": "Bert", "ernie": "Ernie"}


class TorchModel(PackedModel):
    def __init__(
        self,
        backend: TorchBackend,
        config: Mapping[str, Any],
        weights: Weights | None,
        head: Head | None,
        trainable: bool,
    ) -> None:
        family = FAMILIES[config["model_type"]]
        self.backend = backend
        self.config = dict(config)
        settings = {key: value for key, value in config.items() if key not in ("model_type", "architectures")}
        model_config = getattr(transformers, f"{family}Config")(**settings)
        self.module = getattr(transformers, f"{family}{CLASS_SUFFIXES[head]}")(model_config).to(backend.device).eval()
        self.encoder = self.module.base_model
        if weights is not None:
            check_weights(self.load_weights(weights))
        if not trainable:
            self.module.requires_grad_(False)
            for module in self.module.modules():
                if isinstance(module, torch.nn.Linear):
                    module.to(backend.dtype)

    def _embed(self, packed: Packed) -> torch.Tensor:
        return self.encoder.embeddings(
            input_ids=packed.input_ids[None],
            token_type_ids=packed.token_type_ids[None],
            position_ids=packed.position_ids[None],
        )[0]

    def _project(self, layer: int, x: torch.Tensor) -> QKV:
        attention = self.encoder.encoder.layer[layer].attention.self
        return QKV(attention.query(x), attention.key(x), attention.value(x))

    def _layer(self, layer: int, x: torch.Tensor, qkv: QKV, packed: Packed) -> torch.Tensor:
        modules = self.encoder.encoder.layer[layer]
        attention = modules.attention.self
        dropout = attention.dropout.p if attention.training else 0.0
        attend = attend_runs if x.device.type == "cpu" and not packed.padded else attend_padded
        x = modules.attention.output(attend(qkv, packed, attention.num_attention_heads, dropout), x)
        return modules.output(modules.intermediate(x), x)

    def masked_lm_loss(self, batch: Batch, positions: np.ndarray, labels: np.ndarray) -> torch.Tensor:
        rows = self.backend.tensor(batch.rows_of(positions))
        logits = self.module.cls(self.hidden_states(batch)[rows])
        return torch.nn.functional.cross_entropy(logits.float(), self.backend.tensor(labels))

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
                    tensor.copy_(torch.from_numpy(np.ascontiguousarray(weights[name])))
        return missing

    def named_parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        """Trainable weights under the names of `backends.interface`."""
        return self._named(dict(self.module.named_parameters()))

    def _named(self, tensors: Mapping[str, torch.Tensor]) -> list[tuple[str, torch.Tensor]]:
        prefix = f"{self.module.base_model_prefix}."
        named = [(name.removeprefix(prefix), tensor) for name, tensor in tensors.items()]
        return [(name, tensor) for name, tensor in named if name not in TIED and "position_ids" not in name]


def attend_runs(qkv: QKV, packed: Packed, heads: int, dropout: float) -> torch.Tensor:
    """Multi-head attention over [T, D], equally long neighbours at a time."""
    contexts = []
    for (count, length), *run in zip(packed.runs, *(x.split(packed.sizes) for x in qkv)):
        q, k, v = (x.view(count, length, heads, -1).transpose(1, 2) for x in run)
        context = torch.nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        contexts.append(context.transpose(1, 2).reshape(count * length, -1))
    return torch.cat(contexts)


def attend_padded(qkv: QKV, packed: Packed, heads: int, dropout: float) -> torch.Tensor:
    """The same, all sequences at once, padded: more arithmetic, fewer operations."""
    count, length = packed.shape

    def spread(x: torch.Tensor) -> torch.Tensor:
        if packed.rows is not None:
            x = x.new_zeros(count * length, x.shape[1]).index_copy(0, packed.rows, x)
        return x.view(count, length, heads, -1).transpose(1, 2)

    q, k, v = (spread(x) for x in qkv)
    context = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=packed.mask, dropout_p=dropout)
    context = context.transpose(1, 2).reshape(count * length, -1)
    return context if packed.rows is None else context.index_select(0, packed.rows)
