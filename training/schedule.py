"""Learning-rate schedules, as functions of the number of updates done."""

from __future__ import annotations


def linear_warmup_decay(step: int, peak: float, warmup_steps: int, max_steps: int) -> float:
    """The learning rate of the update after `step` others: linearly from 0 to
    `peak` over `warmup_steps`, then linearly to 0 at `max_steps`, as BERT's
    (paddlenlp's LinearDecayWithWarmup, transformers' get_linear_schedule_with_warmup)."""
    if step < warmup_steps:
        return peak * step / max(1, warmup_steps)
    return peak * max(0.0, (max_steps - step) / max(1, max_steps - warmup_steps))


def count_warmup_steps(warmup_steps: int, warmup_proportion: float, max_steps: int) -> int:
    """PP-MiniLM's rule: `warmup_steps` if positive, else that share of the run."""
    return warmup_steps if warmup_steps > 0 else int(warmup_proportion * max_steps)
