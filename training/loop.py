"""The training loop, the same for every objective and backend."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from backends.interface import Backend, InputError, Model, Tensor
from training import checkpoint
from training.log import RunLog, say
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
Objective = Callable[[B], tuple[Tensor, dict[str, Tensor]]]
"""Batch -> the loss, differentiable, and its named parts."""


class TrainingFailed(RuntimeError):
    """Training cannot go on; the message says where it was and what is left."""


class Selection(Protocol):
    """Chooses the best of the models that training goes through."""

    def evaluate(self) -> dict[str, float]:
        """Scores of the model as it is; the first is what counts, and the more the better."""

    def keep(self) -> None:
        """Puts the model by: it is the best so far."""


@dataclass(frozen=True)
class TrainingArguments:
    """How to train; the names are those of the command line."""

    max_steps: int
    learning_rate: float
    warmup_steps: int
    weight_decay: float
    adam_epsilon: float
    max_grad_norm: float
    scale_loss: float
    gradient_accumulation_steps: int
    logging_steps: int
    save_steps: int
    keep_checkpoints: int
    seed: int

    @classmethod
    def of(cls, arguments: Any, **own: Any) -> TrainingArguments:
        """From a program's arguments of the same names, but for those given."""
        names = {item.name for item in fields(cls)}
        return cls(**{name: getattr(arguments, name) for name in names - own.keys()}, **own)

    def __post_init__(self) -> None:
        for name in ("max_steps", "gradient_accumulation_steps", "logging_steps", "save_steps", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} {getattr(self, name)}: must be at least 1")
        for name in ("learning_rate", "adam_epsilon", "scale_loss"):
            if not getattr(self, name) > 0:
                raise InputError(f"--{name} {getattr(self, name)}: must be greater than 0")


@dataclass
class Window:
    """Sums since the last logging step."""

    steps: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    truncated: int = 0

    def add(self, values: dict[str, float], truncated: int) -> None:
        self.steps += 1
        self.truncated += truncated
        for key, value in values.items():
            self.sums[key] = self.sums.get(key, 0.0) + value

    def means(self) -> dict[str, float]:
        return {key: value / self.steps for key, value in self.sums.items()}


