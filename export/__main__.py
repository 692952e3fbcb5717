"""``python -m export COMMAND``: from a fine-tuned student to a served model."""

from __future__ import annotations

import minilm_duet

if __name__ == "__main__":
    minilm_duet.leave_folder()

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

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
    heads = {name: command.arguments.__doc__ or "" for name, command in COMMANDS.items()}
    name, rest = commandline.choose(argv, "export", "commands", heads)
    arguments, program, positional = COMMANDS[name]
    program(commandline.parse(arguments, rest, f"export {name}", heads[name], RECIPES, positional))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
