"""Options that every program that trains has."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

from backends.files import InputError
from training.launch import Processes


@dataclass(kw_only=True)
class TrainingOptions(Processes):
    """How to train, and on what; a program's own class says other defaults."""

    output_dir: str
    """folder for what comes out, checkpoints and logs"""
    backend: Literal["auto", "torch", "paddle"] = "auto"
    """framework; auto takes the one installed, torch first"""
    device: Literal["auto", "cpu", "gpu", "xpu"] = "gpu"
    """device; auto takes an accelerator if there is one"""
    use_amp: bool = False
    """compute in low precision"""
    amp_dtype: Literal["auto", "bfloat16", "float16"] = "auto"
    """which: auto takes bfloat16 where the device has it, else float16"""
    scale_loss: float = 2**15
    """first loss scale for float16"""
    seed: int = 42
    """random seed; everything random follows from it"""

    max_seq_length: int = 128
    """tokens of a sequence that are kept"""
    batch_size: int
    """sequences a batch"""
    gradient_accumulation_steps: int = 1
    """batches to an update"""
    max_steps: int
    """updates; if not positive, num_train_epochs counts"""
    num_train_epochs: int = 3
    """passes over the data, if max_steps is not positive"""
    learning_rate: float
    """peak learning rate"""
    warmup_steps: int
    """updates of linear warm-up; if not positive, warmup_proportion counts"""
    warmup_proportion: float
    """share of the updates that are warm-up"""
    weight_decay: float
    """AdamW's weight decay, not for biases and layer norms"""
    adam_epsilon: float
    """AdamW's epsilon"""
    max_grad_norm: float = 1.0
    """global norm to which gradients are clipped; 0 clips nothing"""
    logging_steps: int = 100
    """updates between two records in the log"""
    save_steps: int = 100
    """updates between two checkpoints, and evaluations on a dev set"""
    keep_checkpoints: int
    """newest checkpoints that are kept"""
    keep_every: int = 0
    """checkpoints of every so many updates are kept too; 0 keeps none"""
    max_nonfinite_steps: int = 10
    """updates in a row whose loss or gradient is not finite, which are left out, before the run stops"""

    resume: bool = False
    """go on with the run in output_dir, if there is one"""
    overwrite: bool = False
    """delete the run in output_dir and start anew"""

    @property
    def precision(self) -> Literal["auto", "float32", "bfloat16", "float16"]:
        """What matrix products are computed in."""
        return self.amp_dtype if self.use_amp else "float32"

    def check_counts(self, **least: int) -> None:
        """Raises InputError if an option is less than it must be."""
        for name, number in least.items():
            if getattr(self, name) < number:
                raise InputError(f"--{name} {getattr(self, name)}: must be at least {number}")

    def without_effect(self, on_command_line: Collection[str]) -> dict[str, str]:
        idle = super().without_effect(on_command_line)
        if self.max_steps > 0 and "max_steps" not in on_command_line:
            idle["num_train_epochs"] = f"beside --max_steps {self.max_steps}; give --max_steps -1 too"
        if self.warmup_steps > 0 and "warmup_steps" not in on_command_line:
            idle["warmup_proportion"] = f"beside --warmup_steps {self.warmup_steps}; give --warmup_steps 0 too"
        if not self.use_amp:
            idle |= dict.fromkeys(("amp_dtype", "scale_loss"), "without --use_amp")
        elif self.amp_dtype == "bfloat16":
            idle["scale_loss"] = "in bfloat16, which needs no scaling"
        return idle


@dataclass(kw_only=True)
class EarlierStage:
    """How a stage before the last is trained; what is not given is as in the last."""

    max_steps: int | None = None
    """updates of this stage; as many as in the last if not given"""
    num_train_epochs: int | None = None
    """passes over the data in this stage, if its max_steps is not given; as many as in the last if neither is"""
    batch_size: int | None = None
    """sequences a batch in this stage; as in the last if not given"""
    learning_rate: float | None = None
    """peak learning rate of this stage; the last's if not given"""

    def schedule(self, group: str, last: TrainingOptions) -> dict[str, Any]:
        """The options of `TrainingOptions` that this stage has values for.

        Args:
            group: what these options are called on the command line.
            last: those of the last stage.

        Raises:
            InputError: a value is too small.
        """
        for name in ("max_steps", "num_train_epochs", "batch_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise InputError(f"--{group}.{name} {value}: must be at least 1")
        if self.learning_rate is not None and not self.learning_rate > 0:
            raise InputError(f"--{group}.learning_rate {self.learning_rate}: must be greater than 0")
        max_steps = last.max_steps if self.num_train_epochs is None else -1
        values = {
            "max_steps": max_steps if self.max_steps is None else self.max_steps,
            "num_train_epochs": self.num_train_epochs,
            "batch_size": self.batch_size,
            "learning_rate": self.learning_rate,
        }
        return {name: value for name, value in values.items() if value is not None}
