"""Files of word vectors: word2vec's text and binary layouts, and GloVe's, which is text without the first line."""

from __future__ import annotations

import gzip
import hashlib
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, cast

import numpy as np

from backends.files import InputError, check_regular
from text.augmentation import is_content_word

MOST_DIMENSIONS = 4096
LONGEST_WORD = 1000
"""Bytes."""
LONGEST_LINE = LONGEST_WORD + 40 * MOST_DIMENSIONS
LAYOUTS = "word2vec's text or binary layout, or GloVe's, perhaps in gzip"
_GZIP = b"\x1f\x8b"
_HEADER = re.compile(rb"(\d{1,12}) (\d{1,12})\s*")
_LINE_OF_TEXT = re.compile(rb"[^\n]+?( [-+.0-9eEnaifNAIF]+)+ ?\r?\n?")


@dataclass(frozen=True)
class WordVectors:
    """Words, and a vector of each."""

    words: list[str]
    vectors: np.ndarray
    """float32 [V, D], each of length 1, or 0."""

    @cached_property
    def rows(self) -> dict[str, int]:
        return {word: row for row, word in enumerate(self.words)}

    def identity(self) -> str:
        """Returns a digest of the words and their vectors."""
        content = hashlib.sha256("\n".join(self.words).encode())
        content.update(self.vectors.astype("<f4").tobytes())
        return content.hexdigest()

    def row_of(self, word: str) -> int | None:
        """Returns a word's row, or that of its lower-case form; None if neither is there."""
        return self.rows.get(word, self.rows.get(word.lower()))


def read_word_vectors(path: Path, most: int) -> WordVectors:
    """Reads the vectors of a file's first words, as far as these are content words; of equal ones the first counts.

    Args:
        most: words that are read; files have the frequent ones first.

    Raises:
        InputError: the file is in none of the layouts, cut short, or holds what is no number.
    """
    check_regular(path)
    vectors: dict[str, np.ndarray] = {}
    try:
        with _opened(path) as file:
            for word, vector in _entries(file, path, most):
                if not np.isfinite(vector).all():
                    raise InputError(f"{path}: the vector of {word!r} holds NaN or infinity; expected finite numbers")
                if is_content_word(word):
                    vectors.setdefault(word, vector)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read ({error}); expected {LAYOUTS}") from error
    if not vectors:
        raise InputError(f"{path}: no content word in it; expected {LAYOUTS}")
    matrix = np.stack([*vectors.values()])
    lengths = np.linalg.norm(matrix, axis=1, keepdims=True)
    return WordVectors([*vectors], matrix / np.where(lengths > 0, lengths, 1))


def _opened(path: Path) -> IO[bytes]:
    """Opens a file, unpacked if it is gzip's."""
    file = path.open("rb")
    if file.read(len(_GZIP)) != _GZIP:
        file.seek(0)
        return file
    file.close()
    return cast(IO[bytes], gzip.open(path))


def _entries(file: IO[bytes], path: Path, most: int) -> Iterator[tuple[str, np.ndarray]]:
    """Yields words with their vectors, float32 [D]."""
    first = file.readline(LONGEST_LINE)
    header = _HEADER.fullmatch(first)
    if header is None:
        if not _LINE_OF_TEXT.fullmatch(first):
            raise InputError(f"{path}: its first line is no number of words and of dimensions; expected {LAYOUTS}")
        file.seek(0)
        yield from _lines(file, path, 1, len(first.split()) - 1, most, None)
        return
    count, dimensions = map(int, header.groups())
    if not (count and 1 <= dimensions <= MOST_DIMENSIONS):
        raise InputError(
            f"{path}: {count} words of {dimensions} dimensions; expected at least one, of 1 to {MOST_DIMENSIONS}"
        )
    start = file.tell()
    in_text = _LINE_OF_TEXT.fullmatch(file.readline(LONGEST_LINE))
    file.seek(start)
    if in_text:
        yield from _lines(file, path, 2, dimensions, min(count, most), count)
    else:
        yield from _binary(file, path, dimensions, min(count, most), count)


def _lines(
    file: IO[bytes], path: Path, first: int, dimensions: int, most: int, count: int | None
) -> Iterator[tuple[str, np.ndarray]]:
    """Reads the layout of text from the line numbered `first` on; without a count, up to the end of the file."""
    for number in range(first, first + most):
        line = file.readline(LONGEST_LINE)
        if not line:
            if count is not None:
                raise InputError(f"{path}: ends after {number - first} of {count} words; it is cut short")
            return
        word, *numbers = line.rstrip().rsplit(b" ", dimensions)  # some words hold blanks
        try:
            if len(numbers) < dimensions or b" " in word and _LINE_OF_TEXT.fullmatch(word):
                raise ValueError
            yield word.decode("utf-8", "replace"), np.array([*map(float, numbers)], np.float32)
        except ValueError:
            expected = f"a word and {dimensions} numbers, with blanks between them"
            raise InputError(f"{path}:{number}: expected {expected}") from None


def _binary(file: IO[bytes], path: Path, dimensions: int, most: int, count: int) -> Iterator[tuple[str, np.ndarray]]:
    """Reads the binary layout: a word, a blank, numbers of four bytes, perhaps a line's end."""
    for number in range(most):
        word = bytearray()
        while (byte := file.read(1)) not in (b" ", b"") and len(word) <= LONGEST_WORD:
            word += byte
        vector = file.read(4 * dimensions)
        if len(word) > LONGEST_WORD:
            raise InputError(f"{path}: word {number + 1} is longer than {LONGEST_WORD} bytes; expected {LAYOUTS}")
        if len(vector) < 4 * dimensions:
            raise InputError(f"{path}: ends after {number} of {count} words; it is cut short")
        yield word.lstrip(b"\n").decode("utf-8", "replace"), np.frombuffer(vector, "<f4")
