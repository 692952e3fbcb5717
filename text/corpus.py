"""A folder of text as an array of lines, each read when it is asked for."""

from __future__ import annotations

import codecs
import hashlib
import struct
import zlib
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import numpy as np

from backends.files import InputError, atomically, read_sealed, write_sealed

BadLines = Literal["stop", "skip"]
MOST_REPORTED = 20
"""Number of unreadable lines that are reported one by one."""
ATTEMPTS = 1000
"""Number of lines, drawn at random, that are tried in place of an unreadable one."""


class Unreadable(ValueError):
    """A line that is no text; the message says where and why."""


_LINE = np.dtype([("offset", "<i8"), ("checksum", "<u4")])
_pack = struct.Struct("<qI").pack


def text_files(input_dir: str | Path, option: str = "input_dir") -> list[Path]:
    """Lists the files of a folder in the order of their names, without hidden ones.

    Raises:
        InputError: the folder is missing or empty.
    """
    folder = Path(input_dir)
    if not folder.is_dir():
        raise InputError(f"--{option} {folder}: no such folder; give one with text files, one sentence a line")
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    if not files:
        raise InputError(f"--{option} {folder}: no file there; expected text files, one sentence a line")
    return files


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yields byte offset and content of each line. Only "\\n" ends a line: Chinese text
    holds U+2028 and the like within sentences."""
    offset = 0
    with open(path, "rb") as file:
        for line in file:
            yield offset, line
            offset += len(line)


def decode_line(line: bytes, file: Path, offset: int) -> str:
    """Decodes a line that begins at byte `offset` of a file.

    Raises:
        Unreadable: it is not UTF-8, or holds a NUL byte.
    """
    if b"\0" in line:
        raise Unreadable(f"{file}: a NUL byte at byte {offset + line.index(0)}; text is expected")
    try:
        return line.decode("utf-8").removeprefix(codecs.BOM_UTF8.decode()).strip()
    except UnicodeDecodeError as error:
        raise Unreadable(
            f"{file}: not UTF-8 at byte {offset + error.start} ({error.reason}); convert the file"
        ) from error


def _stat(path: Path) -> list[Any]:
    """Returns what an index keeps of a file: name, size, time."""
    stat = path.stat()
    return [path.name, stat.st_size, stat.st_mtime_ns]


def _identity(lines: int, sha256: str) -> str:
    return f"{lines} lines, sha256 {sha256[:16]}"


def _read_manifest(path: Path, index: Path) -> dict[str, Any]:
    """Reads the manifest of an index; returns an empty one if the index is not whole, so that it is made again."""
    with suppress(OSError, ValueError):
        manifest = read_sealed(path)
        if index.stat().st_size == manifest["lines"] * _LINE.itemsize:
            return manifest
    return {}


L = TypeVar("L")


class Lines(ABC, Generic[L]):
    """Lines by number, any of which may turn out to be unreadable.

    Args:
        bad_lines: what becomes of a line that cannot be read: ``stop`` raises, ``skip`` counts it and takes another.
    """

    files: list[Path]
    characters: int
    blank: int
    """Number of lines left out because they are blank."""
    bad: int
    """Number of lines that were unreadable when the corpus was opened."""
    sha256: str
    """Digest of all lines in their order, whichever files hold them."""

    def __init__(self, bad_lines: BadLines) -> None:
        self.bad_lines = bad_lines
        self.replaced = 0
        """Number of lines that were unreadable when they were asked for."""
        self.unreadable: list[str] = []
        """Places and faults of the first `MOST_REPORTED` unreadable lines."""

    def identity(self) -> str:
        """Returns what tells these lines, in their order, from others."""
        return _identity(len(self), self.sha256)

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def _read(self, number: int) -> L:
        """Reads a line; raises Unreadable if it cannot be read."""

    def __getitem__(self, number: int) -> L:
        try:
            return self._read(number)
        except Unreadable as error:
            self._meet(error)
        self.replaced += 1
        for other in np.random.default_rng(number).integers(len(self), size=ATTEMPTS).tolist():
            with suppress(Unreadable):
                return self._read(other)
        raise InputError(f"{self.files[0].parent}: hardly any of its {len(self)} lines can be read any more")

    def _meet(self, error: Unreadable) -> None:
        """Records an unreadable line, or raises InputError if `bad_lines` says ``stop``."""
        if self.bad_lines == "stop":
            raise InputError(f"{error}; --bad_lines skip leaves it out") from error
        if len(self.unreadable) < MOST_REPORTED:
            self.unreadable.append(str(error))

    def __iter__(self) -> Iterator[L]:
        return (self[number] for number in range(len(self)))


class Corpus(Lines[str]):
    """The non-blank lines of a folder's files.

    An index of 12 bytes a line, where it begins and its checksum, lies on disk and is mapped, not read, so memory
    does not grow with the corpus. It is written once and reused while the files
    keep their sizes and times.

    Args:
        input_dir: text files, UTF-8, one sentence a line.
        index_dir: where the index is kept.
        option: the option to name in an error.
        begun: the `identity` of the corpus that a run began with, if one goes on. With ``skip`` the index that it has
            holds, whatever became of the files: lines keep their numbers, and what has changed cannot be read.

    Raises:
        InputError: no such folder, no file, a line that cannot be read, no line, or others than the run began with.
    """

    def __init__(
        self,
        input_dir: str | Path,
        index_dir: str | Path,
        option: str = "input_dir",
        bad_lines: BadLines = "stop",
        begun: str | None = None,
    ) -> None:
        super().__init__(bad_lines)
        manifest_path, index_path = Path(index_dir) / "manifest.json", Path(index_dir) / "lines.bin"
        manifest = _read_manifest(manifest_path, index_path)
        if bad_lines == "skip" and manifest and begun == _identity(manifest["lines"], manifest["sha256"]):
            self._place(Path(input_dir), manifest["files"])
            self.unreadable = [*manifest["unreadable"], *self._changed(manifest["files"])][:MOST_REPORTED]
        else:
            files = [_stat(path) for path in text_files(input_dir, option)]
            signature = {"files": files, "bad_lines": bad_lines}
            self._place(Path(input_dir), files)
            if any(manifest.get(key) != value for key, value in signature.items()):
                manifest = {**signature, **self._index(index_path, f"--{option} {input_dir}", begun)}
                write_sealed(manifest_path, manifest)
            self.unreadable = list(manifest["unreadable"])
        self.blank: int = manifest["blank"]
        self.bad: int = manifest["bad"]
        self.characters: int = manifest["characters"]
        self.sha256 = manifest["sha256"]
        self._lines = np.memmap(index_path, dtype=_LINE, mode="r")

    def _place(self, folder: Path, files: Sequence[Sequence[Any]]) -> None:
        """Lays the files end to end: `starts` are the positions where they begin."""
        self.files = [folder / name for name, _, _ in files]
        sizes = [size for _, size, _ in files]
        self.starts = [sum(sizes[:i]) for i in range(len(sizes))]

    def _changed(self, files: Sequence[Sequence[Any]]) -> list[str]:
        """Reports the files that are not those of the index any more."""
        return [
            f"{path}: lines that are no longer what they were (its size or time is another, or it is gone)"
            for path, (name, size, time) in zip(self.files, files)
            if not path.is_file() or _stat(path) != [name, size, time]
        ]

    def _index(self, path: Path, what: str, begun: str | None) -> dict[str, Any]:
        """Writes the index; returns its manifest. `what` is what an error calls the corpus."""
        lines = blank = bad = characters = 0
        sha256 = hashlib.sha256()
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomically(path) as temporary, open(temporary, "wb") as index:
            for start, file in zip(self.starts, self.files):
                for offset, line in _lines(file):
                    try:
                        text = decode_line(line, file, offset)
                    except Unreadable as error:
                        self._meet(error)
                        bad += 1
                        continue
                    if text:
                        content = text.encode()
                        index.write(_pack(start + offset, zlib.crc32(content)))
                        sha256.update(content + b"\n")
                        lines += 1
                        characters += len(text)
                    else:
                        blank += 1
            if not lines:
                raise InputError(f"{what}: every line is blank; expected one sentence a line")
            identity = _identity(lines, sha256.hexdigest())
            if begun not in (None, identity):
                raise InputError(
                    f"--resume: {what}: has {identity}, the run began with {begun}: other lines, or in another order; "
                    "give the same text, or --overwrite"
                )
        counts = {"lines": lines, "blank": blank, "bad": bad, "characters": characters}
        return {**counts, "sha256": sha256.hexdigest(), "unreadable": self.unreadable}

    def __len__(self) -> int:
        return len(self._lines)

    def _read(self, number: int) -> str:
        position, checksum = self._lines[number].item()
        # Of files that start at one position all but the last are empty, and bisect_right passes them.
        file_number = bisect_right(self.starts, position) - 1
        file, offset = self.files[file_number], position - self.starts[file_number]
        try:
            with open(file, "rb") as content:
                content.seek(offset)
                line = content.readline()
        except (OSError, ValueError) as error:  # the latter of an offset that is none
            reason = error.strerror if isinstance(error, OSError) else error
            raise Unreadable(f"{file}: cannot be read at byte {offset} ({reason})") from error
        text = decode_line(line, file, offset)
        if zlib.crc32(text.encode()) != checksum:
            raise Unreadable(f"{file}: not the line at byte {offset} that was there; the file was cut short or changed")
        return text

    def __repr__(self) -> str:
        # grain names its sources by this in error messages
        return f"Corpus({len(self)} lines)"
