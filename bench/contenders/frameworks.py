"""What to ask PyTorch and Paddle for, whoever runs on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bench.contenders import Contender


class OnTorch(Contender):
    framework = "torch"

    def synchronize(self) -> None:
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def product(self, size: int, precision: str) -> Callable[[], Any]:
        import torch

        device = "cuda" if self.on_gpu else "cpu"
        a, b = (torch.randn(size, size, device=device).to(getattr(torch, precision)) for _ in range(2))
        return lambda: a @ b

    def peak_memory(self) -> int:
        import torch

        return torch.cuda.max_memory_allocated() if self.on_gpu else super().peak_memory()


class OnPaddle(Contender):
    framework = "paddle"

    def synchronize(self) -> None:
        import paddle

        if paddle.is_compiled_with_cuda():
            paddle.device.synchronize()

    def product(self, size: int, precision: str) -> Callable[[], Any]:
        import paddle

        a, b = (paddle.randn([size, size]).astype(precision) for _ in range(2))
        return lambda: a @ b

    def peak_memory(self) -> int:
        import paddle

        return paddle.device.cuda.max_memory_allocated() if self.on_gpu else super().peak_memory()
