"""``python -m text.prepare``: raw text to shards of tokens, cleaned and without duplicates."""

from __future__ import annotations

import minilm_duet

if __name__ == "__main__":
    minilm_duet.begin()

import sys
from functools import partial
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from backends.files import InputError, leaving_nothing
from programs.commandline import command, parse, run, say_next
from programs.console import console, say
from text.folder import ModelFolder
from text.prepare.pipeline import PrepareArguments, prepare
from text.prepare.workers import on_ray, on_this_machine

DESCRIPTION = "Raw text to shards of tokens, cleaned and without duplicates."


def main(argv: list[str]) -> int:
    def program() -> None:
        arguments = parse(PrepareArguments, _with_address(argv), "text.prepare", DESCRIPTION)
        run_tasks = (
            on_ray(arguments.ray, arguments.processes) if arguments.ray else on_this_machine(arguments.processes)
        )
        columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
        with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
            bars = {}

            def report(stage: str, done: int, total: int, result: str) -> None:
                if stage not in bars:
                    bars[stage] = progress.add_task(stage, total=total)
                progress.update(bars[stage], completed=done)
                if result and (not console.is_terminal or "left out" in result):
                    say(f"{stage} {done}/{total}: {result}")

            with leaving_nothing(Path(arguments.output)):
                manifest = prepare(arguments, run_tasks, report)
        counts = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in manifest["counts"].items())
        say(f"{arguments.output}: {len(manifest['shards'])} shards; {counts}")
        say_following(arguments)

    return run(program, again="the same command")


def say_following(arguments: PrepareArguments) -> None:
    """Prints the next command: distillation of the model that the vocabulary is from, or pretraining of a teacher."""
    teacher = str(Path(arguments.vocab).parent) if Path(arguments.vocab).is_file() else arguments.vocab
    words = ["--input_dir", arguments.output, "--output_dir", "output/student", "--dry_run"]
    distil = partial(command, "general_distill")
    try:
        layers = len(ModelFolder.find(teacher, "vocab").shape.layers)
    except InputError:  # a vocabulary alone
        if arguments.words:
            say_next(
                "What pretraining a teacher on it and distilling that takes:",
                distil("--config", "demo", *words),
            )
        return
    # Each recipe looks at a layer of the teacher.
    recipe = next((name for name, layer in (("ppminilm_6l768h", 19), ("minilmv2_6l384h", 11)) if layers > layer), None)
    if recipe is None:
        say_next("To distil its teacher on it, with --input_dir:", distil("--help"))
        return
    words += ["--teacher_model_name_or_path", teacher]
    say_next("What distilling its teacher on it takes:", distil("--config", recipe, "--device", "auto", *words))


def _with_address(argv: list[str]) -> list[str]:
    """Replaces a bare ``--ray`` by ``--ray=local``."""
    following = [*argv[1:], "--"]
    return [
        "--ray=local" if argument == "--ray" and after.startswith("--") else argument
        for argument, after in zip(argv, following)
    ]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
