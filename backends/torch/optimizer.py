"""AdamW with clipping and loss scaling on PyTorch."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from backends.interface import Compute, Optimizer, StepReport, Weights, decays

if TYPE_CHECKING:
    from backends.torch.core import TorchBackend
    from backends.torch.models import TorchModel


class TorchOptimizer(Optimizer):
    def __init__(
        self,
        backend: TorchBackend,
        model: TorchModel,
        weight_decay: float,
        adam_epsilon: float,
        max_grad_norm: float,
        loss_scale: float,
    ) -> None:
        self.parameters = dict(model.named_parameters())
        self.parallel = _parallel(model.module) if dist.is_initialized() else None
        self.max_grad_norm = max_grad_norm
        groups: dict[tuple[bool, float], list[torch.nn.Parameter]] = {(True, 1.0): [], (False, 1.0): []}
        for name, parameter in self.parameters.items():
            groups.setdefault((decays(parameter), model.rates.get(name, 1.0)), []).append(parameter)
        self.adamw = torch.optim.AdamW(
            [
                {"params": parameters, "weight_decay": weight_decay if decayed else 0.0, "rate": rate}
                for (decayed, rate), parameters in groups.items()
            ],
            lr=0.0,
            eps=adam_epsilon,
            fused=True,
        )
        self.scaler = torch.amp.GradScaler(
            backend.device, init_scale=loss_scale, enabled=backend.dtype == torch.float16
        )

    def backward(self, loss: torch.Tensor) -> None:
        self.scaler.scale(loss).backward()

    def step(self, learning_rate: float) -> StepReport:
        for group in self.adamw.param_groups:
            group["lr"] = learning_rate * group["rate"]
        scale = self.scaler.get_scale() if self.scaler.is_enabled() else None
        self.scaler.unscale_(self.adamw)
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters.values() if p.grad is not None])
        shrink = (norm / self.max_grad_norm).clamp(min=1.0) if self.max_grad_norm > 0 else None
        if scale is None:
            # What AMP divides by, and looks at, in the update itself, without a pass over the gradients
            self.adamw.grad_scale = shrink
            self.adamw.found_inf = (~norm.isfinite()).float()
            self.adamw.step()
            skipped = not math.isfinite(norm)
        else:
            if shrink is not None:
                torch._foreach_div_([p.grad for p in self.parameters.values() if p.grad is not None], shrink)
            self.scaler.step(self.adamw)
            self.scaler.update()
            skipped = self.scaler.get_scale() < scale
        self.adamw.zero_grad(set_to_none=True)
        return StepReport(float(norm), skipped, scale)

    def state(self) -> dict[str, np.ndarray]:
        state = {
            f"{name}/{quantity}": tensor.detach().cpu().numpy()
            for name, parameter in self.parameters.items()
            for quantity, tensor in self.adamw.state.get(parameter, {}).items()
        }
        if self.scaler.is_enabled():
            scaler = self.scaler.state_dict()
            state["scaler/scale"] = np.float64(scaler["scale"]).reshape(1)
            state["scaler/growth_tracker"] = np.int64(scaler["_growth_tracker"]).reshape(1)
        return state

    def load_state(self, state: Weights) -> None:
        for key, array in state.items():
            name, quantity = key.rsplit("/", 1)
            if name == "scaler":
                continue
            parameter = self.parameters[name]
            self.adamw.state[parameter][quantity] = torch.from_numpy(array.copy()).to(parameter.device)
        if self.scaler.is_enabled():
            scaler = self.scaler.state_dict()
            scaler["scale"] = float(state["scaler/scale"][0])
            scaler["_growth_tracker"] = int(state["scaler/growth_tracker"][0])
            self.scaler.load_state_dict(scaler)


def _parallel(module: torch.nn.Module) -> DistributedDataParallel:
    """A module whose gradients are averaged; a weight that two names share is known to it by one."""
    with warnings.catch_warnings():
        # of a name for broadcast_buffers that older releases do not have
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(
            Computing(module), broadcast_buffers=False, gradient_as_bucket_view=True, find_unused_parameters=True
        )


class Computing(torch.nn.Module):
    """A module under a wrapper that wants to be called: what it is called with, it calls."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, compute: Compute) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return compute()
