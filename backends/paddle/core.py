"""Device, precision, tensors and custom gradients on PaddlePaddle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import paddle
import paddle.distributed as dist
import paddlenlp
from paddle.autograd import PyLayer

from backends.interface import Backend, Head, InputError, Precision, Weights
from backends.memory import keep_freed_memory
from backends.paddle.models import PaddleModel
from backends.paddle.optimizer import PaddleOptimizer


def find_device(device: str) -> str:
    """The Paddle device for ``auto``, ``cpu``, ``gpu`` or ``xpu``."""
    present = {
        "gpu": paddle.is_compiled_with_cuda() and paddle.device.cuda.device_count() > 0,
        "xpu": paddle.is_compiled_with_xpu() and paddle.device.xpu.device_count() > 0,
    }
    if device == "auto":
        device = next((name for name, there in present.items() if there), "cpu")
    if device not in ("cpu", *present):
        raise InputError(f"--device {device}: must be auto, cpu, gpu or xpu")
    if device != "cpu" and not present[device]:
        build = f"paddle {paddle.__version__}" + ("" if paddle.is_compiled_with_cuda() else ", a build without CUDA")
        raise InputError(f"--device {device}: this machine has none that Paddle can use ({build}); use auto or cpu")
    return device


def find_precision(device: str, precision: Precision) -> str:
    """The dtype of matrix products on a device; for ``auto`` the one it is fastest in.

    Raises:
        InputError: the device does not compute in the precision asked for.
    """
    gains = precisions(device)
    if precision == "auto":
        return gains[0]
    if precision not in gains:
        raise InputError(f"--amp_dtype {precision}: Paddle's {device} computes in {', '.join(gains)}; use one, or auto")
    return precision


def precisions(device: str) -> list[str]:
    """What Paddle computes in on a device, the fastest that is safe first."""
    bfloat16 = device != "cpu" and paddle.amp.is_bfloat16_supported()
    float16 = device != "cpu" and paddle.amp.is_float16_supported()
    return ["bfloat16"] * bfloat16 + ["float16"] * float16 + ["float32"]


class WithGradient(PyLayer):
    """A value with gradients that are already known; they are scaled in place, and so used once."""

    @staticmethod
    def forward(ctx, value, gradients, *inputs):
        ctx.gradients = [(gradient, x.dtype) for gradient, x in zip(gradients(), inputs)]
        return value.clone()

    @staticmethod
    def backward(ctx, scale):
        gradients, ctx.gradients = ctx.gradients, None
        return None, *(gradient.multiply_(scale).astype(dtype) for gradient, dtype in gradients)


class PaddleBackend(Backend):
    name = "paddle"

    def __init__(self, device: str = "auto", precision: Precision = "float32") -> None:
        self.device = find_device(device)
        self.precision = find_precision(self.device, precision)
        if self.device == "cpu":
            keep_freed_memory()
        paddle.set_device(self.device)

    def versions(self) -> dict[str, str]:
        return {"paddlepaddle": paddle.__version__, "paddlenlp": paddlenlp.__version__}

    def seed(self, seed: int) -> None:
        paddle.seed(seed)

    def tensor(self, array: np.ndarray) -> paddle.Tensor:
        return paddle.to_tensor(array)

    def numpy(self, tensor: paddle.Tensor) -> np.ndarray:
        if tensor.dtype in (paddle.bfloat16, paddle.float16):
            tensor = tensor.astype("float32")
        return tensor.numpy().copy()

    def zeros(self, shape: Sequence[int], like: paddle.Tensor) -> paddle.Tensor:
        return paddle.zeros(list(shape), dtype=like.dtype)

    def concat(self, tensors: Sequence[paddle.Tensor]) -> paddle.Tensor:
        return paddle.concat(list(tensors))

    def log_softmax(self, x: paddle.Tensor) -> paddle.Tensor:
        # Paddle's own cuts logits off at 64 below the largest, and its logsumexp takes four times as long.
        x = x - x.max(-1, True)
        return x - x.exp().sum(-1, True).log()

    @property
    def world_size(self) -> int:
        return dist.get_world_size() if dist.is_initialized() else 1

    @property
    def rank(self) -> int:
        return dist.get_rank() if dist.is_initialized() else 0

    def gather(self, x: paddle.Tensor) -> list[paddle.Tensor]:
        lengths: list[paddle.Tensor] = []
        dist.all_gather(lengths, paddle.to_tensor([x.shape[0]]))
        counts = [length.item() for length in lengths]
        padded = paddle.zeros([max(counts), *x.shape[1:]], dtype=x.dtype)
        padded[: x.shape[0]] = x.detach()
        gathered: list[paddle.Tensor] = []
        dist.all_gather(gathered, padded)
        return [theirs[:count] for theirs, count in zip(gathered, counts)]

    def with_gradient(
        self, value: paddle.Tensor, inputs: Sequence[paddle.Tensor], gradients: Sequence[paddle.Tensor]
    ) -> paddle.Tensor:
        # A PyLayer takes every tensor among its arguments for an input, those in lists too: hence the function.
        return WithGradient.apply(value, lambda: gradients, *inputs)

    def no_grad(self) -> AbstractContextManager[Any]:
        return paddle.no_grad()

    def autocast(self) -> AbstractContextManager[Any]:
        if self.precision == "float32":
            return nullcontext()
        return paddle.amp.auto_cast(dtype=self.precision, level="O1")

    def model(
        self,
        config: Mapping[str, Any],
        weights: Weights | None = None,
        head: Head | None = None,
        trainable: bool = True,
    ) -> PaddleModel:
        return PaddleModel(self, config, weights, head, trainable)

    def optimizer(
        self, model: PaddleModel, *, weight_decay: float, adam_epsilon: float, max_grad_norm: float, loss_scale: float
    ) -> PaddleOptimizer:
        return PaddleOptimizer(self, model, weight_decay, adam_epsilon, max_grad_norm, loss_scale)
