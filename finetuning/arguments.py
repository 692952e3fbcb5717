"""The arguments of fine-tuning, from the command line and YAML recipes.

The names, meanings and defaults of PP-MiniLM's ``run_clue.py`` are kept.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from backends.files import InputError
from programs import commandline
from training.options import EarlierStage, TrainingOptions

RECIPES = Path(__file__).parent / "recipes"


@dataclass(kw_only=True)
class Intermediate(EarlierStage):
    """The stage before the last, in which a student learns what its teacher's layers do."""

    matches: list[str | dict[str, Any]] | None = None
    """with a teacher: what is compared in a stage before the student learns from logits and labels, lines as those of
    matches; without, there is no such stage"""


OF_LOGITS = ("kd_loss", "temperature", "squared_temperature", "probability_shift")
OF_TEACHERS = (
    *OF_LOGITS,
    *("teacher_weights", "teacher_max_seq_length", "kd_weight", "hard_label_weight", "matches"),
    *("unlabelled", "cache_teacher"),
    *(f"intermediate.{item.name}" for item in fields(Intermediate)),
)
"""Options of what is learnt from teachers, and of their logits."""


@dataclass(kw_only=True)
class FinetuneArguments(TrainingOptions):
    """Fine-tuning on a task of CLUE, or on data of your own."""

    task_name: str = ""
    """the task; classification, reading or labelling for data of your own"""
    tasks: list[str] | None = None
    """in place of task_name: tasks that are learnt together, a head each on one encoder; classification:FOLDER is data
    of your own in that folder"""
    task_tau: float = 1.0
    """with tasks: a batch is of a task with a probability in proportion to its number of batches to the power of this;
    0 makes tasks equally likely"""
    model_name_or_path: str
    """the model's folder or its name on the model hub"""
    data_dir: str = "data/clue"
    """folder with the task's files, or with a folder of the task's name that has them"""
    output_dir: str = "best_clue_model"
    """folder for the best model, its predictions, checkpoints and logs; with tasks a folder each in it"""
    batch_size: int = 32
    max_steps: int = -1
    learning_rate: float = 1e-4
    warmup_steps: int = 0
    warmup_proportion: float = 0.1
    weight_decay: float = 0.0
    adam_epsilon: float = 1e-6
    keep_checkpoints: int = 1

    model_type: Literal["ppminilm", "roberta", "bert", "ernie"] = "ppminilm"
    """type of the model, where its folder does not say"""

    teacher_model_name_or_path: list[str] | None = None
    """fine-tuned teachers that the model learns from, each a folder or a name; of several, their mean logits; with
    tasks, the teacher of each"""
    teacher_weights: list[float] | None = None
    """of several teachers: what each one's logits count in the mean, as 2 1; all the same if not given"""
    teacher_max_seq_length: int | None = None
    """with teachers of another vocabulary: tokens of a text that they read; max_seq_length if not given"""
    kd_loss: Literal["ce", "kl", "mse"] = "ce"
    """with teachers: the loss of logits"""
    kd_weight: float = 1.0
    """its weight"""
    temperature: float = 1.0
    """what it divides logits by"""
    squared_temperature: bool = False
    """multiply it by temperature^2"""
    probability_shift: bool = False
    """exchange the teacher's largest logit and that of the right class first"""
    hard_label_weight: float = 0.0
    """with teachers: the weight of the loss of the labels"""
    matches: list[str | dict[str, Any]] | None = None
    """with a teacher: what else is compared, as in general distillation: lines such as {of: states, teacher: 8,
    student: 2, loss: mse, project: linear}, or names of TextBrewer's presets"""

    intermediate: Intermediate = field(default_factory=Intermediate)
    """the stage before the last"""

    unlabelled: str | None = None
    """with teachers: file, or folder of files, of text without labels, which is shuffled among the training set: a text
    a line, a tab between two, or files as data_dir's, whose labels are not read"""
    cache_teacher: str | None = None
    """folder where teachers' logits of the training set are kept, to be computed once; for logits alone"""

    augmented: str | None = None
    """file of the training set in place of data_dir's: rows and their variants, as finetuning.augment writes them"""
    do_train: bool = True
    """train, choosing the best model on the dev set"""
    do_eval: bool = False
    """evaluate the model, trained or given, on the dev set"""
    do_predict: bool = False
    """predict the test set, in the form CLUE takes"""

    text_column: str = "text"
    """classification of your own data: the column with the text"""
    text_pair_column: str | None = None
    """and the one with the second text, if texts come in pairs"""
    label_column: str = "label"
    """and the one with the class"""
    skip_bad_lines: bool = False
    """leave out lines that cannot be read, instead of refusing the file"""

    doc_stride: int = 128
    """reading: tokens from one window of a long context to the next"""
    max_query_length: int = 64
    """reading: tokens of a question that are kept"""
    n_best_size: int = 20
    """reading: answers that are considered"""
    max_answer_length: int = 50
    """reading: tokens of an answer at most"""

    def __post_init__(self) -> None:
        self._check_tasks()
        least = {"batch_size": 1, "max_seq_length": 8, "gradient_accumulation_steps": 1}
        least |= {} if self.max_steps > 0 else {"num_train_epochs": 1}
        self.check_counts(**least, **({} if self.teacher_max_seq_length is None else {"teacher_max_seq_length": 8}))
        for name in ("kd_weight", "hard_label_weight"):
            if getattr(self, name) < 0:
                raise InputError(f"--{name} {getattr(self, name)}: must be at least 0")
        if not self.temperature > 0:
            raise InputError(f"--temperature {self.temperature}: must be greater than 0")
        if self.teacher_weights is not None:
            teachers = self.teacher_model_name_or_path
            given = " ".join(f"{weight:g}" for weight in self.teacher_weights)
            if teachers is not None and len(self.teacher_weights) != len(teachers):
                raise InputError(f"--teacher_weights {given}: must be as many as teachers, {len(teachers)}")
            if not all(0 < weight < math.inf for weight in self.teacher_weights):
                raise InputError(f"--teacher_weights {given}: must be greater than 0")
        if not (self.do_train or self.do_eval or self.do_predict):
            raise InputError("--do_train, --do_eval and --do_predict are all false: nothing to do; set one to true")

    @property
    def task_folders(self) -> list[str]:
        """Names of the folders that several tasks have, in `data_dir` and `output_dir`."""
        parts = [name.partition(":") for name in self.tasks or []]
        return [folder or kind.lower() for kind, _, folder in parts]

    def _check_tasks(self) -> None:
        """Raises InputError unless there is a task, or several."""
        if self.tasks is None:
            if not self.task_name:
                raise InputError("--task_name is missing; give a task, or with --tasks several to be learnt together")
            return
        tasks = " ".join(self.tasks)
        if self.task_name:
            raise InputError(f"--tasks {tasks}: beside --task_name {self.task_name}; give one of the two")
        if len({*self.task_folders}) < max(2, len(self.tasks)):
            raise InputError(f"--tasks {tasks}: must be two or more, each once; of one task give --task_name")
        if not 0 <= self.task_tau < math.inf:
            raise InputError(f"--task_tau {self.task_tau}: must be at least 0")
        if not self.do_train:
            raise InputError(f"--tasks {tasks}: are to be learnt; beside --do_train false give --task_name")
        of_one_task = {name: getattr(self, name) for name in ("augmented", "unlabelled", "teacher_weights")}
        for option, value in {**of_one_task, "intermediate.matches": self.intermediate.matches}.items():
            if value is not None:
                raise InputError(f"--{option} {value}: is for one task; leave it out beside --tasks")
        teachers = self.teacher_model_name_or_path
        if teachers is not None and len(teachers) != len(self.tasks):
            raise InputError(
                f"--teacher_model_name_or_path {' '.join(teachers)}: must be as many as tasks, {len(self.tasks)}, each "
                "task's in its place"
            )

    def without_effect(self, options: Collection[str]) -> dict[str, str]:
        idle = super().without_effect(options)
        tasks = self.tasks or [self.task_name]
        if not any(task.partition(":")[0].lower() == "classification" for task in tasks):
            columns = ("text_column", "text_pair_column", "label_column")
            idle |= dict.fromkeys(columns, f"on {', '.join(tasks)}; it is for --task_name classification")
        if self.tasks is None:
            idle["task_tau"] = "without --tasks"
        if self.intermediate.matches is None:
            schedule = (f"intermediate.{item.name}" for item in fields(EarlierStage))
            idle |= dict.fromkeys(schedule, "without --intermediate.matches; there is no such stage")
        if self.teacher_model_name_or_path is None:
            idle |= dict.fromkeys(OF_TEACHERS, "without --teacher_model_name_or_path")
        elif not self.kd_weight:
            idle |= dict.fromkeys(OF_LOGITS, "beside --kd_weight 0")
        if not self.do_train:
            of_training = ("augmented", "teacher_model_name_or_path", *OF_TEACHERS)
            idle |= dict.fromkeys(of_training, "beside --do_train false")
            idle |= dict.fromkeys(("resume", "overwrite"), "beside --do_train false; answers are written anew")
        return idle

    def of_intermediate(self) -> FinetuneArguments:
        """The arguments of the stage before the last, which learns from its matches alone; raises InputError if a value
        is too small."""
        return replace(
            self,
            **self.intermediate.schedule("intermediate", self),
            output_dir=str(Path(self.output_dir) / "intermediate"),
            kd_weight=0.0,
            hard_label_weight=0.0,
            matches=self.intermediate.matches,
            cache_teacher=None,
        )


def parse(argv: Sequence[str]) -> FinetuneArguments:
    """Parses a command line and the recipes it names; raises InputError (`programs.commandline.parse`)."""
    description = "Fine-tunes a model on a task, or on several, evaluates it on the dev set and predicts the test set."
    return commandline.parse(FinetuneArguments, argv, "finetuning", description, RECIPES)
