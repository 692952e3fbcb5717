"""``python -m finetuning``: fine-tunes a model on a task of CLUE, evaluates it, predicts."""

from __future__ import annotations

import minilm_duet

if __name__ == "__main__":
    minilm_duet.leave_folder()

import sys
from pathlib import Path

import backends
from finetuning.arguments import parse
from finetuning.finetune import finetune
from training.commandline import run
from training.launch import launch


def main(argv: list[str]) -> int:
    def program() -> int:
        arguments = parse(argv)
        arguments.backend = backends.choose(arguments.backend)
        code = launch(arguments, arguments.backend, arguments.device, Path(__file__), argv)
        if code is None:
            finetune(arguments)
        return code or 0

    return run(program)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
