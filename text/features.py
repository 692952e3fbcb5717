"""Examples of tasks as token sequences, whole or in windows, with the targets of training."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from backends.files import InputError
from backends.interface import Batch
from text.data import Example, Question, Sentence
from text.tasks import Kind
from text.tokenizer import WordPiece

UNKNOWN = -1
"""The target of what a teacher may answer, and no label says."""
IGNORED = -100
"""The target of a token that is not to be labelled."""


@dataclass(frozen=True)
class LabelledBatch:
    """Sequences and their targets."""

    batch: Batch
    targets: Sequence[np.ndarray]
    """Targets of each sequence, int64, as in `Features`; negative ones do not count as labels."""
    counted: int
    """Number of targets that count, with those of other processes' shares of the batch."""
    answered: int
    """The same with those that are `UNKNOWN`: rows of a teacher's answer."""

    @property
    def sequences(self) -> int:
        return sum(bool((targets != IGNORED).any()) for targets in self.targets)

    @property
    def tokens(self) -> int:
        return self.batch.tokens

    @property
    def truncated(self) -> int:
        return self.batch.truncated


@dataclass(frozen=True)
class Features:
    """N token sequences; none is padded."""

    ids: Sequence[np.ndarray]
    """int64 [n] each, ``[CLS] ... [SEP]``, with a second text ``[CLS] ... [SEP] ... [SEP]``."""
    first: np.ndarray
    """int64 [N], tokens of the first text with its [CLS] and [SEP]; the others' type is 1."""
    truncated: np.ndarray
    """bool [N], whether something was cut off."""
    sources: np.ndarray
    """int64 [N], the index of each sequence's example."""
    targets: Sequence[np.ndarray]
    """Classification: the class, [1]. Reading: first and last token of the answer, [2], both 0 if it is
    not here. Labelling: each token's label, [n], or `IGNORED`. What is not known is `UNKNOWN`."""
    parts: Sequence[np.ndarray]
    """Places of tokens in their example. Reading: their characters in the context, [n, 2]. Labelling:
    their word's number, [n]. -1 for tokens that are not of the example. Classification: empty."""

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def lengths(self) -> np.ndarray:
        return np.array([len(ids) for ids in self.ids])

    @property
    def a_row_each(self) -> bool:
        """Whether a model answers a sequence by one row of logits, as classification has it; else by one a token."""
        return bool(self.parts) and not len(self.parts[0])

    def __add__(self, other: Features) -> Features:
        """These sequences, then others of the same kind of task, with their examples."""
        return Features(
            [*self.ids, *other.ids],
            np.concatenate([self.first, other.first]),
            np.concatenate([self.truncated, other.truncated]),
            np.concatenate([self.sources, other.sources + self.sources[-1] + 1]),
            [*self.targets, *other.targets],
            [*self.parts, *other.parts],
        )

    def fingerprint(self) -> str:
        """Returns the SHA-256 of the tokens and their types, in hexadecimal digits."""
        digest = hashlib.sha256()
        for ids, first in zip(self.ids, self.first.tolist()):
            digest.update(np.array([len(ids), first, *ids], "<i8").tobytes())
        return digest.hexdigest()

    def check_types(self, types: int, model: Path) -> None:
        """Raises InputError if there are pairs, and the model has only one type of token."""
        if types < 2 and (self.first < self.lengths).any():
            raise InputError(f"{model}: its type_vocab_size is {types}: it takes single texts, and here are pairs")

    def batch(self, indices: Sequence[int] | np.ndarray) -> Batch:
        """Makes a batch of the sequences at `indices`, padded to the longest of them."""
        lengths = np.array([len(self.ids[i]) for i in indices])
        positions = np.arange(lengths.max())[None, :]
        mask = positions < lengths[:, None]
        input_ids = np.zeros(mask.shape, np.int64)
        input_ids[mask] = np.concatenate([self.ids[i] for i in indices])
        types = (positions >= self.first[indices][:, None]) & mask
        truncated = int(self.truncated[indices].sum())
        return Batch(input_ids, types.astype(np.int64), mask.astype(np.int64), truncated, np.asarray(indices))

    def labelled(self, indices: np.ndarray, rank: int = 0, world_size: int = 1) -> LabelledBatch:
        """Makes a process' share of a batch of the sequences at `indices`, shortest first."""
        counted = sum(int((self.targets[i] >= 0).sum()) for i in indices)
        answered = sum(int((self.targets[i] != IGNORED).sum()) for i in indices)
        share = indices[rank::world_size]
        share = share[np.argsort(self.lengths[share], kind="stable")]
        if not len(share):  # a process without a sequence takes one whose targets do not count
            nothing = np.full_like(self.targets[indices[0]], IGNORED)
            return LabelledBatch(self.batch(indices[:1]), [nothing], counted, answered)
        return LabelledBatch(self.batch(share), [self.targets[i] for i in share], counted, answered)

    def batches(
        self, start: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1
    ) -> Iterator[LabelledBatch]:
        """Makes a process' shares of the batches of epoch after epoch, without end, from the batch numbered `start`."""
        epoch, skip = divmod(start, -(-len(self) // batch_size))
        while True:
            for indices in self.epoch(epoch, batch_size, seed)[skip:]:
                yield self.labelled(indices, rank, world_size)
            epoch, skip = epoch + 1, 0

    def epoch(self, number: int, batch_size: int, seed: int) -> list[np.ndarray]:
        """Makes the batches of an epoch: shuffled, sequences of similar length together.

        The order follows from seed and number alone. Lengths are sorted within 64
        batches at a time, and the batches then shuffled.
        """
        random = np.random.default_rng((seed, number))
        order = random.permutation(len(self))
        pool = 64 * batch_size
        lengths = self.lengths
        batches = [
            chunk[i : i + batch_size]
            for start in range(0, len(order), pool)
            for chunk in [order[start : start + pool][np.argsort(lengths[order[start : start + pool]], kind="stable")]]
            for i in range(0, len(chunk), batch_size)
        ]
        return [batches[i] for i in random.permutation(len(batches))]

    def by_length(self, tokens: int) -> list[np.ndarray]:
        """Divides all sequences into batches; see the function of this name."""
        return by_length(self.lengths, tokens)


def by_length(lengths: np.ndarray, tokens: int) -> list[np.ndarray]:
    """Divides sequences of these lengths into batches, the longest first, of at most so many tokens each
    (but at least one sequence)."""
    order = np.argsort(-lengths, kind="stable")
    batches, start, total = [], 0, 0
    for end, length in enumerate(lengths[order]):
        if total + length > tokens and end > start:
            batches.append(order[start:end])
            start, total = end, 0
        total += length
    return [*batches, order[start:]] if len(order) else []


def cut_pair(first: int, second: int, budget: int) -> tuple[int, int]:
    """Computes how many tokens of two texts are kept of `budget`: the longer one is cut until both are
    equally long, then both in turn (transformers' and paddlenlp's ``longest_first``)."""
    if first + second <= budget:
        return first, second
    if budget - second > second:
        return budget - second, second
    if budget - first >= first:
        return first, budget - first
    return -(-budget // 2), budget // 2


def task_features(
    kind: Kind,
    tokenizer: WordPiece,
    examples: Sequence[Any],
    max_seq_length: int,
    *,
    doc_stride: int = 128,
    max_query_length: int = 64,
) -> Features:
    """Makes token sequences of examples of any kind of task; the last two arguments are for reading.

    Raises:
        InputError: lengths that leave no room for a context (`reading_features`).
    """
    if kind == "reading":
        return reading_features(tokenizer, examples, max_seq_length, doc_stride, max_query_length)
    encode = classification_features if kind == "classification" else labelling_features
    return encode(tokenizer, examples, max_seq_length)


def classification_features(tokenizer: WordPiece, examples: Sequence[Example], max_seq_length: int) -> Features:
    """Makes a sequence of each example, cut as PP-MiniLM's ``convert_example`` cuts it."""
    cls, sep = tokenizer.cls, tokenizer.sep
    texts = tokenizer.tokenizer.encode_batch_fast([example.text for example in examples], add_special_tokens=False)
    pairs = [example.pair for example in examples if example.pair is not None]
    second = iter(tokenizer.tokenizer.encode_batch_fast(pairs, add_special_tokens=False))
    ids, first, truncated = [], [], []
    for example, text in zip(examples, texts):
        a = text.ids
        if example.pair is None:
            kept = a[: max_seq_length - 2]
            cut = len(kept) < len(a)
            tokens = [cls, *kept, sep]
            first.append(len(tokens))
        else:
            b = next(second).ids
            n, m = cut_pair(len(a), len(b), max_seq_length - 3)
            cut = n + m < len(a) + len(b)
            tokens = [cls, *a[:n], sep, *b[:m], sep]
            first.append(n + 2)
        ids.append(np.array(tokens, np.int64))
        truncated.append(cut)
    labels = [np.array([UNKNOWN if example.label is None else example.label], np.int64) for example in examples]
    return Features(
        ids, np.array(first), np.array(truncated), np.arange(len(examples)), labels, [np.zeros(0, np.int64)] * len(ids)
    )


def reading_features(
    tokenizer: WordPiece,
    questions: Sequence[Question],
    max_seq_length: int,
    doc_stride: int = 128,
    max_query_length: int = 64,
) -> Features:
    """Makes windows ``[CLS] question [SEP] part of the context [SEP]`` over each context.

    Args:
        doc_stride: tokens from a window's start to the next window's.
        max_query_length: tokens of a question that are kept.

    Raises:
        InputError: windows would leave tokens out.
    """
    room = max_seq_length - max_query_length - 3
    if room < 1:
        raise InputError(
            f"--max_seq_length {max_seq_length}: leaves no context beside a question of --max_query_length "
            f"{max_query_length}; must be at least {max_query_length + 4}"
        )
    if not 0 < doc_stride <= room:
        raise InputError(
            f"--doc_stride {doc_stride}: must be from 1 to {room}, what --max_seq_length {max_seq_length} leaves of "
            f"a context beside a question of --max_query_length {max_query_length}"
        )
    cls, sep = tokenizer.cls, tokenizer.sep
    encoded = tokenizer.tokenizer.encode_batch_fast([item.question for item in questions], add_special_tokens=False)
    contexts = tokenizer.tokenizer.encode_batch([item.context for item in questions], add_special_tokens=False)
    ids, first, truncated, sources, targets, parts = [], [], [], [], [], []
    for number, (item, question, context) in enumerate(zip(questions, encoded, contexts)):
        head = [cls, *question.ids[:max_query_length], sep]
        room = max_seq_length - len(head) - 1
        offsets = np.array(context.offsets, np.int64).reshape(-1, 2)
        answer = (-1, -1)
        if item.start is not None:
            # Tokens that overlap the answer: it may begin or end inside one
            inside = np.flatnonzero((offsets[:, 1] > item.start) & (offsets[:, 0] < item.start + len(item.answers[0])))
            if len(inside):
                answer = (int(inside[0]), int(inside[-1]))
        for start in range(0, max(1, len(offsets)), doc_stride):
            window = slice(start, min(start + room, len(offsets)))
            ids.append(np.array([*head, *context.ids[window], sep], np.int64))
            outside = np.full((len(head), 2), -1)
            parts.append(np.concatenate([outside, offsets[window], outside[:1]]))
            whole = start <= answer[0] and answer[1] < window.stop
            shift = len(head) - start
            elsewhere = [0 if item.answers else UNKNOWN] * 2
            targets.append(np.array([answer[0] + shift, answer[1] + shift] if whole else elsewhere, np.int64))
            first.append(len(head))
            truncated.append(len(question.ids) > max_query_length)
            sources.append(number)
            if window.stop == len(offsets):
                break
    return Features(ids, np.array(first), np.array(truncated), np.array(sources), targets, parts)


def labelling_features(tokenizer: WordPiece, sentences: Sequence[Sentence], max_seq_length: int) -> Features:
    """Makes a sequence of each sentence; a token's first piece carries its label."""
    cls, sep = tokenizer.cls, tokenizer.sep
    encodings = tokenizer.tokenizer.encode_batch(
        [list(sentence.tokens) for sentence in sentences], is_pretokenized=True, add_special_tokens=False
    )
    ids, truncated, targets, parts = [], [], [], []
    for sentence, encoding in zip(sentences, encodings):
        kept = encoding.ids[: max_seq_length - 2]
        words = np.array([-1, *encoding.word_ids[: len(kept)], -1], np.int64)
        words[1:][words[1:] == words[:-1]] = -1
        ids.append(np.array([cls, *kept, sep], np.int64))
        truncated.append(len(kept) < len(encoding.ids))
        parts.append(words)
        tags = np.array([UNKNOWN] * len(sentence.tokens) if sentence.tags is None else sentence.tags, np.int64)
        labels = np.full(len(words), IGNORED, np.int64)
        labels[words >= 0] = tags[words[words >= 0]]
        targets.append(labels)
    lengths = np.array([len(tokens) for tokens in ids])
    return Features(ids, lengths, np.array(truncated), np.arange(len(ids)), targets, parts)
