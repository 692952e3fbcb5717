"""Options of ``python -m export benchmark``."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from backends.files import InputError
from export.quantize import TaskData


@dataclass
class BenchmarkArguments(TaskData):
    """Speed, accuracy and size in every form, over all runtimes that are installed."""

    model: str = field(kw_only=True)
    """folder of a classifier"""
    output_dir: str = "output/benchmark"
    """folder for tables (Markdown, CSV), figures (JSON) and plots"""
    shape: str | None = None
    """layers and width, 6x768 say: measure a model of that shape with random weights instead"""
    batch_sizes: list[int] = field(default_factory=lambda: [1, 8, 32])
    """sequences that are computed together"""
    lengths: list[int] | None = None
    """tokens of each; without, 16, 32, 64 and 128 as far as the model takes them"""
    examples: int = 0
    """texts of the task's dev set, spread over it; 0 takes all"""
    rounds: int = 3
    """how often all is measured, in turns"""
    seconds: float = 0.5
    """time for a batch size and length in a round"""
    threads: int = 0
    """that compute; 0 takes as many as there are cores"""
    only: list[str] = field(default_factory=list)
    """deployments whose row in the table contains one of these words, and the first, with which they are compared"""

    def __post_init__(self) -> None:
        if min(self.batch_sizes, default=0) < 1:
            raise InputError(f"--batch_sizes {self.batch_sizes}: must be numbers from 1 on")
        if self.lengths is not None and min(self.lengths, default=0) < 3:
            raise InputError(f"--lengths {self.lengths}: must be numbers from 3 on")
        if self.rounds < 1 or self.seconds < 0 or self.examples < 0:
            options = f"--rounds {self.rounds} --seconds {self.seconds} --examples {self.examples}"
            raise InputError(f"{options}: the first must be at least 1, the others not negative")

    def without_effect(self, options: Collection[str]) -> dict[str, str]:
        """Returns the options that others keep from having an effect, each with the reason."""
        names = ("data_dir", "text_column", "text_pair_column", "label_column", "examples")
        return dict.fromkeys(names, "without --task_name") if self.task_name is None else {}
