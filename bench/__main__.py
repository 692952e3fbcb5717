"""``python -m bench distill``, ``loss`` and ``lengths``."""

from jsonargparse import auto_cli

from bench.distill import distill
from bench.lengths import lengths
from bench.loss import loss

if __name__ == "__main__":
    auto_cli([distill, loss, lengths], as_positional=False)
