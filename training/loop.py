"""The training loop, the same for every objective and backend."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np

from backends.files import InputError
from backends.interface import Backend, StepReport, Tensor, Trainable, Weights
from programs.console import say
from programs.ends import Preempted, TrainingFailed
from training import checkpoint
from training.log import RunLog
from training.schedule import linear_warmup_decay


class Counted(Protocol):
    """A batch, as far as the loop looks into it."""

    @property
    def sequences(self) -> int: ...
    @property
    def tokens(self) -> int: ...
    @property
    def truncated(self) -> int: ...


B = TypeVar("B", bound=Counted)
Objective = Callable[[B, float], tuple[Tensor, dict[str, Tensor]]]
"""Batch, and how much of training is done, from 0 to 1 -> the loss, differentiable, and its named parts. Which parts
there are may differ from micro-batch to micro-batch, but not from process to process."""


class Selection(Protocol):
    """Chooses the best of the models that training goes through."""

    def evaluate(self) -> dict[str, float]:
        """Scores of the model as it is; the first is what counts, and the more the better."""

    def keep(self) -> str:
        """Puts the model by: it is the best so far. Returns what tells it from others."""


@dataclass(frozen=True)
class TrainingArguments:
    """How to train; the names are those of the command line."""

    max_steps: int
    learning_rate: float
    warmup_steps: int = 0
    weight_decay: float = 0.0
    adam_epsilon: float = 1e-6
    max_grad_norm: float = 1.0
    scale_loss: float = 2**15
    gradient_accumulation_steps: int = 1
    logging_steps: int = 100
    save_steps: int = 100
    keep_checkpoints: int = 1
    keep_every: int = 0
    max_nonfinite_steps: int = 10
    seed: int = 42

    @classmethod
    def of(cls, arguments: Any, **own: Any) -> TrainingArguments:
        """From a program's arguments of the same names, but for those given."""
        names = {item.name for item in fields(cls)}
        return cls(**{name: getattr(arguments, name) for name in names - own.keys()}, **own)

    def __post_init__(self) -> None:
        counts = ("max_steps", "gradient_accumulation_steps", "logging_steps", "save_steps", "keep_checkpoints")
        for name in (*counts, "max_nonfinite_steps"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} {getattr(self, name)}: must be at least 1")
        if self.keep_every < 0 or self.keep_every % self.save_steps:
            raise InputError(
                f"--keep_every {self.keep_every}: must be a multiple of --save_steps {self.save_steps}, or 0"
            )
        for name in ("learning_rate", "adam_epsilon", "scale_loss"):
            if not getattr(self, name) > 0:
                raise InputError(f"--{name} {getattr(self, name)}: must be greater than 0")


@dataclass
class Window:
    """Sums since the last logging step."""

    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    """Of steps that had the value."""
    truncated: int = 0

    def add(self, values: dict[str, float], truncated: int) -> None:
        self.truncated += truncated
        for key, value in values.items():
            self.sums[key] = self.sums.get(key, 0.0) + value
            self.counts[key] = self.counts.get(key, 0) + 1

    def means(self) -> dict[str, float]:
        return {key: value / self.counts[key] for key, value in self.sums.items()} or {"loss": math.nan}


@dataclass
class Progress:
    """Where a run is; what a checkpoint holds of it beside weights."""

    lines: int
    """In the corpus."""
    lines_per_update: int | None = None
    """Of all processes, if always the same."""
    step: int = 0
    skipped: int = 0
    """Updates that changed nothing, by which the schedule is behind."""
    sequences: int = 0
    """That all processes have seen."""
    best: float | None = None
    """The best score of the selection."""
    kept: str | None = None
    """The model that had it, as the selection told."""
    nonfinite_steps: int = 0
    nonfinite_in_a_row: int = 0
    window: Window = field(default_factory=Window)

    def state(self) -> dict[str, Any]:
        state = asdict(self)
        del state["step"]
        return state

    @classmethod
    def of(cls, step: int, state: Mapping[str, Any]) -> Progress:
        return cls(**{**state, "step": step, "window": Window(**state["window"])})


