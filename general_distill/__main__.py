"""``python -m general_distill``: distils a student from a teacher on a folder of text."""

from __future__ import annotations

import sys

import backends
from general_distill.arguments import parse
from general_distill.card import loading_lines
from general_distill.distill import distill
from training.commandline import run
from training.log import say


def main(argv: list[str]) -> int:
    def program() -> None:
        arguments = parse(argv)
        arguments.backend = backends.choose(arguments.backend)
        student = distill(arguments)
        say(f"The student is in {student}. To load it:")
        print("\n".join(loading_lines(student, arguments.backend)))

    return run(program)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
