"""The arguments of fine-tuning, from the command line and YAML recipes.

The names, meanings and defaults of PP-MiniLM's ``run_clue.py`` are kept.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from backends.files import InputError
from training import commandline
from training.launch import Processes
from training.loop import without_low_precision

RECIPES = Path(__file__).parent / "recipes"


@dataclass
class Arguments(Processes):
    """Fine-tuning on a task of CLUE, or on data of your own."""

    task_name: str
    """the task; classification, reading or labelling for data of your own"""
    model_name_or_path: str
    """the model's folder or its name on the model hub"""
    data_dir: str = "data/clue"
    """folder with the task's files, or with a folder of the task's name that has them"""
    output_dir: str = "best_clue_model"
    """folder for the best model, its predictions, checkpoints and logs"""
    model_type: Literal["ppminilm", "roberta", "bert", "ernie"] = "ppminilm"
    """type of the model, where its folder does not say"""
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

    max_seq_length: int = 128
    """tokens of a sequence that are kept"""
    doc_stride: int = 128
    """reading: tokens from one window of a long context to the next"""
    max_query_length: int = 64
    """reading: tokens of a question that are kept"""
    n_best_size: int = 20
    """reading: answers that are considered"""
    max_answer_length: int = 50
    """reading: tokens of an answer at most"""

    batch_size: int = 32
    """sequences a batch"""
    gradient_accumulation_steps: int = 1
    """batches to an update"""
    num_train_epochs: int = 3
    """passes over the training set, if max_steps is not positive"""
    max_steps: int = -1
    """updates; if not positive, num_train_epochs counts"""
    learning_rate: float = 1e-4
    """peak learning rate"""
    warmup_steps: int = 0
    """updates of linear warm-up; if not positive, warmup_proportion counts"""
    warmup_proportion: float = 0.1
    """share of the updates that are warm-up"""
    weight_decay: float = 0.0
    """AdamW's weight decay, not for biases and layer norms"""
    adam_epsilon: float = 1e-6
    """AdamW's epsilon"""
    max_grad_norm: float = 1.0
    """global norm to which gradients are clipped; 0 clips nothing"""
    logging_steps: int = 100
    """updates between two records in the log"""
    save_steps: int = 100
    """updates between two evaluations on the dev set, each with a checkpoint"""
    keep_checkpoints: int = 1
    """newest checkpoints that are kept"""
    keep_every: int = 0
    """checkpoints of every so many updates are kept too; 0 keeps none"""
    max_nonfinite_steps: int = 10
    """updates in a row whose loss or gradient is not finite, which are left out, before the run stops"""

    resume: bool = False
    """go on with the run in output_dir, if there is one"""
    overwrite: bool = False
    """delete the run in output_dir and start anew"""

    def __post_init__(self) -> None:
        least = {"batch_size": 1, "max_seq_length": 8, "gradient_accumulation_steps": 1}
        for name, number in least.items() if self.max_steps > 0 else {**least, "num_train_epochs": 1}.items():
            if getattr(self, name) < number:
                raise InputError(f"--{name} {getattr(self, name)}: must be at least {number}")
        if not (self.do_train or self.do_eval or self.do_predict):
            raise InputError("--do_train, --do_eval and --do_predict are all false: nothing to do; set one to true")

    def without_effect(self, given: Collection[str]) -> dict[str, str]:
        idle = super().without_effect(given)
        if self.max_steps > 0 and "max_steps" not in given:
            idle["num_train_epochs"] = f"beside --max_steps {self.max_steps}; give --max_steps -1 too"
        if self.warmup_steps > 0 and "warmup_steps" not in given:
            idle["warmup_proportion"] = f"beside --warmup_steps {self.warmup_steps}; give --warmup_steps 0 too"
        idle |= without_low_precision(self.use_amp, self.amp_dtype)
        if self.task_name.lower() != "classification":
            columns = ("text_column", "text_pair_column", "label_column")
            idle |= dict.fromkeys(columns, f"on {self.task_name}; it is for --task_name classification")
        if not self.do_train:
            idle |= dict.fromkeys(("resume", "overwrite"), "beside --do_train false; answers are written anew")
        return idle


def parse(argv: Sequence[str]) -> Arguments:
    """The arguments of a command line and the recipes it names; raises InputError (`training.commandline.parse`)."""
    description = "Fine-tunes a model on a task, evaluates it on the dev set and predicts the test set."
    return commandline.parse(Arguments, argv, "finetuning", description, RECIPES)
