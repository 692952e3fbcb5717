"""``python -m bench distill``, ``finetune``, ``loss``, ``lengths`` and ``serving``."""

from jsonargparse import auto_cli

from bench.distill import distill
from bench.finetune import finetune
from bench.lengths import lengths
from bench.loss import loss
from bench.serving import serving

if __name__ == "__main__":
    auto_cli([distill, finetune, loss, lengths, serving], as_positional=False)