def seed_of(*numbers: int) -> int:
    """A seed that follows from numbers such as (run's seed, number of the batch)."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def train(
    backend: Backend,
    model: Trainable,
    objective: Objective[B],
    batches: Callable[[int, int], Iterator[B]],
    arguments: TrainingArguments,
    folder: Path,
    phase: str,
    lines: int,
    lines_per_update: int | None = None,
    selection: Selection | None = None,
) -> str | None:
    """Trains `model`, from the newest checkpoint in `folder` if there is one.

    Args:
        objective: the loss of a batch.
        batches: how many micro-batches this process has seen, and sequences all have -> the batches from there on.
        folder: gets the checkpoints and logs.
        phase: the name of the phase, for the progress bar.
        lines: lines in the corpus, which make an epoch.
        lines_per_update: of all processes; that it is another than the checkpoint's is said.
        selection: evaluates the model before each checkpoint.

    Returns:
        What the selection told of the best model.

    Raises:
        InputError: a checkpoint was made on other text.
        TrainingFailed: the loss was NaN or infinite too often; what it was computed from is left in `folder`.
        Preempted: SIGTERM came; a checkpoint was written.
    """
    run = _Run(backend, model, objective, arguments, folder, phase, Progress(lines, lines_per_update), selection)
    run.restore()
    progress, accumulation = run.progress, arguments.gradient_accumulation_steps
    micro_batches = batches(progress.step * accumulation, progress.sequences)
    model.train()
    first = backend.rank == 0
    with Preemption() as preemption, RunLog(folder, phase, progress.step, arguments.max_steps, first) as log:
        while progress.step < arguments.max_steps:
            measured = run.update([next(micro_batches) for _ in range(accumulation)], preemption)
            step = progress.step
            log.advance(step, measured.loss)
            last = step == arguments.max_steps
            if step % arguments.logging_steps == 0 or last:
                log.record(run.metrics(measured))
            if step % arguments.save_steps == 0 or last:
                run.evaluate(log)
                run.save()
            elif measured.preempted:
                run.save()
            if measured.preempted:
                raise run.preempted()
        if backend.total(np.array([int(preemption.is_requested)]))[0]:  # since the last update
            raise run.preempted()
    model.train(False)
    return progress.kept


class Timed(NamedTuple):
    """What `time_steps` found."""

    seconds: list[float]
    """Of each step, its batches included."""
    sequences_per_second: float
    tokens_per_second: float
    """Of all processes."""
    checkpoint_seconds: float
    """To write a checkpoint."""
    checkpoint_bytes: int


def time_steps(
    backend: Backend,
    model: Trainable,
    objective: Objective[B],
    batches: Callable[[int, int], Iterator[B]],
    arguments: TrainingArguments,
    folder: Path,
    warmup: int,
    steps: int,
) -> Timed:
    """Trains `model` for a few steps as `train` does, without a log, and writes one checkpoint.

    Args:
        model: one that no other run trains.
        objective, batches, arguments: as `train` takes them.
        folder: gets the checkpoint; empty.
        warmup: steps before those that are timed, at least 1.
        steps: steps that are timed.
    """
    run = _Run(backend, model, objective, arguments, folder, "timing", Progress(1), None)
    micro_batches = batches(0, 0)
    model.train()
    times = [time.perf_counter()]
    for number in range(1, warmup + steps + 1):
        measured = run.update([next(micro_batches) for _ in range(arguments.gradient_accumulation_steps)], None)
        times.append(time.perf_counter())
        if number in (warmup, warmup + steps):
            metrics = run.metrics(measured)
    model.train(False)
    started = time.perf_counter()
    run.save()
    return Timed(
        np.diff(times[warmup:]).tolist(),
        metrics["sequences_per_second"],
        metrics["tokens_per_second"],
        time.perf_counter() - started,
        sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
    )


class Preemption:
    """While it lasts, SIGTERM is noted instead of ending the process, and once noted it stays without effect:
    launchers send it again while a process leaves."""

    def __init__(self) -> None:
        self.is_requested = False

    def __enter__(self) -> Preemption:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, reason: type[BaseException] | None, *_: object) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_IGN if reason is Preempted else self._before)
            if self.is_requested and reason is None:  # noted after training last looked
                signal.raise_signal(signal.SIGTERM)

    def _note(self, *_: object) -> None:
        self.is_requested = True


class _Measured(NamedTuple):
    """What an update told, of all processes."""

    loss: float
    rate: float
    report: StepReport
    preempted: bool


class _Run(Generic[B]):
    """A run of `train`: its parts, and where it is."""

    def __init__(
        self,
        backend: Backend,
        model: Trainable,
        objective: Objective[B],
        arguments: TrainingArguments,
        folder: Path,
        phase: str,
        progress: Progress,
        selection: Selection | None,
    ) -> None:
        self.backend, self.model, self.objective = backend, model, objective
        self.arguments, self.folder, self.phase, self.selection = arguments, folder, phase, selection
        self.optimizer = backend.optimizer(
            model,
            weight_decay=arguments.weight_decay,
            adam_epsilon=arguments.adam_epsilon,
            max_grad_norm=arguments.max_grad_norm,
            loss_scale=arguments.scale_loss,
        )
        self.progress = progress
        self.saved: Path | None = None
        self._restart_clock()

    def restore(self) -> None:
        """Goes to the newest checkpoint that is whole, if there is one."""
        newest = checkpoint.newest(self.folder)
        step = newest.step if newest else 0
        if self.backend.total(np.array([step]))[0] != step * self.backend.world_size:
            raise TrainingFailed(
                f"{self.phase}: processes see different checkpoints in {self.folder}; give a folder that all see alike"
            )
        if newest is None:
            return
        self.saved = newest.path
        lines, per_update = self.progress.lines, self.progress.lines_per_update
        if newest.state.get("lines") != lines:
            raise InputError(
                f"--resume: the text has {lines} lines, but {newest.path} saw {newest.state.get('lines')}; "
                "give the same text"
            )
        self.model.load_weights(newest.weights())
        self.optimizer.load_state(newest.optimizer())
        try:
            self.progress = Progress.of(newest.step, newest.state)
        except TypeError as error:
            raise InputError(f"--resume: {newest.path} is of another version ({error}); give --overwrite") from error
        say(f"{self.phase}: goes on after step {newest.step} of {newest.path}")
        if self.progress.lines_per_update != per_update:
            say(f"{self.phase}: an update was of {self.progress.lines_per_update} lines, and is of {per_update} now")
            self.progress.lines_per_update = per_update

    def update(self, batches: Sequence[B], preemption: Preemption | None) -> _Measured:
        """One step of the optimizer."""
        backend, arguments, progress = self.backend, self.arguments, self.progress
        measured: list[dict[str, Tensor]] = []
        counts = np.zeros(4)
        done = progress.step / arguments.max_steps
        for micro, batch in enumerate(batches):
            number = progress.step * len(batches) + micro
            backend.seed(seed_of(arguments.seed, number, backend.rank))
            loss, parts = self.optimizer.forward(partial(self.objective, batch, done), micro == len(batches) - 1)
            self.optimizer.backward(loss / len(batches))
            measured.append({"loss": loss.detach(), **parts})
            counts += batch.sequences, batch.tokens, batch.truncated, 0
        rate = linear_warmup_decay(
            progress.step - progress.skipped, arguments.learning_rate, arguments.warmup_steps, arguments.max_steps
        )
        report = self.optimizer.step(rate)
        # Only now, with the whole update under way, is the device asked for its numbers.
        values = {
            key: fmean(parts[key].item() for parts in measured if key in parts)
            for key in dict.fromkeys(key for parts in measured for key in parts)
        }
        counts[3] = preemption is not None and preemption.is_requested
        totals = backend.total(np.array([*values.values(), *counts]))
        values = dict(zip(values, (totals[: len(values)] / backend.world_size).tolist()))
        counts = totals[len(values) :]
        progress.step += 1
        progress.skipped += report.skipped
        progress.sequences += int(counts[0])
        self._seen += counts[:2].astype(int)
        if math.isfinite(values["loss"]) and (math.isfinite(report.grad_norm) or report.loss_scale is not None):
            progress.nonfinite_in_a_row = 0
            progress.window.add(values, int(counts[2]))
        else:
            self._count_nonfinite(values["loss"], report.grad_norm, batches)
        return _Measured(values["loss"], rate, report, bool(counts[3]))

    def _count_nonfinite(self, loss: float, norm: float, batches: Sequence[B]) -> None:
        progress, most = self.progress, self.arguments.max_nonfinite_steps
        progress.nonfinite_steps += 1
        progress.nonfinite_in_a_row += 1
        if progress.nonfinite_in_a_row < most:
            return
        path = self.folder / f"nonfinite-step-{progress.step}-rank-{self.backend.rank}.npz"
        arrays: dict[str, Any] = {key: a for i, batch in enumerate(batches) for key, a in _arrays(batch, str(i))}
        np.savez(path, **arrays)
        raise TrainingFailed(
            f"{self.phase}: loss {loss}, gradient's norm {norm} at step {progress.step}, the last of {most} in a row "
            f"that were left out; its batch is in {path}, {self._last_saved()}. A lower --learning_rate, or --use_amp "
            "false, may help"
        )

    def metrics(self, measured: _Measured) -> dict[str, Any]:
        """What is logged, over the steps since this was last asked."""
        progress, report = self.progress, measured.report
        seconds = time.perf_counter() - self._started
        record = {
            "step": progress.step,
            "epoch": progress.sequences / progress.lines,
            **progress.window.means(),
            "learning_rate": measured.rate,
            "grad_norm": report.grad_norm,
            "truncated_lines": progress.window.truncated,
            "sequences_per_second": self._seen[0] / seconds,
            "tokens_per_second": self._seen[1] / seconds,
        }
        if report.loss_scale is not None:
            record |= {"loss_scale": report.loss_scale, "skipped_steps": progress.skipped}
        if progress.nonfinite_steps:
            record["nonfinite_steps"] = progress.nonfinite_steps
        progress.window = Window()
        self._restart_clock()
        return record

    def preempted(self) -> Preempted:
        return Preempted(f"{self.phase}: stopped by SIGTERM; {self.saved} holds step {self.progress.step}")

    def weights(self) -> Weights:
        """The model's.

        Raises:
            TrainingFailed: some are not finite: an update may leave such weights where its loss was finite.
        """
        weights = self.model.weights()
        broken = [name for name, array in weights.items() if not np.isfinite(array).all()]
        if broken:
            raise TrainingFailed(
                f"{self.phase}: {len(broken)} of {len(weights)} weights are not finite after step "
                f"{self.progress.step}, first {broken[0]}; {self._last_saved()}. A lower --learning_rate may help"
            )
        return weights

    def _last_saved(self) -> str:
        saved = checkpoint.checkpoints(self.folder)
        return f"the last checkpoint is {saved[-1]}" if saved else "there is no checkpoint yet"

    def evaluate(self, log: RunLog) -> None:
        """Looks whether the model is the best so far."""
        if self.selection is None:
            return
        before = time.perf_counter()
        self.weights()
        self.model.train(False)
        scores = self.selection.evaluate()
        self.model.train()
        self._started += time.perf_counter() - before
        log.evaluated(self.progress.step, scores)
        score = next(iter(scores.values()))
        if self.progress.best is None or score > self.progress.best:
            self.progress.best = score
            self.progress.kept = self.selection.keep()

    def save(self) -> None:
        """Writes a checkpoint, from one process."""
        progress, arguments = self.progress, self.arguments
        self.saved = checkpoint.folder_of(self.folder, progress.step)
        if self.backend.rank == 0:
            checkpoint.save(
                self.folder,
                progress.step,
                self.weights(),
                self.optimizer.state(),
                progress.state(),
                arguments.keep_checkpoints,
                arguments.keep_every,
            )

    def _restart_clock(self) -> None:
        self._started, self._seen = time.perf_counter(), np.zeros(2, np.int64)


def _arrays(value: Any, name: str) -> Iterator[tuple[str, np.ndarray]]:
    """The arrays in a batch, by where they are in it."""
    if isinstance(value, np.ndarray):
        yield name, value
    elif is_dataclass(value) or hasattr(value, "_asdict"):
        inner = value._asdict() if hasattr(value, "_asdict") else vars(value)
        for key, item in inner.items():
            yield from _arrays(item, f"{name}.{key}")
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from _arrays(item, f"{name}.{i}")
