"""The arguments of general distillation, from the command line and YAML recipes.

The names, meanings and defaults of PP-MiniLM's ``general_distill.py`` are kept.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

from backends.files import InputError
from objectives.relations import DEFAULT_PAIRS
from training import commandline
from training.launch import Processes
from training.loop import without_low_precision

RECIPES = Path(__file__).parent / "recipes"
ModelType = Literal["ppminilm", "roberta", "bert", "ernie"]


@dataclass
class Pretraining:
    """The teacher that is pretrained when none is given."""

    vocab_file: str | None = None
    """vocab.txt of the teacher; trained on input_dir without"""
    vocab_size: int = 4000
    """size of the vocabulary that is trained"""
    num_layers: int = 4
    """layers"""
    hidden_size: int = 256
    """hidden size"""
    num_attention_heads: int = 4
    """attention heads"""
    intermediate_size: int = 1024
    """feed-forward size"""
    max_steps: int = 1000
    """training steps"""
    batch_size: int = 32
    """lines a batch"""
    learning_rate: float = 5e-4
    """peak learning rate; warm-up is a tenth of the steps"""


@dataclass
class Arguments(Processes):
    """General distillation."""

    input_dir: str
    """folder of text files, UTF-8, one sentence a line"""
    output_dir: str
    """folder for the student, its checkpoints and logs"""
    backend: Literal["auto", "torch", "paddle"] = "auto"
    """framework; auto takes the one installed, torch first"""
    device: Literal["auto", "cpu", "gpu", "xpu"] = "gpu"
    """device; auto takes an accelerator if there is one"""
    use_amp: bool = False
    """train in low precision"""
    amp_dtype: Literal["auto", "bfloat16", "float16"] = "auto"
    """which: auto takes bfloat16 where the device has it, else float16"""
    scale_loss: float = 2**15
    """first loss scale for float16"""
    seed: int = 42
    """random seed; everything random follows from it"""

    model_type: ModelType = "ppminilm"
    """type of the student: ppminilm, roberta, bert or ernie"""
    teacher_model_type: ModelType = "roberta"
    """type of the teacher, where its folder does not say"""
    teacher_model_name_or_path: str | None = None
    """teacher's folder or its name on the model hub; without, a small one is pretrained on input_dir"""
    student_model_name_or_path: str | None = None
    """folder or name of a student to go on from; its shape holds"""
    student_init_layers: list[int] | None = None
    """teacher layers that the student's layers start from; random without"""
    num_layers: int = 6
    """layers of the student; 2, 4 and 6 have PP-MiniLM's sizes"""
    hidden_size: int | None = None
    """student's hidden size, if not PP-MiniLM's"""
    num_attention_heads: int | None = None
    """student's attention heads, if not PP-MiniLM's"""
    intermediate_size: int | None = None
    """student's feed-forward size, if not PP-MiniLM's"""
    hidden_act: Literal["relu", "gelu"] = "relu"
    """student's activation function"""

    num_relation_heads: int = 64
    """relation heads; must divide both hidden sizes (MiniLMv2: 48 for base, 64 for large teachers)"""
    teacher_layer_index: int | list[int] = 19
    """teacher's layer, from 0; a list for several pairs of layers"""
    student_layer_index: int | list[int] = 5
    """student's layer, from 0; a list for several pairs of layers"""
    alpha: float = 0.0
    """weight of the head-head relation"""
    beta: float = 0.0
    """weight of the sample-sample relation; token-token has the rest"""
    padding: Literal["masked", "ppminilm"] = "masked"
    """masked leaves padding out; ppminilm counts it, as PaddleNLP's code does"""
    gather_samples: bool = True
    """with several processes and masked padding, relate the samples of all; false: each its own, which costs less"""
    relation_pairs: dict[str, float] = field(default_factory=lambda: dict(DEFAULT_PAIRS))
    """pairs of q, k, v that are related, each with its weight"""

    bad_lines: Literal["stop", "skip"] = "stop"
    """lines that are not UTF-8, hold NUL bytes or vanish while training: stop, or skip and count them"""
    max_seq_length: int = 128
    """tokens of a line that are kept"""
    batch_size: int = 512
    """lines a batch"""
    gradient_accumulation_steps: int = 1
    """batches to an update"""
    max_steps: int = 400000
    """updates; if not positive, num_train_epochs counts"""
    num_train_epochs: int = 3
    """passes over the text, if max_steps is not positive"""
    learning_rate: float = 6e-4
    """peak learning rate"""
    warmup_steps: int = -1
    """updates of linear warm-up; if not positive, warmup_proportion counts"""
    warmup_proportion: float = 0.01
    """share of the updates that are warm-up"""
    weight_decay: float = 0.01
    """AdamW's weight decay, not for biases and layer norms"""
    adam_epsilon: float = 1e-8
    """AdamW's epsilon"""
    max_grad_norm: float = 1.0
    """global norm to which gradients are clipped; 0 clips nothing"""
    logging_steps: int = 100
    """updates between two records in the log"""
    save_steps: int = 100
    """updates between two checkpoints"""
    keep_checkpoints: int = 3
    """newest checkpoints that are kept"""
    keep_every: int = 0
    """checkpoints of every so many updates are kept too; 0 keeps none"""
    max_nonfinite_steps: int = 10
    """updates in a row whose loss or gradient is not finite, which are left out, before the run stops"""
    eval_dir: str | None = None
    """folder of held-out text; every relation is measured on it before and after"""

    resume: bool = False
    """go on with the run in output_dir, if there is one"""
    overwrite: bool = False
    """delete the run in output_dir and start anew"""
    dry_run: bool = False
    """say what the run will take, memory, time and disk, after timing a few steps; output_dir is left alone"""
    pretrain: Pretraining = field(default_factory=Pretraining)
    """the teacher that is pretrained when none is given"""

    def without_effect(self, given: Collection[str]) -> dict[str, str]:
        idle = super().without_effect(given)
        if self.max_steps > 0 and "max_steps" not in given:
            idle["num_train_epochs"] = f"beside --max_steps {self.max_steps}; give --max_steps -1 too"
        if self.warmup_steps > 0 and "warmup_steps" not in given:
            idle["warmup_proportion"] = f"beside --warmup_steps {self.warmup_steps}; give --warmup_steps -1 too"
        idle |= without_low_precision(self.use_amp, self.amp_dtype)
        if self.teacher_model_name_or_path is not None:
            reason = "beside --teacher_model_name_or_path; without it a teacher is pretrained"
            idle |= {f"pretrain.{item.name}": reason for item in fields(Pretraining)}
        else:
            idle["teacher_model_type"] = "without --teacher_model_name_or_path"
        if self.student_model_name_or_path is not None:
            names = ("num_layers", "hidden_size", "num_attention_heads", "intermediate_size", "hidden_act")
            reason = "beside --student_model_name_or_path, whose shape and weights the student has"
            idle |= dict.fromkeys((*names, "student_init_layers"), reason)
        return idle

    def layer_pairs(self) -> list[tuple[int, int]]:
        """(teacher layer, student layer) pairs.

        Raises:
            InputError: not as many of the one as of the other.
        """
        teacher, student = (
            index if isinstance(index, list) else [index]
            for index in (self.teacher_layer_index, self.student_layer_index)
        )
        if len(teacher) != len(student) or not teacher:
            raise InputError(
                f"--teacher_layer_index {teacher} --student_layer_index {student}: {len(teacher)} layers and "
                f"{len(student)}; give as many of the one as of the other"
            )
        return list(zip(teacher, student))


def parse(argv: Sequence[str]) -> Arguments:
    """The arguments of a command line and the recipes it names; raises InputError (`training.commandline.parse`)."""
    description = "Distils a student from a teacher by their self-attention relations."
    return commandline.parse(Arguments, argv, "general_distill", description, RECIPES)
