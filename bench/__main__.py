"""``python -m bench corpus``, ``distill``, ``finetune``, ``loss``, ``lengths``, ``scaling`` and ``serving``."""

from jsonargparse import auto_cli

from bench.corpus import corpus
from bench.distill import distill
from bench.finetune import finetune
from bench.lengths import lengths
from bench.loss import loss
from bench.scaling import scaling
from bench.serving import serving

if __name__ == "__main__":
    auto_cli([corpus, distill, finetune, loss, lengths, scaling, serving], as_positional=False)
