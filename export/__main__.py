"""``python -m export COMMAND``: from a fine-tuned student to a served model."""

from __future__ import annotations

import minilm_duet

if __name__ == "__main__":
    minilm_duet.begin()

import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from backends.files import leaving_nothing
from export import convert, predict, quantize, serve, triton
from export.benchmark.arguments import BenchmarkArguments
from export.benchmark.program import benchmark
from programs import commandline

RECIPES = Path(__file__).parent / "recipes"


class Command(NamedTuple):
    arguments: type
    program: Callable[[Any], Any]
    positional: Sequence[str]


COMMANDS = {
    "onnx": Command(convert.OnnxArguments, convert.export, ("model", "output")),
    "quantize": Command(quantize.QuantizeArguments, quantize.quantize, ("model", "output")),
    "predict": Command(predict.PredictArguments, predict.predict, ("model", "texts", "output")),
    "benchmark": Command(BenchmarkArguments, benchmark, ("model", "output_dir")),
    "serve": Command(serve.ServeArguments, serve.serve, ("model",)),
    "triton": Command(triton.TritonArguments, triton.triton, ("model", "output")),
}


def main(argv: Sequence[str]) -> int:
    return commandline.run(lambda: _run(argv), "the same command")


def _run(argv: Sequence[str]) -> None:
    heads = {name: command.arguments.__doc__ or "" for name, command in COMMANDS.items()}
    name, rest = commandline.choose(argv, "export", "commands", heads)
    command = COMMANDS[name]
    recipes = RECIPES if name == "quantize" else None
    arguments = commandline.parse(command.arguments, rest, f"export {name}", heads[name], recipes, command.positional)
    output = getattr(arguments, "output", None)
    with leaving_nothing(Path(output)) if output else nullcontext():
        result = command.program(arguments)
    if name == "onnx" and arguments.tokenizer == "none":
        commandline.say_next(
            "To make it smaller and faster, or to serve it as it is:",
            commandline.command("export quantize", result),
            commandline.command("export serve", result),
        )
    elif name == "onnx":
        commandline.say_next("To serve it:", commandline.command("export serve", result))
    elif name == "quantize":
        runtime = ["--runtime", result.runtime] if result.runtime else []
        commandline.say_next("To serve it:", commandline.command("export serve", result.path, *runtime))
    elif name == "predict":
        commandline.say_next("To answer over HTTP:", commandline.command("export serve", arguments.model))
    elif name == "benchmark" and arguments.shape is None:
        commandline.say_next("To export the model:", commandline.command("export onnx", arguments.model))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
