"""The arguments of general distillation, from the command line and YAML recipes.

The names, meanings and defaults of PP-MiniLM's ``general_distill.py`` are kept.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from backends.files import InputError
from objectives.relations import DEFAULT_PAIRS
from programs import commandline
from training.options import EarlierStage, TrainingOptions

RECIPES = Path(__file__).parent / "recipes"
RELATION_OPTIONS = (
    *("num_relation_heads", "teacher_layer_index", "student_layer_index", "alpha", "beta", "padding"),
    "relation_pairs",
)
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


@dataclass(kw_only=True)
class Assistant(EarlierStage):
    """The assistant that learns from the teacher, and that the student then learns from."""

    num_layers: int | None = None
    """layers of an assistant, distilled from the teacher before the student learns from it; without, there is none"""
    init_layers: list[int] | Literal["random"] | None = None
    """teacher layers that the assistant's layers start from, or random; without, as student_init_layers auto"""
    hidden_size: int | None = None
    """assistant's hidden size, if not the teacher's"""
    num_attention_heads: int | None = None
    """assistant's attention heads, if not the teacher's"""
    intermediate_size: int | None = None
    """assistant's feed-forward size, if not the teacher's"""
    matches: list[str | dict[str, Any]] | None = None
    """what of teacher and assistant is compared, lines as those of matches"""


@dataclass(kw_only=True)
class DistillArguments(TrainingOptions):
    """General distillation."""

    input_dir: str
    """folder of text files, UTF-8, one sentence a line"""
    output_dir: str
    """folder for the student, its checkpoints and logs"""
    batch_size: int = 512
    max_steps: int = 400000
    learning_rate: float = 6e-4
    warmup_steps: int = -1
    warmup_proportion: float = 0.01
    weight_decay: float = 0.01
    adam_epsilon: float = 1e-8
    keep_checkpoints: int = 3

    model_type: ModelType = "ppminilm"
    """type of the student: ppminilm, roberta, bert or ernie"""
    teacher_model_type: ModelType = "roberta"
    """type of the teacher, where its folder does not say"""
    teacher_max_seq_length: int | None = None
    """with a student of another vocabulary: tokens of a line that the teacher reads; max_seq_length if not given"""
    teacher_model_name_or_path: str | None = None
    """teacher's folder or its name on the model hub; without, a small one is pretrained on input_dir"""
    student_model_name_or_path: str | None = None
    """folder or name of a student to go on from; its shape holds"""
    student_init_layers: list[int] | Literal["auto", "random"] | None = "auto"  # None was random, in runs of before
    """layers of its teacher that the student's start from, or random; auto takes evenly spaced ones where hidden size,
    heads and feed-forward size are the teacher's, else random"""
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
    """relation heads; must divide the widths of both sides' Q, K, V (MiniLMv2: 48 for base, 64 for large teachers)"""
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

    matches: list[str | dict[str, Any]] | None = None
    """what of the two is compared, in place of relations: lines such as {of: states, teacher: 8, student: 2, loss: mse,
    project: linear}, or names of TextBrewer's presets"""

    bad_lines: Literal["stop", "skip"] = "stop"
    """lines that are not UTF-8, hold NUL bytes or vanish while training: stop, or skip and count them"""
    eval_dir: str | None = None
    """folder of held-out text; every relation is measured on it before and after"""

    dry_run: bool = False
    """say what the run will take, memory, time and disk, after timing a few steps; output_dir is left alone"""
    pretrain: Pretraining = field(default_factory=Pretraining)
    """the teacher that is pretrained when none is given"""
    assistant: Assistant = field(default_factory=Assistant)
    """the assistant between teacher and student"""

    def without_effect(self, on_command_line: Collection[str]) -> dict[str, str]:
        idle = super().without_effect(on_command_line)
        if self.teacher_model_name_or_path is not None:
            reason = "beside --teacher_model_name_or_path; without it a teacher is pretrained"
            idle |= {f"pretrain.{item.name}": reason for item in fields(Pretraining)}
        else:
            reason = "without --teacher_model_name_or_path"
            idle |= dict.fromkeys(("teacher_model_type", "teacher_max_seq_length"), reason)
        if self.assistant.num_layers is None:
            reason = "without --assistant.num_layers; there is no assistant"
            idle |= {f"assistant.{item.name}": reason for item in fields(Assistant)}
        if self.matches is not None:
            idle |= dict.fromkeys(RELATION_OPTIONS, "beside --matches, whose lines say what is compared")
        if self.student_model_name_or_path is not None:
            names = ("num_layers", "hidden_size", "num_attention_heads", "intermediate_size", "hidden_act")
            reason = "beside --student_model_name_or_path, whose shape and weights the student has"
            idle |= dict.fromkeys((*names, "student_init_layers"), reason)
        return idle

    def of_assistant(self) -> DistillArguments:
        """The arguments of the assistant's distillation, to which it is the student.

        Raises:
            InputError: it has nothing to learn, or a value is too small.
        """
        group = self.assistant
        if group.matches is None:
            raise InputError(f"--assistant.num_layers {group.num_layers}: an assistant needs --assistant.matches")
        return replace(
            self,
            **group.schedule("assistant", self),
            output_dir=str(Path(self.output_dir) / "assistant"),
            student_model_name_or_path=None,
            student_init_layers=group.init_layers or "auto",
            matches=group.matches,
            assistant=Assistant(),
        )

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


def parse(argv: Sequence[str]) -> DistillArguments:
    """The arguments of a command line and the recipes it names; raises InputError (`programs.commandline.parse`)."""
    description = "Distils a student from a teacher by their self-attention relations, or by other matches."
    return commandline.parse(DistillArguments, argv, "general_distill", description, RECIPES)
