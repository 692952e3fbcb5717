"""Device, precision, tensors and custom gradients on PaddlePaddle."""

from __future__ import annotations

import atexit
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import paddle.distributed as dist
import paddle.nn.functional as F
import paddlenlp
from paddle.autograd import PyLayer

from backends.devices import Device, check_kernels, choose_device, choose_precision
from backends.interface import Backend, Batch, Forward, Head, Precision, Weights
from backends.memory import keep_freed_memory, resident
from backends.paddle.models import AdaptedPaddleModel, JoinedPaddleModels, PaddleModel
from backends.paddle.optimizer import PaddleOptimizer
from backends.threads import share_processors

OLD_GPUS = (
    "install another of Paddle's builds: https://www.paddlepaddle.org.cn/packages/stable/cu126/ has one for CUDA 12.6"
)


def find_device(device: str) -> str:
    """``cpu``, ``gpu`` or ``xpu``, for one of them or ``auto``.

    Raises:
        InputError: the device is not there, or Paddle's build holds no code for it.
    """
    present = {
        "gpu": paddle.is_compiled_with_cuda() and paddle.device.cuda.device_count() > 0,
        "xpu": paddle.is_compiled_with_xpu() and paddle.device.xpu.device_count() > 0,
    }
    build = f"paddle {paddle.__version__}"
    kind = "" if paddle.is_compiled_with_cuda() else ", a build without CUDA"
    device = choose_device(device, present, "Paddle", build + kind)
    if device == "gpu":
        capability = paddle.device.cuda.get_device_capability()
        # a list of numbers, or one string of them
        architectures = re.findall(r"\d+", str(paddle.version.cuda_archs()))
        name = paddle.device.cuda.get_device_name()
        check_kernels(name, capability, build, architectures, OLD_GPUS)
    return device


def devices() -> list[Device]:
    """Every device that Paddle sees."""
    threads = os.environ.get("OMP_NUM_THREADS", "1")
    kernels = os.environ.get("MKL_DEBUG_CPU_TYPE")
    notes = "" if kernels is None else f"MKL_DEBUG_CPU_TYPE={kernels} names its matrix products' code"
    seen = [Device("cpu", f"{threads} threads", precisions("cpu"), notes)]
    for number in range(paddle.device.cuda.device_count() if paddle.is_compiled_with_cuda() else 0):
        major, minor = paddle.device.cuda.get_device_capability(number)
        name = f"{paddle.device.cuda.get_device_name(number)} (sm_{major}{minor})"
        seen.append(Device("gpu", name, precisions("gpu"), "the relation loss by tensor operations"))
    return seen


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
    name, library = "paddle", "paddlenlp"
    # Those that paddle.nn.functional has under transformers' names
    activations = ("gelu", "leaky_relu", "mish", "relu", "relu6", "sigmoid", "silu", "swish", "tanh")
    find_device = staticmethod(find_device)
    devices = staticmethod(devices)

    def __init__(self, device: str = "auto", precision: Precision = "float32") -> None:
        self.device = find_device(device)
        self.precision = choose_precision(precision, precisions(self.device), (), "Paddle", self.device)
        if self.device == "cpu":
            keep_freed_memory()
            share_processors()
        paddle.set_device(self.device)
        if int(os.environ.get("PADDLE_TRAINERS_NUM", 1)) > 1 and not dist.is_initialized():
            dist.init_parallel_env()
            atexit.register(dist.destroy_process_group)  # as on PyTorch

    @staticmethod
    def versions() -> dict[str, str]:
        return {"paddlepaddle": paddle.__version__, "paddlenlp": paddlenlp.__version__}

    def memory(self) -> tuple[int, int]:
        if self.device == "cpu":
            return resident()
        device = getattr(paddle.device, self.device.replace("gpu", "cuda"))
        return device.memory_allocated(), device.max_memory_allocated()

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

    def cross_entropy(self, logits: paddle.Tensor, labels: np.ndarray) -> paddle.Tensor:
        targets = self.tensor(np.maximum(labels, -1))
        return F.cross_entropy(logits.astype("float32"), targets, ignore_index=-1, reduction="sum")

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

    def barrier(self) -> None:
        if dist.is_initialized():
            dist.barrier()

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

    def join(self, models: Iterable[tuple[str, PaddleModel]]) -> JoinedPaddleModels:
        return JoinedPaddleModels(self, models)

    def adapt(self, module: paddle.nn.Layer, forward: Forward) -> AdaptedPaddleModel:
        return AdaptedPaddleModel(self, module, forward)

    def reference(
        self, folder: Path, model_type: str, weights: Weights, head: Head | None
    ) -> Callable[[Batch], list[np.ndarray]]:
        from backends.paddle.reference import reference

        return reference(self, folder, model_type, weights, head)

    def optimizer(
        self, model: PaddleModel, *, weight_decay: float, adam_epsilon: float, max_grad_norm: float, loss_scale: float
    ) -> PaddleOptimizer:
        return PaddleOptimizer(self, model, weight_decay, adam_epsilon, max_grad_norm, loss_scale)
