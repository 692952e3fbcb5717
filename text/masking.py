"""Whole-word masking: BERT's masked language modelling, a word's pieces masked together.

Word boundaries are jieba's, as in Chinese-BERT-wwm (Cui et al., 2019,
arXiv:1906.08101); of the chosen tokens 80% become [MASK], 10% a random token,
10% stay (Devlin et al., 2018).
"""

from __future__ import annotations

import logging
from typing import NamedTuple

import jieba
import numpy as np
from tokenizers import Encoding

from backends.interface import Batch
from text.tokenizer import SPECIAL_TOKENS, Encoded, WordPiece

jieba.setLogLevel(logging.WARNING)


class MaskedBatch(NamedTuple):
    """A batch with masks in it, and what stood there."""

    batch: Batch
    positions: np.ndarray
    """int64 [P], indices into the B * L positions."""
    labels: np.ndarray
    """int64 [P]."""

    @property
    def sequences(self) -> int:
        return self.batch.sequences

    @property
    def tokens(self) -> int:
        return self.batch.tokens

    @property
    def truncated(self) -> int:
        return self.batch.truncated


def words_of(encoding: Encoding, text: str, length: int) -> list[list[int]]:
    """The positions of each word's pieces, among the first `length` tokens."""
    word_at = [number for number, word in enumerate(jieba.cut(text)) for _ in word]
    words: dict[int, list[int]] = {}
    for position in range(1, length - 1):
        start = encoding.offsets[position][0]
        words.setdefault(word_at[start], []).append(position)
    return list(words.values())


def mask_words(
    encoded: Encoded, lines: list[str], tokenizer: WordPiece, random: np.random.Generator, probability: float = 0.15
) -> MaskedBatch:
    """Masks whole words, about `probability` of each line's tokens and at least one.

    Args:
        encoded: what the tokenizer made of `lines`.
        random: decides which words, and what takes their place.
    """
    batch = encoded.batch
    input_ids = batch.input_ids.copy()
    ordinary = np.array([i for token, i in tokenizer.ids.items() if token not in SPECIAL_TOKENS])
    positions: list[int] = []
    for row, (encoding, line) in enumerate(zip(encoded.encodings, lines)):
        length = int(batch.attention_mask[row].sum())
        budget = max(1, round((length - 2) * probability))
        words = words_of(encoding, line, length)
        chosen: list[int] = []
        for index in random.permutation(len(words)):
            if len(chosen) + len(words[index]) <= budget:
                chosen += words[index]
        if words and not chosen:
            chosen = min(words, key=len)
        positions += [row * input_ids.shape[1] + position for position in sorted(chosen)]
    where = np.array(positions, dtype=np.int64)
    labels = input_ids.reshape(-1)[where]
    dice = random.random(len(where))
    flat = input_ids.reshape(-1)
    flat[where[dice < 0.8]] = tokenizer.ids["[MASK]"]
    replaced = where[(dice >= 0.8) & (dice < 0.9)]
    flat[replaced] = random.choice(ordinary, size=len(replaced))
    return MaskedBatch(batch._replace(input_ids=input_ids), where, labels)
