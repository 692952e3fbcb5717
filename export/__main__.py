"""``python -m export COMMAND``: from a fine-tuned student to a served model."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from backends.interface import InputError
from export import benchmark, convert, predict, quantize, serve, triton
from training import commandline

RECIPES = Path(__file__).parent / "recipes"


class Command(NamedTuple):
    arguments: type
    program: Callable[[Any], Any]
    positional: Sequence[str]


COMMANDS = {
    "onnx": Command(convert.OnnxArguments, convert.export, ("model", "output")),
    "quantize": Command(quantize.QuantizeArguments, quantize.quantize, ("model", "output")),
    "predict": Command(predict.PredictArguments, predict.predict, ("model", "texts", "output")),
    "benchmark": Command(benchmark.BenchmarkArguments, benchmark.benchmark, ("model", "output_dir")),
    "serve": Command(serve.ServeArguments, serve.serve, ("model",)),
    "triton": Command(triton.TritonArguments, triton.triton, ("model", "output")),
}


def main(argv: Sequence[str]) -> int:
    return commandline.run(lambda: _run(argv), "the same command")


def _run(argv: Sequence[str]) -> None:
    told = "\n".join(f"  {name:10} {command.arguments.__doc__}" for name, command in COMMANDS.items())
    if argv and argv[0] in ("-h", "--help"):
        print(f"{__doc__}\n\ncommands, each with a --help of its own:\n{told}")
        return
    if not argv or argv[0] not in COMMANDS:
        given = f"{argv[0]}: no such command" if argv else "no command given"
        raise InputError(f"python -m export: {given}; there are {', '.join(COMMANDS)}")
    name, *rest = argv
    arguments, program, positional = COMMANDS[name]
    description = arguments.__doc__ or ""
    program(commandline.parse(arguments, rest, f"export {name}", description, RECIPES, positional))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
