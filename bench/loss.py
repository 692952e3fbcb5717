"""``python -m bench loss``: time and memory of the relation loss, against relation matrices in full."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np

import backends
from backends.interface import QKV, Backend
from backends.memory import resident
from bench.report import loss_plot, machine, save
from objectives.relations import RelationLoss
from training.report import markdown

WEIGHTS = {"token": (0.0, 0.0), "head": (1.0, 0.0), "sample": (0.0, 1.0)}
"""alpha, beta."""


def loss(
    batch_size: int = 64,
    length: int = 512,
    full_batch_size: int = 4,
    heads: int = 48,
    width: int = 768,
    frameworks: list[Literal["torch", "paddle"]] = ["torch", "paddle"],  # noqa: B006
    device: Literal["cpu", "gpu"] = "cpu",
    output_dir: str = "output/bench",
) -> None:
    """Measures the relation loss, value and gradient, in time and in memory beyond its inputs.

    Ours beside what frameworks differentiate by themselves: full matrices of scores, a
    soft-max and a KL divergence each. These grow with the batch (between samples, with
    its square); they run at full_batch_size, and their memory is scaled up.

    Args:
        batch_size: samples, all of them `length` tokens long.
        length: tokens.
        full_batch_size: samples for the full matrices, as many as fit into memory.
        heads: relation heads.
        width: hidden size of both sides.
        frameworks: torch, paddle or both.
        device: cpu, or gpu.
        output_dir: where the table, the plot and the figures go.
    """
    records: list[dict[str, Any]] = []
    for framework in frameworks:
        for relation in WEIGHTS:
            measured: dict[str, tuple[int, float]] = {}
            for kind, samples in (("ours", batch_size), ("full", full_batch_size)):
                # A process each: what one has taken from the system, the next must not find there.
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                    shape = samples, length, heads, width
                    measured[kind] = pool.submit(_measure, framework, device, relation, kind, shape).result()
            scale = batch_size / full_batch_size
            records.append(
                {
                    "framework": framework,
                    "relation": relation,
                    "ours_bytes": measured["ours"][0],
                    "full_bytes": measured["full"][0] * (scale**2 if relation == "sample" else scale),
                    "ours_seconds_a_sample": measured["ours"][1] / batch_size,
                    "full_seconds_a_sample": measured["full"][1] / full_batch_size,
                }
            )
    results = {"machine": machine(device), "batch_size": batch_size, "length": length, "heads": heads, "width": width}
    results["measured"] = records
    rows = [
        [
            f"{record['framework']}, {record['relation']}",
            f"{record['ours_bytes'] / 2**20:,.0f}",
            f"{record['full_bytes'] / 2**20:,.0f}",
            f"1/{record['full_bytes'] / record['ours_bytes']:.0f}",
            f"{record['ours_seconds_a_sample'] * 1e3:.1f}",
            f"{record['full_seconds_a_sample'] * 1e3:.1f}",
        ]
        for record in records
    ]
    table = "\n\n".join(
        [
            f"batch {batch_size}, {length} tokens each, {heads} relation heads, width {width}, float32; "
            f"full matrices at batch {full_batch_size}, memory scaled up; {results['machine']}",
            markdown(["", "ours, MiB", "full, MiB", "ratio", "ours, ms a sample", "full, ms a sample"], rows),
        ]
    )
    save(Path(output_dir), "loss", table, results, loss_plot)
    print(table)


def _measure(
    framework: str, device: str, relation: str, kind: str, shape: tuple[int, int, int, int]
) -> tuple[int, float]:
    """Bytes beyond the inputs and seconds of one loss with its gradient."""
    backend = backends.load(framework, device)
    compute: Callable[..., None] = _ours
    if kind == "full":
        compute = {"torch": _full_torch, "paddle": _full_paddle}[framework]
    samples, length, heads, width = shape
    compute(backend, *_inputs(backend, 2, 4, width), heads, *WEIGHTS[relation])
    sides = _inputs(backend, samples, length, width)
    before = _memory(backend, reset=True)
    start = time.perf_counter()
    compute(backend, *sides, heads, *WEIGHTS[relation])
    seconds = time.perf_counter() - start
    return _memory(backend, reset=False) - before, seconds


def _inputs(backend: Backend, samples: int, length: int, width: int) -> list[QKV]:
    random = np.random.default_rng(0)
    sides = [
        QKV(*(backend.tensor(random.standard_normal((samples, length, width), np.float32)) for _ in range(3)))
        for _ in range(2)
    ]
    for x in sides[1]:
        if backend.name == "torch":
            x.requires_grad_()  # type: ignore[attr-defined]
        else:
            x.stop_gradient = False  # type: ignore[attr-defined]
    return sides


def _memory(backend: Backend, reset: bool) -> int:
    """Bytes in use now, where the peak is reset; else the peak since then."""
    if backend.device == "cpu":
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        return resident()[not reset]
    if backend.name == "torch":
        import torch

        torch.cuda.synchronize()
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    import paddle

    paddle.device.synchronize()
    if reset:
        paddle.device.cuda.reset_max_memory_allocated()
    return paddle.device.cuda.max_memory_allocated()


def _ours(backend: Backend, teacher: QKV, student: QKV, heads: int, alpha: float, beta: float) -> None:
    mask = np.ones(tuple(student.q.shape[:2]))
    value, _ = RelationLoss(heads, alpha, beta)(backend, teacher, student, mask)
    value.backward()  # type: ignore[attr-defined]
    value.item()


def _full_torch(backend: Backend, teacher: Any, student: Any, heads: int, alpha: float, beta: float) -> None:
    import torch

    order = (0, 1, 2, 3) if alpha else (1, 2, 0, 3) if beta else (0, 2, 1, 3)
    total = torch.zeros(())
    for t, s in zip(teacher, student):
        t, s = (x.unflatten(-1, (heads, -1)).permute(order) for x in (t, s))
        scores = [x @ x.transpose(-1, -2) / x.shape[-1] ** 0.5 for x in (t, s)]
        total = total + torch.nn.functional.kl_div(scores[1].log_softmax(-1), scores[0].softmax(-1), reduction="sum")
    total.backward()
    total.item()


def _full_paddle(backend: Backend, teacher: Any, student: Any, heads: int, alpha: float, beta: float) -> None:
    import paddle
    from paddlenlp.transformers.distill_utils import calc_multi_relation_loss

    bias = paddle.zeros([student.q.shape[0], 1, 1, student.q.shape[1]])
    total = paddle.zeros([])
    for t, s in zip(teacher, student):
        t, s = (x.reshape([*x.shape[:2], 12, -1]).swapaxes(1, 2) for x in (t, s))
        total = total + calc_multi_relation_loss(paddle.nn.KLDivLoss("sum"), s, t, bias, heads, alpha, beta)
    total.backward()
    total.item()
