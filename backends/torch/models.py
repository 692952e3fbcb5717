"""Models of transformers, with Q, K, V captured by hooks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers

from backends.capture import capture
from backends.interface import QKV, Batch, Head, Model, Weights, check_shape, check_weights
from backends.pretrained import CLASS_SUFFIXES, TIED

if TYPE_CHECKING:
    from backends.torch.core import TorchBackend

FAMILIES = {"bert": "Bert", "roberta": "Bert", "ppminilm": "Bert", "ernie": "Ernie"}


class TorchModel(Model):
    def __init__(
        self, backend: TorchBackend, config: Mapping[str, Any], weights: Weights | None, head: Head | None
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

    def qkv(self, batch: Batch, layers: Sequence[int]) -> dict[int, QKV]:
        projections = {
            (layer, name): getattr(self.encoder.encoder.layer[layer].attention.self, name).register_forward_hook
            for layer in layers
            for name in ("query", "key", "value")
        }
        outputs = capture(projections, lambda: self.encoder(**self._inputs(batch)))
        return {layer: QKV(*(outputs[layer, name] for name in ("query", "key", "value"))) for layer in layers}

    def hidden_states(self, batch: Batch) -> torch.Tensor:
        return self.encoder(**self._inputs(batch)).last_hidden_state

    def masked_lm_loss(self, batch: Batch, positions: np.ndarray, labels: np.ndarray) -> torch.Tensor:
        hidden = self.hidden_states(batch).flatten(0, 1)[self.backend.tensor(positions)]
        logits = self.module.cls(hidden)
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

    def _inputs(self, batch: Batch) -> dict[str, torch.Tensor]:
        return {
            name: self.backend.tensor(getattr(batch, name))
            for name in ("input_ids", "token_type_ids", "attention_mask")
        }
