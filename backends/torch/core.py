"""Device, precision, tensors and custom gradients on PyTorch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
import transformers

from backends.interface import Backend, Head, InputError, Weights
from backends.torch.models import TorchModel
from backends.torch.optimizer import TorchOptimizer


def find_device(device: str) -> str:
    """The PyTorch device type for ``auto``, ``cpu``, ``gpu`` or ``xpu``."""
    present = {"gpu": torch.cuda.is_available(), "xpu": hasattr(torch, "xpu") and torch.xpu.is_available()}
    if device == "auto":
        device = next((name for name, there in present.items() if there), "cpu")
    if device not in ("cpu", *present):
        raise InputError(f"--device {device}: must be auto, cpu, gpu or xpu")
    if device != "cpu" and not present[device]:
        build = f"torch {torch.__version__}" + ("" if torch.version.cuda else ", a build without CUDA")
        raise InputError(f"--device {device}: this machine has none that PyTorch can use ({build}); use auto or cpu")
    return "cuda" if device == "gpu" else device


def low_precision(device: str) -> torch.dtype:
    """bfloat16 where the device computes in it, else float16.

    Raises:
        InputError: the device has arithmetic for neither.
    """
    if device == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16
        if torch.cuda.get_device_capability() >= (5, 3):
            return torch.float16
    elif device == "xpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.bfloat16
    raise InputError("--use_amp true: this device has no low-precision arithmetic; leave it false")


class WithGradient(torch.autograd.Function):
    """A value with gradients that are already known."""

    @staticmethod
    def forward(ctx, value, gradients, *inputs):
        ctx.gradients = [(gradient, x.dtype) for gradient, x in zip(gradients, inputs)]
        return value.clone()

    @staticmethod
    def backward(ctx, scale):
        return None, None, *((scale * gradient).to(dtype) for gradient, dtype in ctx.gradients)


class TorchBackend(Backend):
    name = "torch"

    def __init__(self, device: str = "auto", use_amp: bool = False) -> None:
        self.device = find_device(device)
        self.dtype = low_precision(self.device) if use_amp else torch.float32
        self.precision = str(self.dtype).removeprefix("torch.")

    def versions(self) -> dict[str, str]:
        return {"torch": torch.__version__, "transformers": transformers.__version__}

    def seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)

    def numpy(self, tensor: torch.Tensor) -> np.ndarray:
        tensor = tensor.detach().cpu()
        return (tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor).numpy().copy()

    def zeros(self, shape: Sequence[int], like: torch.Tensor) -> torch.Tensor:
        return like.new_zeros(tuple(shape))

    def with_gradient(
        self, value: torch.Tensor, inputs: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        return WithGradient.apply(value, gradients, *inputs)

    def no_grad(self) -> AbstractContextManager[Any]:
        return torch.no_grad()

    def autocast(self) -> AbstractContextManager[Any]:
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device, dtype=self.dtype)

    def model(self, config: Mapping[str, Any], weights: Weights | None = None, head: Head | None = None) -> TorchModel:
        return TorchModel(self, config, weights, head)

    def optimizer(
        self, model: TorchModel, *, weight_decay: float, adam_epsilon: float, max_grad_norm: float, loss_scale: float
    ) -> TorchOptimizer:
        return TorchOptimizer(self, model, weight_decay, adam_epsilon, max_grad_norm, loss_scale)
