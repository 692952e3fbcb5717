"""Device, precision, tensors and custom gradients on PyTorch."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import transformers

from backends.devices import Device, check_kernels, choose_device, choose_precision
from backends.interface import Backend, Batch, Forward, Head, Precision, Weights
from backends.memory import keep_freed_memory, resident
from backends.threads import share_processors
from backends.torch.models import AdaptedTorchModel, JoinedTorchModels, TorchModel
from backends.torch.optimizer import TorchOptimizer

# The wheels that still hold code for Volta, Pascal and Maxwell
OLD_GPUS = "install PyTorch's build for CUDA 12.6: pip install torch --index-url https://download.pytorch.org/whl/cu126"


def find_device(device: str) -> str:
    """``cpu``, ``gpu`` or ``xpu``, for one of them or ``auto``.

    Raises:
        InputError: the device is not there, or PyTorch's build holds no code for it.
    """
    present = {"gpu": torch.cuda.is_available(), "xpu": hasattr(torch, "xpu") and torch.xpu.is_available()}
    build = f"torch {torch.__version__}"
    kind = "" if torch.version.cuda else ", a build without CUDA"
    device = choose_device(device, present, "PyTorch", build + kind)
    if device == "gpu":
        name, architectures = torch.cuda.get_device_name(), torch.cuda.get_arch_list()
        check_kernels(name, torch.cuda.get_device_capability(), build, architectures, OLD_GPUS)
    return device


def devices() -> list[Device]:
    """Every device that PyTorch sees."""
    seen = [Device("cpu", f"{torch.get_num_threads()} threads", precisions("cpu"))]
    for number in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(number)
        name = f"{torch.cuda.get_device_name(number)} (sm_{major}{minor})"
        notes = "the relation loss by Triton" if has_triton("cuda") else "the relation loss by tensor operations"
        seen.append(Device("gpu", name, precisions("cuda"), notes))
    return seen


def precisions(device: str) -> list[str]:
    """What a device has units for, the fastest that is safe first."""
    bfloat16 = device == "xpu"
    float16 = device != "cpu"
    if device == "cuda":
        bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
        float16 = torch.cuda.get_device_capability() >= (5, 3)
    elif device == "cpu":
        bfloat16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return ["bfloat16"] * bfloat16 + ["float16"] * float16 + ["float32"]


def has_triton(device: str) -> bool:
    """Whether Triton's kernels run on a device: it is installed, and the GPU is Ampere or later."""
    return device == "cuda" and find_spec("triton") is not None and torch.cuda.get_device_capability() >= (8, 0)


class WithGradient(torch.autograd.Function):
    """A value with gradients that are already known; they are scaled in place, and so used once."""

    @staticmethod
    def forward(ctx, value, gradients, *inputs):
        ctx.gradients = [(gradient, x.dtype) for gradient, x in zip(gradients, inputs)]
        return value.clone()

    @staticmethod
    def backward(ctx, scale):
        gradients, ctx.gradients = ctx.gradients, None
        return None, None, *(gradient.mul_(scale).to(dtype) for gradient, dtype in gradients)


class TorchBackend(Backend):
    name, library = "torch", "transformers"
    # All of transformers' but those with weights of their own
    activations = tuple(name for name in transformers.activations.ACT2FN if name not in ("prelu", "xielu"))
    find_device = staticmethod(find_device)
    devices = staticmethod(devices)

    def __init__(self, device: str = "auto", precision: Precision = "float32") -> None:
        self.device = find_device(device).replace("gpu", "cuda")
        # float16 runs on any CPU, slowly: what is written for GPUs can be tried without one.
        slow = ["float16"] if self.device == "cpu" else []
        self.precision = choose_precision(precision, precisions(self.device), slow, "PyTorch", self.device)
        self.dtype = getattr(torch, self.precision)
        if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
            if self.device == "cuda":
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            dist.init_process_group("nccl" if self.device == "cuda" else "gloo")
            # Else gloo's threads may outlive the interpreter, and abort
            atexit.register(dist.destroy_process_group)
        if self.device == "cpu":
            keep_freed_memory()
            share_processors()
            if self.dtype == torch.bfloat16:
                self.row_multiple = 32  # oneDNN compiles a product anew for each number of rows
        elif has_triton(self.device):
            from backends.torch.kernels import TritonRelationKernel

            self.relation_kernel = TritonRelationKernel

    @staticmethod
    def versions() -> dict[str, str]:
        return {"torch": torch.__version__, "transformers": transformers.__version__}

    def memory(self) -> tuple[int, int]:
        if self.device == "cpu":
            return resident()
        device = getattr(torch, self.device)
        return device.memory_allocated(), device.max_memory_allocated()

    def seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)

    def numpy(self, tensor: torch.Tensor) -> np.ndarray:
        tensor = tensor.detach().cpu()
        return (tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor).numpy().copy()

    def zeros(self, shape: Sequence[int], like: torch.Tensor) -> torch.Tensor:
        return like.new_zeros(tuple(shape))

    def concat(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.cat(list(tensors))

    def log_softmax(self, x: torch.Tensor) -> torch.Tensor:
        return x.log_softmax(-1)

    def cross_entropy(self, logits: torch.Tensor, labels: np.ndarray) -> torch.Tensor:
        targets = self.tensor(np.maximum(labels, -1))
        return torch.nn.functional.cross_entropy(logits.float(), targets, ignore_index=-1, reduction="sum")

    @property
    def world_size(self) -> int:
        return dist.get_world_size() if dist.is_initialized() else 1

    @property
    def rank(self) -> int:
        return dist.get_rank() if dist.is_initialized() else 0

    def gather(self, x: torch.Tensor) -> list[torch.Tensor]:
        lengths = [torch.zeros(1, dtype=torch.int64, device=x.device) for _ in range(self.world_size)]
        dist.all_gather(lengths, lengths[0].new_tensor([len(x)]))
        counts = [length.item() for length in lengths]
        padded = x.new_zeros((max(counts), *x.shape[1:]))
        padded[: len(x)] = x.detach()
        gathered = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(gathered, padded)
        return [theirs[:count] for theirs, count in zip(gathered, counts)]

    def barrier(self) -> None:
        if dist.is_initialized():
            dist.barrier()

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

    def model(
        self,
        config: Mapping[str, Any],
        weights: Weights | None = None,
        head: Head | None = None,
        trainable: bool = True,
    ) -> TorchModel:
        return TorchModel(self, config, weights, head, trainable)

    def join(self, models: Iterable[tuple[str, TorchModel]]) -> JoinedTorchModels:
        return JoinedTorchModels(self, models)

    def adapt(self, module: torch.nn.Module, forward: Forward) -> AdaptedTorchModel:
        return AdaptedTorchModel(self, module.to(self.device), forward)

    def reference(
        self, folder: Path, model_type: str, weights: Weights, head: Head | None
    ) -> Callable[[Batch], list[np.ndarray]]:
        from backends.torch.reference import reference

        return reference(self, folder, model_type, weights, head)

    def optimizer(
        self, model: TorchModel, *, weight_decay: float, adam_epsilon: float, max_grad_norm: float, loss_scale: float
    ) -> TorchOptimizer:
        return TorchOptimizer(self, model, weight_decay, adam_epsilon, max_grad_norm, loss_scale)
