"""``python -m bench lengths``: what the lengths in a batch do to padding and to the sample-sample relation."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from bench.report import corpus_and_tokenizer
from training.report import markdown


def lengths(
    batch_sizes: list[int] = [16, 128],  # noqa: B006
    max_seq_length: int = 128,
    window: int = 100,
    batches: int = 500,
    input_dir: str | None = None,
    vocab_file: str | None = None,
) -> None:
    """Compares batches of random lines with batches of similar length.

    At each position of a batch the samples that reach it are related to one another.
    Prints how much of the padded batch is tokens, how many samples a token's relation
    spans (itself included), and how many tokens have no other sample beside them, which
    learn nothing from this relation.

    Args:
        batch_sizes: lines a batch.
        max_seq_length: tokens of a line that are kept.
        window: batches that are sorted by length together, to make them of similar length.
        batches: batches that are looked at.
        input_dir: folder of text, one sentence a line; without, the project's data folder or its demo corpus.
        vocab_file: vocab.txt; without, the data folder's, or one trained on the text.
    """
    rows = []
    for batch_size in batch_sizes:
        with tempfile.TemporaryDirectory() as folder:
            corpus, tokenizer = corpus_and_tokenizer(input_dir, vocab_file, Path(folder))
            random = np.random.default_rng(0)
            numbers = random.permutation(len(corpus))[: batch_size * batches]
            lines = [corpus[number] for number in numbers]
        counts = np.array([len(encoding) for encoding in tokenizer.tokenizer.encode_batch(lines)])
        counts = counts[: len(counts) // batch_size * batch_size].clip(max=max_seq_length)
        similar = [
            np.sort(counts[start : start + window * batch_size]) for start in range(0, len(counts), window * batch_size)
        ]
        for name, ordered in (("random", counts), ("similar length", np.concatenate(similar))):
            rows.append([f"{name}, {batch_size}", *_look(ordered.reshape(-1, batch_size))])
    print(markdown(["batches", "tokens of padded positions", "samples related", "tokens alone"], rows))


def _look(batches: np.ndarray) -> list[str]:
    """Args: lengths [batches, batch size]."""
    reach = [(batch[:, None] > np.arange(batch.max())).sum(axis=0) for batch in batches]
    at = np.concatenate(reach)
    padded = sum(batch.size * batch.max() for batch in batches)
    return [f"{at.sum() / padded:.0%}", f"{(at**2).sum() / at.sum():.1f}", f"{at[at == 1].sum() / at.sum():.2%}"]
