"""Whole-word masking: BERT's masked language modelling, a word's pieces masked together.

Word boundaries are jieba's, as in Chinese-BERT-wwm (Cui et al., 2019,
arXiv:1906.08101); of the chosen tokens 80% become [MASK], 10% a random token,
10% stay (Devlin et al., 2018).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jieba
import numpy as np
from tokenizers import Encoding

from backends.interface import Batch
from text.tokenizer import Encoded, TokenLine, WordPiece

jieba.setLogLevel(logging.WARNING)


class MaskedBatch(NamedTuple):
    """A batch with masks, and the tokens that they hide."""

    batch: Batch
    positions: np.ndarray
    """int64 [P], indices into the B * L positions."""
    labels: np.ndarray
    """int64 [P], the tokens at these positions before they were masked."""

    @property
    def sequences(self) -> int:
        return self.batch.sequences

    @property
    def tokens(self) -> int:
        return self.batch.tokens

    @property
    def truncated(self) -> int:
        return self.batch.truncated


def words_in(text: str) -> Iterator[str]:
    """Divides a text into words, which together are the text again."""
    return jieba.cut(text)


def word_starts(encoding: Encoding, text: str) -> np.ndarray:
    """Finds where words begin among the tokens of `text`, special ones left out: bool [T]."""
    word_at = [number for number, word in enumerate(words_in(text)) for _ in word]
    words = np.array([word_at[start] for start, _ in encoding.offsets[1:-1]])
    return np.diff(words, prepend=-1).astype(bool)


def words_of(starts: np.ndarray, length: int) -> list[list[int]]:
    """Lists the positions of each word's pieces, among the first `length` tokens with [CLS] and [SEP]."""
    edges = [*(np.flatnonzero(starts[: length - 2]) + 1).tolist(), length - 1]
    return [list(range(edge, following)) for edge, following in zip(edges, edges[1:])]


def mask_words(
    encoded: Encoded,
    lines: Sequence[str | TokenLine],
    tokenizer: WordPiece,
    seed: int,
    position: int,
    probability: float = 0.15,
) -> MaskedBatch:
    """Masks whole words, about `probability` of each line's tokens and at least one.

    Args:
        encoded: what the tokenizer made of `lines`.
        seed, position: which words, and what takes their place, follow from the seed and a line's position in
            the run; `position` is that of the first.
    """
    batch = encoded.batch
    input_ids = batch.input_ids.copy()
    special = {token.content for token in tokenizer.settings.whole if token.special}
    ordinary = np.array([i for token, i in tokenizer.ids.items() if token not in special])
    positions, labels = [], []
    for row, (encoding, line) in enumerate(zip(encoded.encodings, lines)):
        random = np.random.default_rng((seed, position + row))
        length = int(batch.attention_mask[row].sum())
        budget = max(1, round((length - 2) * probability))
        starts = line.starts if isinstance(line, TokenLine) else word_starts(encoding, line)
        words = words_of(starts, length)
        chosen: list[int] = []
        for index in random.permutation(len(words)):
            if len(chosen) + len(words[index]) <= budget:
                chosen += words[index]
        if words and not chosen:
            chosen = min(words, key=len)
        where = np.array(sorted(chosen), dtype=np.int64)
        labels.append(input_ids[row, where])
        positions.append(row * input_ids.shape[1] + where)
        dice = random.random(len(where))
        input_ids[row, where[dice < 0.8]] = tokenizer.mask
        replaced = where[(dice >= 0.8) & (dice < 0.9)]
        input_ids[row, replaced] = random.choice(ordinary, size=len(replaced))
    return MaskedBatch(batch._replace(input_ids=input_ids), np.concatenate(positions), np.concatenate(labels))
