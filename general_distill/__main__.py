"""``python -m general_distill``: distils a student from a teacher on a folder of text."""

from __future__ import annotations

import sys

import backends
from backends.interface import InputError
from general_distill.arguments import parse
from general_distill.card import loading_lines
from general_distill.distill import distill
from training.log import say
from training.loop import TrainingFailed


def main(argv: list[str]) -> int:
    try:
        arguments = parse(argv)
        arguments.backend = backends.choose(arguments.backend)
        student = distill(arguments)
    except (InputError, TrainingFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    except OSError as error:
        print(f"error: {error}; what was saved before is intact, --resume goes on from it", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; --resume goes on from the last checkpoint", file=sys.stderr)
        return 130
    say(f"The student is in {student}. To load it:")
    print("\n".join(loading_lines(student, arguments.backend)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
