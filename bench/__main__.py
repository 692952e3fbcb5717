"""``python -m bench distill``, ``finetune``, ``loss`` and ``lengths``."""

from jsonargparse import auto_cli

from bench.distill import distill
from bench.finetune import finetune
from bench.lengths import lengths
from bench.loss import loss

if __name__ == "__main__":
    auto_cli([distill, finetune, loss, lengths], as_positional=False)
