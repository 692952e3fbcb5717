"""``python -m finetuning``: fine-tunes a model on a task of CLUE, evaluates it, predicts."""

from __future__ import annotations

import sys

from finetuning.arguments import parse
from finetuning.finetune import finetune
from training.commandline import run


def main(argv: list[str]) -> int:
    return run(lambda: finetune(parse(argv)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
