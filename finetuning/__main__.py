"""``python -m finetuning``: fine-tunes a model on a task of CLUE, or on several, evaluates it, predicts."""

from __future__ import annotations

import minilm_duet

if __name__ == "__main__":
    minilm_duet.begin()

import sys
from pathlib import Path

import backends
from finetuning.arguments import FinetuneArguments, parse
from finetuning.finetune import finetune
from finetuning.several_tasks import finetune_together
from programs.commandline import command, run, say_next
from programs.ends import leave_process, rank
from training.launch import launch


def say_end(arguments: FinetuneArguments) -> None:
    """Prints where the results are, and the next command."""
    output = Path(arguments.output_dir)
    model = output if arguments.do_train else arguments.model_name_or_path
    if arguments.tasks is not None:
        folder = output / arguments.task_folders[0]
        say_next(
            f"Each task's model is in a folder of {output}. To export the first as ONNX:",
            command("export onnx", folder),
        )
        return
    what = "The model, its scores and its answers are" if arguments.do_train else "The answers are"
    say_next(f"{what} in {output}. To export the model as ONNX:", command("export onnx", model))


def main(argv: list[str]) -> int:
    def program() -> int:
        arguments = parse(argv)
        arguments.backend = backends.choose(arguments.backend)
        code = launch(arguments, arguments.backend, arguments.device, Path(__file__), argv)
        if code is None:
            (finetune if arguments.tasks is None else finetune_together)(arguments)
            if rank() in (None, 0):
                say_end(arguments)
        return code or 0

    return run(program)


if __name__ == "__main__":
    leave_process(main(sys.argv[1:]))
