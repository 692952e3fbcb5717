"""Prepared corpora: shards of token sequences, with a manifest that says what they are and of which vocabulary.

A shard is an array_record file; a record is a line's token ids without special tokens, little-endian, two bytes each
(four where the vocabulary has more than 65,536 entries), and, where words were asked for, a byte for each token
that is 1 where a word begins.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from backends.files import InputError, read_json
from text.corpus import BadLines, Corpus, Lines, Unreadable
from text.tokenizer import TokenLine, WordPiece

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer"
"""The folder beside the shards with the vocabulary they were made with."""
FORMAT = "minilm-duet tokens 1"
_WRITE = "group_size:64,uncompressed"  # read at random 1.8 times as fast as with zstd, for 13 % more bytes
_READ = "readahead_buffer_size:0,max_parallelism:0"


def dtype_of(vocabulary: int) -> np.dtype:
    """Returns the type of ids of a vocabulary of so many entries."""
    return np.dtype("<u2" if vocabulary <= 1 << 16 else "<u4")


class ShardWriter:
    """A writer of one shard; a context manager."""

    def __init__(self, path: Path, dtype: np.dtype) -> None:
        self._writer, self._dtype = ArrayRecordWriter(str(path), _WRITE), dtype

    def write(self, line: TokenLine) -> None:
        self._writer.write(line.ids.astype(self._dtype).tobytes() + line.starts.astype(np.uint8).tobytes())

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.close()


class Shards(Lines[TokenLine]):
    """The token sequences of a prepared corpus, by number.

    Args:
        folder: what ``python -m text.prepare`` wrote.
        bad_lines: what becomes of a shard that is gone or not as long as it was written, and of a record that
            cannot be read: ``stop`` raises, ``skip`` takes other lines in place of theirs, and counts.

    Raises:
        InputError: the manifest is of no prepared corpus, no line is left, or a shard is not whole.
    """

    def __init__(self, folder: Path, option: str = "input_dir", bad_lines: BadLines = "stop") -> None:
        super().__init__(bad_lines)
        self.folder = folder
        manifest = read_json(folder / MANIFEST)
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            raise InputError(f"--{option} {folder / MANIFEST}: not of the format {FORMAT!r}; prepare the corpus again")
        self.manifest: Mapping[str, Any] = manifest
        self.blank = self.bad = 0
        try:
            self.words = bool(manifest["settings"]["words"])
            self.characters = int(manifest["counts"]["characters"])
            shards = [(Path(shard["file"]).name, shard["size"], int(shard["lines"])) for shard in manifest["shards"]]
            self._dtype = dtype_of(manifest["vocabulary"]["entries"])
            what = [manifest["vocabulary"]["sha256"], self.words, [shard["sha256"] for shard in manifest["shards"]]]
        except (KeyError, OverflowError, TypeError, ValueError) as error:
            raise InputError(
                f"--{option} {folder / MANIFEST}: damaged ({error!r}); prepare the corpus again"
            ) from error
        self.sha256 = hashlib.sha256(json.dumps(what).encode()).hexdigest()
        for name, size, lines in shards:
            self._check(folder / name, size, lines)
        self.files = [folder / name for name, _, _ in shards]
        self._counts = [lines for _, _, lines in shards]
        self._ends = np.cumsum(self._counts).tolist()
        self._readers: dict[int, ArrayRecordReader] = {}
        if not shards or self.bad == len(self):
            raise InputError(f"--{option} {folder}: no line is left in its shards; prepare the corpus again")

    def _check(self, path: Path, written: int, lines: int) -> None:
        """Records a shard that is not whole; its lines keep their numbers, and others are taken in their place."""
        size = path.stat().st_size if path.exists() else None
        if size != written:
            what = "gone" if size is None else f"{size} bytes long, {written} were written"
            self._meet(Unreadable(f"{path}: {what}; python -m text.prepare --overwrite writes it again"))
            self.bad += lines

    def tokenizer(self) -> WordPiece:
        """Reads the tokenizer that the shards were made with."""
        return WordPiece.from_model(self.folder / TOKENIZER)

    def check_vocabulary(self, tokenizer: WordPiece, whose: str | Path) -> None:
        """Raises InputError unless a tokenizer is the one that the shards were made with."""
        vocabulary = self.manifest["vocabulary"]
        if (tokenizer.fingerprint(), len(tokenizer)) != (vocabulary["sha256"], vocabulary["entries"]):
            raise InputError(
                f"{self.folder}: was prepared with another vocabulary than {whose} has; prepare it with --vocab {whose}"
            )

    def __len__(self) -> int:
        return self._ends[-1]

    def _read(self, number: int) -> TokenLine:
        shard_number = bisect_right(self._ends, number)
        row = number - self._ends[shard_number] + self._counts[shard_number]
        path = self.files[shard_number]
        try:
            record: bytes = self._reader(shard_number).read([row])[0]
        except (RuntimeError, ValueError) as error:
            self._readers.pop(shard_number, None)
            raise Unreadable(f"{path}: record {row} cannot be read ({error})") from error
        width = self._dtype.itemsize + self.words
        if not record or len(record) % width:
            raise Unreadable(f"{path}: record {row} is {len(record)} bytes, no sequence; the file was changed or cut")
        count = len(record) // width
        ids = np.frombuffer(record, self._dtype, count)
        return TokenLine(ids, np.frombuffer(record, np.bool_, offset=ids.nbytes))

    def _reader(self, shard_number: int) -> ArrayRecordReader:
        """Opens a shard, or returns its open reader; raises Unreadable if it is gone."""
        if shard_number not in self._readers:
            path = self.files[shard_number]
            reader = ArrayRecordReader(str(path), _READ)
            # The library takes what is no such file for an empty one.
            if not path.exists() or reader.num_records() != self._counts[shard_number]:
                raise Unreadable(f"{path}: gone, or not the shard that was written")
            self._readers[shard_number] = reader
        return self._readers[shard_number]

    def __repr__(self) -> str:
        return f"Shards({len(self)} lines)"


def open_corpus(
    input_dir: str | Path,
    index_dir: str | Path,
    option: str = "input_dir",
    bad_lines: BadLines = "stop",
    begun: str | None = None,
) -> Corpus | Shards:
    """Opens a folder of text, prepared or plain; the arguments are those of `Shards` and `Corpus`."""
    if (Path(input_dir) / MANIFEST).is_file():
        return Shards(Path(input_dir), option, bad_lines)
    return Corpus(input_dir, index_dir, option, bad_lines, begun)