def seed_of(*numbers: int) -> int:
    """A seed that follows from numbers such as (run's seed, number of the batch)."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def train(
    backend: Backend,
    model: Model,
    objective: Objective[B],
    batches: Callable[[int], Iterator[B]],
    arguments: TrainingArguments,
    folder: Path,
    phase: str,
    lines: int,
    selection: Selection | None = None,
) -> None:
    """Trains `model`, from the newest checkpoint in `folder` if there is one.

    Args:
        objective: the loss of a batch.
        batches: number of a micro-batch -> the batches from there on.
        folder: gets the checkpoints and logs.
        phase: the name of the phase, for the progress bar.
        lines: lines in the corpus, which make an epoch.
        selection: evaluates the model before each checkpoint.

    Raises:
        InputError: a checkpoint is damaged, or was made on other text.
        TrainingFailed: the loss became NaN or infinite.
    """
    optimizer = backend.optimizer(
        model,
        weight_decay=arguments.weight_decay,
        adam_epsilon=arguments.adam_epsilon,
        max_grad_norm=arguments.max_grad_norm,
        loss_scale=arguments.scale_loss,
    )
    step, skipped, sequences, window = 0, 0, 0, Window()
    best: float | None = None
    first = backend.rank == 0
    saved = checkpoint.newest(folder)
    if saved is not None:
        model.load_weights(saved.weights())
        optimizer.load_state(saved.optimizer())
        if saved.state["lines"] != lines:
            raise InputError(
                f"--resume: the text has {lines} lines, but {saved.path} saw {saved.state['lines']}; give the same text"
            )
        step = saved.step
        skipped, sequences = saved.state["skipped"], saved.state["sequences"]
        window = Window(**saved.state["window"])
        best = saved.state["best"]
        say(f"{phase}: goes on after step {step} of {saved.path}")
    accumulation = arguments.gradient_accumulation_steps
    micro_batches = batches(step * accumulation)
    model.train()
    with RunLog(folder, phase, step, arguments.max_steps, first) as log:
        started, seen, seen_tokens = time.perf_counter(), 0, 0
        while step < arguments.max_steps:
            found: list[dict[str, Tensor]] = []
            counts = np.zeros(3)
            for micro in range(accumulation):
                backend.seed(seed_of(arguments.seed, step * accumulation + micro, backend.rank))
                batch = next(micro_batches)
                loss, parts = objective(batch)
                found.append({"loss": loss.detach(), **parts})
                optimizer.backward(loss / accumulation)
                counts += batch.sequences, batch.tokens, batch.truncated
            rate = linear_warmup_decay(
                step - skipped, arguments.learning_rate, arguments.warmup_steps, arguments.max_steps
            )
            report = optimizer.step(rate)
            # Only now, with the whole update under way, is the device asked for its numbers.
            values = {key: sum(parts[key].item() for parts in found) / accumulation for key in found[0]}
            if backend.world_size > 1:
                values, counts = _of_all(backend, values, counts)
            if not math.isfinite(values["loss"]):
                _stop(folder, phase, step + 1, values["loss"])
            step += 1
            skipped += report.skipped
            sequences += int(counts[0])
            seen += int(counts[0])
            seen_tokens += int(counts[1])
            window.add(values, int(counts[2]))
            log.advance(step, values["loss"])
            if step % arguments.logging_steps == 0 or step == arguments.max_steps:
                seconds = time.perf_counter() - started
                metrics: dict[str, Any] = {
                    "step": step,
                    "epoch": sequences / lines,
                    **window.means(),
                    "learning_rate": rate,
                    "grad_norm": report.grad_norm,
                    "truncated_lines": window.truncated,
                    "sequences_per_second": seen / seconds,
                    "tokens_per_second": seen_tokens / seconds,
                }
                if report.loss_scale is not None:
                    metrics |= {"loss_scale": report.loss_scale, "skipped_steps": skipped}
                log.record(metrics)
                window = Window()
                started, seen, seen_tokens = time.perf_counter(), 0, 0
            if step % arguments.save_steps == 0 or step == arguments.max_steps:
                if selection is not None:
                    before = time.perf_counter()
                    model.train(False)
                    scores = selection.evaluate()
                    model.train()
                    started += time.perf_counter() - before
                    log.evaluated(step, scores)
                    score = next(iter(scores.values()))
                    if best is None or score > best:
                        best = score
                        selection.keep()
                state = {
                    "best": best,
                    "lines": lines,
                    "skipped": skipped,
                    "sequences": sequences,
                    "window": asdict(window),
                }
                if first:
                    checkpoint.save(folder, step, model.weights(), optimizer.state(), state, arguments.keep_checkpoints)
    model.train(False)


def _of_all(backend: Backend, values: dict[str, float], counts: np.ndarray) -> tuple[dict[str, float], np.ndarray]:
    """The means of all processes' values, and the sums of their counts."""
    gathered = backend.gather(backend.tensor(np.array([[*values.values(), *counts]])))
    rows = np.concatenate([backend.numpy(row) for row in gathered])
    means = rows.mean(axis=0)[: len(values)]
    return dict(zip(values, means.tolist())), rows[:, len(values) :].sum(axis=0)


def _stop(folder: Path, phase: str, step: int, loss: float) -> None:
    saved = checkpoint.checkpoints(folder)
    last = f"the last good checkpoint is {saved[-1]}" if saved else "there is no checkpoint yet"
    raise TrainingFailed(
        f"{phase}: the loss is {loss} at step {step}; {last}. A lower --learning_rate, or --use_amp false, may help; "
        "--resume goes on from the checkpoint"
    )
