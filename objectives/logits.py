"""How a student's answers differ from its teacher's: distillation of logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from backends.files import InputError
from backends.interface import Backend, Tensor
from objectives.divergence import CE, KL, MSE, as_float

DIVERGENCES = {"kl": KL, "ce": CE, "mse": MSE}


class Rows(NamedTuple):
    """R rows of logits that are compared; `Tokens` says what counts are of several processes."""

    teacher: Tensor
    student: Tensor
    """[R, C] each."""
    targets: np.ndarray
    """int64 [R], the right class of each, negative where it is not known."""
    counted: float
    """Rows."""
    known: float
    """Rows whose class is known."""
    entries: float
    """Logits, without those that only fill up rows."""


@dataclass(frozen=True)
class LogitsLoss:
    """Distillation of logits (Hinton et al., 2015, arXiv:1503.02531), as TextBrewer has it.

    ``ce`` is the mean over rows of -softmax(t / T) log softmax(s / T), ``kl`` that less the teacher's entropy, ``mse``
    the mean over rows and classes of (t / T - s / T)^2. TinyBERT's is ``ce`` divided by the number of classes.

    Args:
        temperature: T.
        squared: multiply by temperature^2, which keeps the gradient's size as the temperature grows (Hinton et al.);
            TextBrewer does not.
        probability_shift: exchange the teacher's largest logit and that of the right class, where that is known (Wen
            et al., 2019, arXiv:1911.07471).
        temperature_schedule: ``constant``, or a temperature for each row (the same paper): T + beta * (mean w - w),
            where ``flsw`` has w = (1 - cosine of t and s)^gamma and ``cwsm`` w = 1 / (max softmax(s) + 0.001); the
            mean is over the rows of all processes.

    Raises:
        InputError: a value that makes no sense.
    """

    loss: Literal["kl", "ce", "mse"] = "ce"
    temperature: float = 1.0
    squared: bool = False
    probability_shift: bool = False
    temperature_schedule: Literal["constant", "flsw", "cwsm"] = "constant"
    beta: float = 1.0
    gamma: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise InputError(f"temperature {self.temperature}: must be greater than 0")

    def __call__(self, backend: Backend, rows: Rows, together: bool = False) -> Tensor:
        """The loss, a float32 scalar, differentiable in the student's logits; `together`, several processes share the
        rows."""
        t, s = (as_float(x.detach()) for x in (rows.teacher, rows.student))
        if self.probability_shift:
            t = shift_probabilities(backend, t, rows.targets)
        temperature = self._temperatures(backend, t, s, together)
        divergence = DIVERGENCES[self.loss]
        value, g = divergence.compare(
            divergence.prepare(backend, t / temperature), divergence.prepare(backend, s / temperature)
        )
        weight = 1.0 / (rows.entries if self.loss == "mse" else rows.counted)
        if self.squared:
            weight *= self.temperature**2
        return backend.with_gradient(value * weight, [rows.student], [g * weight / temperature])

    def _temperatures(self, backend: Backend, t: Tensor, s: Tensor, together: bool) -> Any:
        """The temperature, or that of each row, [R, 1]."""
        if self.temperature_schedule == "constant":
            return self.temperature
        if self.temperature_schedule == "flsw":
            t, s = (x / ((x * x).sum(-1).sqrt() + 1e-4).reshape([-1, 1]) for x in (t, s))
            # rounding errors of cosines near 1 would be powers of less than 0
            w = ((t * s).sum(-1) * -1.0 + 1.0).clip(min=0.0) ** self.gamma
        else:
            w = (backend.log_softmax(s).amax(-1).exp() + 1e-3) ** -1.0
        sums = np.array([w.sum().item(), w.shape[0]], np.float64)
        total, count = (backend.total(sums) if together else sums).tolist()
        return ((w * -1.0 + total / count) * self.beta + self.temperature).reshape([-1, 1])


def shift_probabilities(backend: Backend, logits: Tensor, targets: np.ndarray) -> Tensor:
    """Logits [R, C] with the largest of each row and that of its target, if not negative, exchanged."""
    known = np.flatnonzero(targets >= 0)
    shifted = logits + 0.0
    if known.size:
        rows, right = backend.tensor(known), backend.tensor(targets[known])
        largest = logits.argmax(-1)[rows]
        shifted[rows, right] = logits[rows, largest]
        shifted[rows, largest] = logits[rows, right]
    return shifted
