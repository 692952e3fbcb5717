"""Models of transformers, run layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
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
    backend: TorchBackend

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
        if weights is not None:
            check_weights(self.load_weights(weights))
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
        if backend.compile and (trainable or not on_cpu):  # a compiler does not know reordered weights
            for layer in self.encoder.encoder.layer:
                for part in (layer.attention.output, layer.intermediate, layer.output):
                    part.compile(dynamic=True)

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

    def _project(self, layer: int, x: torch.Tensor, asking: torch.Tensor) -> QKV:
        attention = self.encoder.encoder.layer[layer].attention.self
        return QKV(attention.query(asking), attention.key(x), attention.value(x))

    def _layer(self, layer: int, x: torch.Tensor, qkv: QKV, packed: Packed) -> torch.Tensor:
        modules = self.encoder.encoder.layer[layer]
        attention = modules.attention.self
        attend = attend_runs if x.device.type == "cpu" and not packed.padded else attend_padded
        x = modules.attention.output(attend(qkv, packed, attention.num_attention_heads, attention.dropout), x)
        return modules.output(modules.intermediate(x), x)

    def masked_lm_loss(self, batch: Batch, positions: np.ndarray, labels: np.ndarray) -> torch.Tensor:
        rows = self.backend.tensor(batch.rows_of(positions))
        logits = self.module.cls(self.hidden_states(batch)[rows])
        return torch.nn.functional.cross_entropy(logits.float(), self.backend.tensor(labels))

    def logits(self, batch: Batch) -> torch.Tensor:
        if hasattr(self.module, "qa_outputs"):
            return self.module.qa_outputs(self.hidden_states(batch))
        if self.encoder.pooler is not None:
            x = self.encoder.pooler(self.first_states(batch)[:, None])
        else:
            x = self.hidden_states(batch)
        return self.module.classifier(self.module.dropout(x))

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
        for module in self.module.modules():
            if isinstance(module, FrozenCPULinear):
                module.reorder()
        return missing

    def export_onnx(self, path: Path) -> None:
        from backends.torch.export import export_onnx

        export_onnx(self, path)

    def named_parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        """Trainable weights under the names of `backends.interface`."""
        return self._named(dict(self.module.named_parameters()))

    def _named(self, tensors: Mapping[str, torch.Tensor]) -> list[tuple[str, torch.Tensor]]:
        prefix = f"{self.module.base_model_prefix}."
        named = [(name.removeprefix(prefix), tensor) for name, tensor in tensors.items()]
        return [(name, tensor) for name, tensor in named if name not in TIED and "position_ids" not in name]


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


def attend_runs(qkv: QKV, packed: Packed, heads: int, dropout: torch.nn.Module) -> torch.Tensor:
    """Multi-head attention over [T, D], equally long neighbours at a time, in float32: products
    this small are no faster in low precision."""
    contexts = []
    with torch.autocast("cpu", enabled=False):
        sizes = packed.asked(qkv.q), packed.sizes, packed.sizes
        for (count, _), *run in zip(packed.runs, *(x.float().split(of) for x, of in zip(qkv, sizes))):
            q, k, v = (x.view(count, len(x) // count, heads, -1).transpose(1, 2) for x in run)
            scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
            context = dropout(scores.softmax(-1)) @ v
            contexts.append(context.transpose(1, 2).reshape(len(run[0]), -1))
        return torch.cat(contexts)


def attend_padded(qkv: QKV, packed: Packed, heads: int, dropout: torch.nn.Module) -> torch.Tensor:
    """The same, all sequences at once, padded: more arithmetic, fewer operations."""
    count, length = packed.shape

    def spread(x: torch.Tensor) -> torch.Tensor:
        if packed.rows is not None and len(x) == packed.tokens:
            x = x.new_zeros(count * length, x.shape[1]).index_copy(0, packed.rows, x)
        return x.view(count, len(x) // count, heads, -1).transpose(1, 2)

    q, k, v = (spread(x) for x in qkv)
    context = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=packed.mask, dropout_p=dropout.p * dropout.training
    )
    context = context.transpose(1, 2).reshape(count * q.shape[2], -1)
    return context if len(context) == len(qkv.q) else context.index_select(0, packed.rows)
