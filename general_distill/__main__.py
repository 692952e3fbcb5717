"""``python -m general_distill``: distils a student from a teacher on a folder of text."""

from __future__ import annotations

import minilm_duet

if __name__ == "__main__":
    minilm_duet.begin()

import sys
from pathlib import Path

import backends
from general_distill.arguments import parse
from general_distill.card import loading_lines
from general_distill.distill import distill
from general_distill.estimate import estimate
from programs.commandline import command, run, say_next
from programs.console import say
from programs.ends import leave_process, rank
from training.launch import launch


def main(argv: list[str]) -> int:
    def program() -> int:
        arguments = parse(argv)
        arguments.backend = backends.choose(arguments.backend)
        code = launch(arguments, arguments.backend, arguments.device, Path(__file__), argv)
        if code is not None:
            return code
        if arguments.dry_run:
            estimate(arguments)
            return 0
        student = distill(arguments)
        if rank() in (None, 0):
            say(f"The student is in {student}. To load it:")
            print("\n".join(loading_lines(student, arguments.backend)), flush=True)
            result = Path("output", "finetuning", student.resolve().name, "tnews")
            model = ["--model_name_or_path", student, "--output_dir", result]
            backend = [] if arguments.backend == backends.choose() else ["--backend", arguments.backend]
            say_next(
                "To fine-tune it on a task, TNEWS for example (--tasks all fetches all):",
                command("finetuning.download", "--tasks", "tnews"),
                command("finetuning", "--recipe", "tnews", *model, "--device", "auto", *backend),
            )
        return 0

    return run(program)


if __name__ == "__main__":
    leave_process(main(sys.argv[1:]))
