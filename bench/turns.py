"""Contenders that take turns, step by step, on the same batches, each in a process of its own."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from backends.interface import Batch
from bench.company import NOTICED
from bench.contenders import PHASES, Contender
from programs.worker import Worker, WorkerEnded, WorkerFailed
from training.report import markdown


class Turns:
    """The processes of contenders; they end when it is left.

    Args:
        contenders: names -> modules of `bench.contenders` and their classes.
        job: what the classes take.
        batches: makes what all train on, in each process.
    """

    def __init__(self, contenders: Mapping[str, str], job: Any, batches: Callable[[], Iterator[Any]]) -> None:
        self._workers = {name: Worker(name, Trainee, where, job, batches) for name, where in contenders.items()}

    def __enter__(self) -> Turns:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers.values():
            worker.close()

    def ask(self, method: str, *arguments: Any) -> dict[str, Any]:
        """What a method of each contender's `Trainee` returns, one after another."""
        return {name: self._call(name, method, *arguments) for name in self._workers}

    def _call(self, name: str, method: str, *arguments: Any) -> Any:
        if method in ("step", "rates"):
            # OpenMP's threads go on spinning for a while, on the next one's cores; ours take the last one for company.
            time.sleep(NOTICED)
        try:
            return self._workers[name].call(method, *arguments)
        except WorkerEnded:
            raise SystemExit(
                f"{name}: its process was ended; if memory ran out, fewer --contenders at a time need less"
            ) from None
        except WorkerFailed as failure:
            raise SystemExit(str(failure)) from None


class Trainee:
    """A contender and the batches that it trains on; a worker has one in its process.

    Args:
        where: module and class of the contender.
    """

    def __init__(self, where: str, job: Any, batches: Callable[[], Iterator[Any]]) -> None:
        module, name = where.split(":")
        self.contender: Contender = getattr(importlib.import_module(f"bench.contenders.{module}"), name)(job)
        self._batches = batches()

    def description(self) -> dict[str, str]:
        """What the contender is called and runs on."""
        return {key: getattr(self.contender, key) for key in ("title", "framework", "precision")}

    def rates(self) -> dict[str, float]:
        """FLOP/s of matrix products by precision."""
        # A CPU multiplies float16 one element at a time.
        precisions = ("float32", "bfloat16", "float16") if self.contender.on_gpu else ("float32", "bfloat16")
        return {precision: self.contender.matrix_rate(precision) for precision in precisions}

    def step(self, number: int) -> dict[str, Any]:
        """Seconds of a training step and of its phases, those of processors, and the lengths of its sequences."""
        self.contender.seconds.clear()
        worked = time.process_time()
        with self.contender.phase("the rest"):
            with self.contender.phase("data"):
                batch = next(self._batches)
            self.contender.step(batch, number)
        tokens = batch if isinstance(batch, Batch) else batch.batch
        seconds = self.contender.seconds
        return {
            **seconds,
            "step": sum(seconds.values()),
            "processors": time.process_time() - worked,
            "lengths": tokens.attention_mask.sum(axis=1),
        }

    def peak_memory(self) -> int:
        """Bytes."""
        return self.contender.peak_memory()


def speeds(steps: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Sequences and tokens a second."""
    seconds = sum(step["step"] for step in steps)
    return {
        "sequences_per_second": sum(len(step["lengths"]) for step in steps) / seconds,
        "tokens_per_second": sum(int(step["lengths"].sum()) for step in steps) / seconds,
    }


def means(steps: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Seconds of a step, of all processors in it, and of its phases."""
    total = {key: sum(step.get(key, 0.0) for step in steps) / len(steps) for key in ("step", "processors", *PHASES)}
    return {
        "step_seconds": total.pop("step"),
        "processor_seconds": total.pop("processors"),
        "phase_seconds": total,
    }


def phase_table(contenders: Sequence[Mapping[str, Any]]) -> str:
    """Milliseconds of each contender's step, and where they go."""
    rows = []
    for contender in contenders:
        step = contender["step_seconds"]
        parts = [contender["phase_seconds"][phase] for phase in PHASES]
        shares = [f"{part * 1e3:,.1f} ({part / step:.1%})" for part in parts]
        rows.append([contender["title"], f"{step * 1e3:,.0f}", *shares])
    return markdown(["", "step", *PHASES], rows)
