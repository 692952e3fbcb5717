"""``python -m finetuning``: fine-tunes a model on a task of CLUE, evaluates it, predicts."""

from __future__ import annotations

import minilm_duet

if __name__ == "__main__":
    minilm_duet.begin()

import sys
from pathlib import Path

import backends
from finetuning.arguments import FinetuneArguments, parse
from finetuning.finetune import finetune
from programs.commandline import command, run, say_next
from programs.ends import leave_process, rank
from training.launch import launch


def say_end(arguments: FinetuneArguments) -> None:
    """Prints where the results are, and the next command."""
    output = Path(arguments.output_dir)
    model = output if arguments.do_train else arguments.model_name_or_path
    what = "The model, its scores and its answers are" if arguments.do_train else "The answers are"
    say_next(f"{what} in {output}. To export the model as ONNX:", command("export onnx", model))


def main(argv: list[str]) -> int:
    def program() -> int:
        arguments = parse(argv)
        arguments.backend = backends.choose(arguments.backend)
        code = launch(arguments, arguments.backend, arguments.device, Path(__file__), argv)
        if code is None:
            finetune(arguments)
            if rank() in (None, 0):
                say_end(arguments)
        return code or 0

    return run(program)


if __name__ == "__main__":
    leave_process(main(sys.argv[1:]))
