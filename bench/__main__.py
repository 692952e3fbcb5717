"""``python -m bench distill`` and ``python -m bench loss``."""

from jsonargparse import auto_cli

from bench.distill import distill
from bench.loss import loss

if __name__ == "__main__":
    auto_cli([distill, loss], as_positional=False)
