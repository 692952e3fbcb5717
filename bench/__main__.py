"""``python -m bench MEASUREMENT``: this project measured, beside other tools."""

from __future__ import annotations

import minilm_duet

if __name__ == "__main__":
    minilm_duet.begin()

import sys
from collections.abc import Callable, Sequence
from typing import Any

from bench.augment import augment
from bench.corpus import corpus
from bench.distill import distill
from bench.distill_task import distill_task
from bench.finetune import finetune
from bench.int8 import int8
from bench.lengths import lengths
from bench.loss import loss
from bench.quality import quality
from bench.runtimes import runtimes
from bench.scaling import scaling
from bench.serving import serving
from programs import commandline

MEASUREMENTS: dict[str, Callable[..., Any]] = {
    measure.__name__: measure
    for measure in (
        *(augment, corpus, distill, distill_task, finetune, int8),
        *(lengths, loss, quality, runtimes, scaling, serving),
    )
}


def main(argv: Sequence[str]) -> int:
    def program() -> None:
        heads = {name: str(measure.__doc__).partition("\n")[0] for name, measure in MEASUREMENTS.items()}
        name, rest = commandline.choose(argv, "bench", "measurements", heads)
        commandline.parse(MEASUREMENTS[name], rest, f"bench {name}", heads[name])

    return commandline.run(program, "the same command")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
