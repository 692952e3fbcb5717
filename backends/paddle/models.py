"""Models of paddlenlp, with Q, K, V captured by hooks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import paddle
import paddlenlp.transformers
from paddlenlp.transformers.ppminilm.configuration import PPMiniLMConfig

from backends.capture import capture
from backends.interface import QKV, Batch, Head, InputError, Model, Weights, check_shape, check_weights
from backends.pretrained import CLASS_SUFFIXES, TIED, from_paddle_name, is_transposed

if TYPE_CHECKING:
    from backends.paddle.core import PaddleBackend

# paddlenlp's RobertaModel starts RoBERTa-wwm-ext's positions at 1, where the model was trained from 0: BERT it is.
FAMILIES = {"bert": "Bert", "roberta": "Bert", "ernie": "Ernie", "ppminilm": "PPMiniLM"}
# transformers' bookkeeping in config.json, which means something else to paddlenlp
FOREIGN_KEYS = ("model_type", "architectures", "transformers_version", "dtype", "torch_dtype")


class PaddleModel(Model):
    def __init__(
        self, backend: PaddleBackend, config: Mapping[str, Any], weights: Weights | None, head: Head | None
    ) -> None:
        family = FAMILIES[config["model_type"]]
        self.backend = backend
        self.config = dict(config)
        self.head = head
        library = paddlenlp.transformers
        settings = {key: value for key, value in config.items() if key not in FOREIGN_KEYS}
        config_class = PPMiniLMConfig if family == "PPMiniLM" else getattr(library, f"{family}Config")
        class_name = family + CLASS_SUFFIXES[head]
        model_class = getattr(library, class_name, None)
        if model_class is None:
            raise InputError(f"model_type {config['model_type']}: paddlenlp has no {class_name}; use bert")
        self.module = model_class(config_class(**settings))
        self.module.eval()
        self.encoder = getattr(self.module, self.module.base_model_prefix, self.module)
        if weights is not None:
            check_weights(self.load_weights(weights))

    def qkv(self, batch: Batch, layers: Sequence[int]) -> dict[int, QKV]:
        projections = {
            (layer, name): getattr(self.encoder.encoder.layers[layer].self_attn, name).register_forward_post_hook
            for layer in layers
            for name in ("q_proj", "k_proj", "v_proj")
        }
        outputs = capture(projections, lambda: self.encoder(**self._inputs(batch)))
        return {layer: QKV(*(outputs[layer, name] for name in ("q_proj", "k_proj", "v_proj"))) for layer in layers}

    def hidden_states(self, batch: Batch) -> paddle.Tensor:
        return self.encoder(**self._inputs(batch))[0]

    def masked_lm_loss(self, batch: Batch, positions: np.ndarray, labels: np.ndarray) -> paddle.Tensor:
        logits = self.module.cls(self.hidden_states(batch), masked_positions=self.backend.tensor(positions))
        return paddle.nn.functional.cross_entropy(logits.astype("float32"), self.backend.tensor(labels))

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

    def named_parameters(self) -> list[tuple[str, paddle.Tensor]]:
        """Trainable weights under the names of `backends.interface`."""
        return self._named(dict(self.module.named_parameters()))

    def _named(self, tensors: Mapping[str, paddle.Tensor]) -> list[tuple[str, paddle.Tensor]]:
        prefix = f"{self.module.base_model_prefix}."
        named = [(from_paddle_name(name.removeprefix(prefix), self.head), tensor) for name, tensor in tensors.items()]
        return [(name, tensor) for name, tensor in named if name not in TIED]

    def _inputs(self, batch: Batch) -> dict[str, paddle.Tensor]:
        return {
            name: self.backend.tensor(getattr(batch, name))
            for name in ("input_ids", "token_type_ids", "attention_mask")
        }
