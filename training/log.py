"""What a run tells: a progress bar or lines, ``metrics.jsonl``, a picture of it and TensorBoard events."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from backends.files import atomically
from programs.console import console, say
from training.pictures import CURVE, draw_curve


class RunLog:
    """The log of one phase of training, continued where a resumed run goes on.

    Args:
        folder: where ``metrics.jsonl`` and the event files go.
        phase: what the progress bar is called.
        step, max_steps: where the run starts and where it ends; what was logged
            after `step` by a run that got further is dropped.
        first: whether this is the one of several processes that speaks.
    """

    def __init__(self, folder: Path, phase: str, step: int, max_steps: int, first: bool = True) -> None:
        self.folder, self.phase, self.max_steps, self.first = folder, phase, max_steps, first
        if not first:
            return
        path = folder / "metrics.jsonl"
        # The last line of a killed run may be half written.
        complete = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        records = [record for record in map(_record, complete) if record]
        if len(records) < len(complete):
            say(f"{path}: {len(complete) - len(records)} lines are damaged and left out")
        with atomically(path) as temporary:
            kept = [record for record in records if record["step"] <= step]
            temporary.write_text("".join(f"{json.dumps(record)}\n" for record in kept), encoding="utf-8")
        self._metrics = path.open("a", encoding="utf-8")
        from tensorboardX import SummaryWriter  # which imports PyTorch where that is installed

        self._events = SummaryWriter(str(folder), purge_step=step + 1)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task(phase, total=max_steps, completed=step, status="")

    def __enter__(self) -> RunLog:
        if self.first:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.first:
            self._progress.stop()
            self._metrics.close()
            self._events.close()
            try:
                draw_curve(self.folder, self.phase)
            except OSError as problem:  # which must not hide what ended training
                say(f"{self.folder / CURVE}: not drawn ({problem})")

    def advance(self, step: int, loss: float) -> None:
        """Moves the progress bar."""
        if self.first:
            self._progress.update(self._task, completed=step, status=f"loss {loss:.4g}")

    def evaluated(self, step: int, scores: Mapping[str, float]) -> None:
        """Writes the scores of the model as it is after a step."""
        self._write({"step": step, **{f"dev/{key}": value for key, value in scores.items()}})
        if self.first:
            listed = "  ".join(f"{key} {value:.2f}" for key, value in scores.items())
            say(f"{self.phase} {step}/{self.max_steps}  dev {listed}")

    def record(self, metrics: Mapping[str, float]) -> None:
        """Writes one logging step's metrics; ``step`` is among them."""
        self._write(metrics)
        if self.first and not console.is_terminal:
            say(
                f"{self.phase} {metrics['step']}/{self.max_steps}  loss {metrics['loss']:.4g}  "
                f"lr {metrics['learning_rate']:.3g}  {metrics['sequences_per_second']:.1f} sequences/s"
                + (f"  {metrics['truncated_lines']} lines cut" if metrics["truncated_lines"] else "")
            )

    def _write(self, metrics: Mapping[str, float]) -> None:
        if not self.first:
            return
        # JSON has no infinity, which the gradient norm of a skipped step is.
        finite = {key: value if math.isfinite(value) else None for key, value in metrics.items()}
        self._metrics.write(json.dumps(finite) + "\n")
        self._metrics.flush()
        step = int(metrics["step"])
        for key, value in finite.items():
            if key != "step" and value is not None:
                self._events.add_scalar(f"{self.phase}/{key}", value, step)


def _record(line: bytes) -> dict[str, Any] | None:
    """A logging step's metrics; None if the line is damaged."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or type(record.get("step")) is not int:
        return None
    return record if all(value is None or type(value) in (int, float) for value in record.values()) else None
