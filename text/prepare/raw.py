"""Raw corpora as they are published -> paragraphs, each with the place it was read from."""

from __future__ import annotations

import gzip
import html
import json
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Literal, NamedTuple

import zstandard

from text.corpus import Unreadable, decode_line
from text.readers import check_text

Layout = Literal["lines", "jsonl", "cluecorpus2020", "wikipedia"]
LONGEST_LINE = 1 << 26
"""Bytes; a file without a line end for so long is no text."""
COMPRESSED = (".gz", ".zst")


class Piece(NamedTuple):
    """The lines of a file that begin in a range of its bytes."""

    path: str
    start: int = 0
    end: int | None = None
    """None: the end of the file, wherever it is, as the size of a compressed file says nothing."""


def pieces_of(path: Path, layout: Layout, size: int) -> Iterator[Piece]:
    """Divides a file into pieces of about `size` bytes, if each line can be read by itself; else yields it whole."""
    total = path.stat().st_size
    if path.suffix in COMPRESSED or layout == "wikipedia" or total <= size:
        yield Piece(str(path))
        return
    for start in range(0, total, size):
        yield Piece(str(path), start, min(start + size, total))


def paragraphs(piece: Piece, layout: Layout, field: str, bad: Callable[[Unreadable], None]) -> Iterator[str]:
    """Yields the texts of a piece.

    ``lines`` and ``cluecorpus2020``: one a line, documents parted by blank lines. ``jsonl``: the lines of one
    field of each object. ``wikipedia``: what WikiExtractor writes, ``<doc>`` elements or objects of JSON, which
    is also the layout of wiki2019zh; titles are left out.

    Args:
        bad: called with a line that cannot be read, or a file that ends too soon; unless it raises, reading goes on.
    """
    path, title = Path(piece.path), ""
    lines = _lines(piece)
    while True:
        try:
            offset, line = next(lines)
            text = decode_line(line, path, offset)
            if layout == "jsonl":
                yield from _field(text, field, path, offset)[field].split("\n") if text else ()
            elif layout == "wikipedia" and text.startswith("{"):
                record = _field(text, "text", path, offset)
                yield from (part for part in record["text"].split("\n") if part.strip() != record.get("title"))
            elif layout == "wikipedia" and text.startswith(("<doc ", "</doc>")):
                attribute = re.search(r'title="([^"]*)"', text)
                title = html.unescape(attribute[1]) if attribute else ""
            elif layout == "wikipedia" and title and text == title:
                title = ""
            elif text:
                yield text
        except StopIteration:
            return
        except Unreadable as error:
            bad(error)
        except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
            bad(Unreadable(f"{path}: gone, cut short or damaged ({error})"))
            return


def _field(text: str, field: str, path: Path, offset: int) -> dict[str, str]:
    """Parses an object that has text under `field`; raises Unreadable if it has none."""
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"{path}: not JSON at byte {offset} ({error}); expected an object a line") from error
    if not isinstance(record, dict) or not isinstance(record.get(field), str):
        content = ", ".join(record) if isinstance(record, dict) else type(record).__name__
        raise Unreadable(f"{path}: no text under {field!r} at byte {offset}, only {content}; --field names it")
    try:
        check_text(record[field], field)
    except ValueError as error:
        raise Unreadable(f"{path}: at byte {offset}, {error}") from error
    return record


def _lines(piece: Piece) -> Iterator[tuple[int, bytes]]:
    """Yields byte offset (in the uncompressed content) and content of each line."""
    path = Path(piece.path)
    with path.open("rb") as file:
        if path.suffix == ".gz":
            with gzip.open(file) as content:
                yield from _split(_blocks(content), 0)
        elif path.suffix == ".zst":
            yield from _split(_frames(file), 0)
        else:
            # A line that began before the piece belongs to the piece before: reading starts a byte early, and the line
            # that this byte is in is left out.
            offset = max(0, piece.start - 1)
            file.seek(offset)
            lines = _split(_blocks(file), offset)
            if piece.start:
                next(lines, None)
            for start, line in lines:
                if piece.end is not None and start >= piece.end:
                    return
                yield start, line


def _blocks(file: IO[bytes] | gzip.GzipFile, size: int = 1 << 20) -> Iterator[bytes]:
    while block := file.read(size):
        yield block


def _frames(file: IO[bytes]) -> Iterator[bytes]:
    """Yields the content of zstd's frames. The library's reader does not report a last frame that is cut short."""
    frame = None
    for block in _blocks(file, 1 << 14):  # a block may decompress to a thousand times its size
        while block:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            yield frame.decompress(block)
            block = frame.unused_data
            if frame.eof:
                frame = None
    if frame:
        raise EOFError("its last frame does not end")


def _split(blocks: Iterator[bytes], offset: int) -> Iterator[tuple[int, bytes]]:
    """Splits blocks into lines; yields offset and content of each."""
    rest = b""
    for block in blocks:
        *whole, rest = (rest + block).split(b"\n")
        for line in whole:
            yield offset, line
            offset += len(line) + 1
        if len(rest) > LONGEST_LINE:
            raise EOFError(f"no line ends within {LONGEST_LINE} bytes after byte {offset}")
    if rest:
        yield offset, rest
