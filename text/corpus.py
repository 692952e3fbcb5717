"""A folder of text as an array of lines, of which only the asked-for are read."""

from __future__ import annotations

import codecs
import json
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from backends.interface import InputError
from backends.pretrained import atomically, write_json


def text_files(input_dir: str | Path, option: str = "input_dir") -> list[Path]:
    """The files of a folder in name order, hidden ones left out.

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
    """Byte offset and content of each line. Only "\\n" ends a line: Chinese text
    holds U+2028 and the like within sentences."""
    offset = 0
    with open(path, "rb") as file:
        for line in file:
            yield offset, line
            offset += len(line)


def _clean(line: bytes) -> str:
    return line.decode("utf-8").removeprefix(codecs.BOM_UTF8.decode()).strip()


class Corpus:
    """The non-blank lines of a folder's files, by number.

    An index of 8 bytes a line lies on disk and is mapped, not read, so memory
    does not grow with the corpus. It is written once and reused while the files
    keep their sizes and times.

    Args:
        input_dir: text files, UTF-8, one sentence a line.
        index_dir: where the index is kept.
        option: the option to name in an error.

    Raises:
        InputError: no such folder, no file, a file that is not UTF-8, or no line.
    """

    def __init__(self, input_dir: str | Path, index_dir: str | Path, option: str = "input_dir") -> None:
        self.files = text_files(input_dir, option)
        sizes = [path.stat().st_size for path in self.files]
        self.starts = [sum(sizes[:i]) for i in range(len(sizes))]
        signature = [[path.name, size, path.stat().st_mtime_ns] for path, size in zip(self.files, sizes)]
        manifest_path, offsets_path = Path(index_dir) / "manifest.json", Path(index_dir) / "offsets.bin"
        manifest: dict[str, Any] = {}
        if manifest_path.exists() and offsets_path.exists():
            manifest = json.loads(manifest_path.read_text())
        if manifest.get("files") != signature:
            manifest = {"files": signature, **self._index(offsets_path)}
            if not manifest["lines"]:
                raise InputError(f"--{option} {input_dir}: every line is blank; expected one sentence a line")
            write_json(manifest_path, manifest)
        self.blank: int = manifest["blank"]
        self.characters: int = manifest["characters"]
        self._offsets = np.memmap(offsets_path, dtype="<i8", mode="r")

    def _index(self, path: Path) -> dict[str, int]:
        lines = blank = characters = 0
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomically(path) as temporary, open(temporary, "wb") as index:
            for start, file in zip(self.starts, self.files):
                for offset, line in _lines(file):
                    try:
                        text = _clean(line)
                    except UnicodeDecodeError as error:
                        raise InputError(
                            f"{file}: not UTF-8 at byte {offset + error.start} ({error.reason}); convert the file"
                        ) from error
                    if text:
                        index.write((start + offset).to_bytes(8, "little"))
                        lines += 1
                        characters += len(text)
                    else:
                        blank += 1
            if not lines:  # an empty file cannot be mapped
                index.write(bytes(8))
        return {"lines": lines, "blank": blank, "characters": characters}

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, number: int) -> str:
        position = int(self._offsets[number])
        which = bisect_right(self.starts, position) - 1
        # A file that ends where the next starts is empty, and bisect_right has passed it.
        with open(self.files[which], "rb") as file:
            file.seek(position - self.starts[which])
            return _clean(file.readline())

    def __iter__(self) -> Iterator[str]:
        return (self[number] for number in range(len(self)))

    def __repr__(self) -> str:
        # grain names its sources by this in error messages
        return f"Corpus({len(self)} lines)"
