"""AdamW with clipping and loss scaling on PaddlePaddle."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import paddle
import paddle.distributed as dist

from backends.interface import Compute, Optimizer, StepReport, Weights, decays

if TYPE_CHECKING:
    from backends.paddle.core import PaddleBackend
    from backends.paddle.models import PaddleModel

QUANTITIES = ("moment1_0", "moment2_0", "beta1_pow_acc_0", "beta2_pow_acc_0")


class PaddleOptimizer(Optimizer):
    def __init__(
        self,
        backend: PaddleBackend,
        model: PaddleModel,
        weight_decay: float,
        adam_epsilon: float,
        max_grad_norm: float,
        loss_scale: float,
    ) -> None:
        self.parameters = dict(model.named_parameters())
        self.parallel = _parallel(model.module) if dist.is_initialized() else None
        self.max_grad_norm = max_grad_norm
        for name, rate in model.rates.items():
            self.parameters[name].optimize_attr["learning_rate"] = rate
        decayed = {parameter.name for parameter in self.parameters.values() if decays(parameter)}
        self.adamw = paddle.optimizer.AdamW(
            learning_rate=0.0,
            epsilon=adam_epsilon,
            parameters=list(self.parameters.values()),
            weight_decay=weight_decay,
            apply_decay_param_fun=decayed.__contains__,
        )
        self.scaler = paddle.amp.GradScaler(
            enable=backend.precision == "float16", init_loss_scaling=loss_scale, use_dynamic_loss_scaling=True
        )

    def backward(self, loss: paddle.Tensor) -> None:
        self.scaler.scale(loss).backward()

    def step(self, learning_rate: float) -> StepReport:
        self.adamw.set_lr(learning_rate)
        scale = float(self.scaler._scale) if self.scaler.is_enable() else None
        self.scaler.unscale_(self.adamw)
        norm = float(self._clip())
        skipped = not math.isfinite(norm)
        if scale is not None or not skipped:
            self.scaler.step(self.adamw)
        self.scaler.update()
        self.adamw.clear_grad(set_to_zero=False)  # zeros would still decay what no loss reaches next
        return StepReport(norm, skipped, scale)

    @paddle.no_grad()
    def _clip(self) -> paddle.Tensor:
        """Clips the gradient and returns its norm; Paddle's clip_grad_norm_ takes ten times as long on a CPU."""
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        norm = paddle.stack([(g * g).sum() for g in gradients]).sum().sqrt()
        if self.max_grad_norm > 0:
            shrink = (self.max_grad_norm / norm).clip(max=1.0)
            for gradient in gradients:
                gradient.multiply_(shrink)
        return norm

    def state(self) -> dict[str, np.ndarray]:
        accumulators = self.adamw.state_dict()
        state = {
            f"{name}/{quantity}": accumulators[key].numpy()
            for name, parameter in self.parameters.items()
            for quantity in QUANTITIES
            if (key := f"{parameter.name}_{quantity}") in accumulators
        }
        if self.scaler.is_enable():
            scaler = self.scaler.state_dict()
            state["scaler/scale"] = np.asarray(scaler["scale"], dtype=np.float64).reshape(1)
            for count in ("incr_count", "decr_count"):
                state[f"scaler/{count}"] = np.int64(scaler[count]).reshape(1)
        return state

    def load_state(self, state: Weights) -> None:
        accumulators = {}
        for key, array in state.items():
            name, quantity = key.rsplit("/", 1)
            if name != "scaler":
                accumulators[f"{self.parameters[name].name}_{quantity}"] = array
        self.adamw.set_state_dict(accumulators)
        if self.scaler.is_enable():
            scaler = self.scaler.state_dict()
            scaler["scale"] = state["scaler/scale"].astype(np.float32)
            for count in ("incr_count", "decr_count"):
                scaler[count] = int(state[f"scaler/{count}"][0])
            self.scaler.load_state_dict(scaler)


def _parallel(module: paddle.nn.Layer) -> paddle.DataParallel:
    """A layer whose gradients are averaged."""
    return paddle.DataParallel(Computing(module), find_unused_parameters=True)


class Computing(paddle.nn.Layer):
    """A layer under a wrapper that wants to be called: what it is called with, it calls."""

    def __init__(self, module: paddle.nn.Layer) -> None:
        super().__init__()
        self.module = module

    def forward(self, compute: Compute) -> tuple[paddle.Tensor, dict[str, paddle.Tensor]]:
        return compute()
