"""From raw text to shards in three stages of independent tasks: read it top to bottom.

1. read: each unit of the input (files, or parts of large ones) -> its sentences, their sketches and sorted keys;
2. compare: each range of keys -> the lines that are duplicates;
3. pack: each unit -> a shard of the sentences that stay, tokenized.

Units follow from the input alone, and tasks from units, so the shards' bytes are the same whoever does them, in
whatever order. A task's result is moved into place when it is whole, and a task whose result is there is not
done again: that is all there is to resuming. No task holds more of its unit than `CHUNK` lines and a run of keys.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from glob import glob
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from backends.files import InputError, atomically, digest, read_json, write_json
from backends.pretrained import find_model
from text.corpus import MOST_REPORTED, BadLines, Unreadable
from text.masking import word_starts
from text.prepare.duplicates import RUN, WIDTH, candidates, keys_of, sketches, sorted_run
from text.prepare.raw import Layout, Piece, paragraphs, pieces_of
from text.prepare.sentences import clean, split
from text.shards import FORMAT, MANIFEST, TOKENIZER, Shards, ShardWriter, dtype_of
from text.tokenizer import TokenLine, WordPiece

CHUNK = 8192
"""Lines at a time."""
RUN_LINES = 1 << 18
"""Lines whose keys are sorted together."""
RANGE_KEYS = 1 << 22
"""Keys that are compared together; 24 bytes each, and as much again to sort them."""
WORK = ".work"
READ = ("txt", "sketches", "keys", "json")
"""Suffixes of the files that stage 1 writes of a unit."""

T = TypeVar("T")
R = TypeVar("R")
RunTasks = Callable[[Callable[[T], R], Sequence[T]], Iterator[R]]
"""Does a task for each of several items, in any order, and yields the results as they come."""
Report = Callable[[str, int, int, str], None]
"""Receives a stage's name, how many of its tasks are done, of how many, and the result of the last."""


@dataclass(kw_only=True)
class PrepareArguments:
    """Options of ``python -m text.prepare``."""

    input: list[str]
    """files, folders or patterns (quoted): plain text, .gz or .zst"""
    output: str
    """folder for the shards and their manifest"""
    vocab: str
    """vocab.txt, or the model whose vocabulary it is"""
    layout: Layout = "lines"
    """what the input looks like: lines of text; jsonl, an object a line; or as CLUECorpus2020 or Wikipedia come"""
    field: str = "text"
    """where the text is in an object of jsonl"""
    min_characters: int = 5
    """shorter sentences are left out"""
    max_characters: int = 500
    """longer sentences are left out"""
    similarity: float = 0.8
    """sentences this similar to an earlier one (0 to 1, Jaccard of character trigrams) are left out; 0: only copies"""
    words: bool = False
    """keep where words begin, for whole-word masking"""
    bad_lines: BadLines = "stop"
    """what a line that cannot be read does: stop, or be skipped and counted"""
    unit_mb: float = 128.0
    """input that one task takes and one shard comes from, in MiB; compressed files are not divided"""
    processes: int = 0
    """processes on this machine; 0 is one for each core"""
    ray: str | None = None
    """a Ray cluster to work on instead: local, or --ray alone, starts one; auto or HOST:PORT joins one"""
    overwrite: bool = False
    """delete what another preparation left in the output folder"""

    def __post_init__(self) -> None:
        if not 0 < self.min_characters <= self.max_characters:
            raise InputError(
                f"--min_characters {self.min_characters} --max_characters {self.max_characters}: must be at least 1, "
                "and the first not above the second"
            )
        if not 0 <= self.similarity <= 1:
            raise InputError(f"--similarity {self.similarity}: must be from 0 to 1")
        if self.unit_mb <= 0 or self.processes < 0:
            raise InputError(
                f"--unit_mb {self.unit_mb} --processes {self.processes}: must be above 0, and not below it"
            )

    def without_effect(self, options: Collection[str]) -> dict[str, str]:
        """Returns the options that others keep from having an effect, each with the reason."""
        idle = {} if self.layout == "jsonl" else {"field": f"with --layout {self.layout}; it is for jsonl"}
        if self.ray not in (None, "local"):
            idle["processes"] = f"with --ray {self.ray}; the cluster has what it has"
        return idle


SETTINGS = ("layout", "field", "min_characters", "max_characters", "similarity", "words", "unit_mb")
"""Options that shards depend on, beside input and vocabulary."""


class Preparation(NamedTuple):
    """A preparation of a corpus: what all its tasks know."""

    arguments: PrepareArguments
    output: Path
    units: tuple[tuple[Piece, ...], ...]

    @property
    def work(self) -> Path:
        return self.output / WORK


class Unit(NamedTuple):
    """A unit of the input, that a shard is made of."""

    preparation: Preparation
    number: int

    def file(self, suffix: str) -> Path:
        """Returns the path of an intermediate result."""
        return self.preparation.work / f"unit-{self.number:05d}.{suffix}"

    @property
    def shard(self) -> Path:
        return self.preparation.output / f"shard-{self.number:05d}.array_record"


class Range(NamedTuple):
    """A range of keys, from `first` to `last`."""

    preparation: Preparation
    number: int
    first: int
    last: int

    @property
    def file(self) -> Path:
        return self.preparation.work / f"range-{self.number:05d}.npz"


def prepare(arguments: PrepareArguments, run_tasks: RunTasks, report: Report) -> dict[str, Any]:
    """Prepares a corpus, or goes on where a preparation with the same arguments was stopped; returns its manifest.

    Raises:
        InputError: an argument is wrong, the output is another preparation's, or a line cannot be read.
    """
    tokenizer = _vocabulary(arguments.vocab)
    files = _input_files(arguments.input, Path(arguments.output))
    preparation = _in_units(arguments, files)
    signature = {
        "format": FORMAT,
        "settings": {name: getattr(arguments, name) for name in SETTINGS},
        "vocabulary": {
            "entries": len(tokenizer),
            "lowercase": tokenizer.settings.do_lower_case,
            "sha256": tokenizer.fingerprint(),
        },
        "inputs": [{"file": _name(path), "size": path.stat().st_size} for path in files],
    }
    with _claimed(preparation.output, signature, arguments.overwrite) as finished:
        return finished or _prepare(preparation, tokenizer, signature, run_tasks, report)


def _prepare(
    preparation: Preparation, tokenizer: WordPiece, signature: dict[str, Any], run_tasks: RunTasks, report: Report
) -> dict[str, Any]:
    """Goes through the stages; returns the manifest."""
    (preparation.output / TOKENIZER).mkdir(exist_ok=True)
    tokenizer.save(preparation.output / TOKENIZER, 512)
    for file in preparation.output.glob(".shard-*"):  # half written, by a task that was killed
        file.unlink()
    units = [Unit(preparation, number) for number in range(len(preparation.units))]
    counts: Counter[str] = Counter()

    def stage(name: str, task: Callable[[T], R], items: Sequence[T], results: Callable[[T], Sequence[Path]]) -> None:
        missing = [item for item in items if not all(path.exists() for path in results(item))]
        report(name, len(items) - len(missing), len(items), "")
        for i, result in enumerate(run_tasks(task, missing), len(items) - len(missing) + 1):
            report(name, i, len(items), str(result))

    stage("read", read_unit, units, lambda unit: [unit.file(suffix) for suffix in READ])
    ranges = _ranges(preparation, units)
    stage("compare", compare_range, ranges, lambda keys: [keys.file])
    stage("pack", pack_unit, units, lambda unit: [unit.shard, unit.file("shard.json")])

    for unit in units:
        counts.update(json.loads(unit.file("json").read_text())["counts"])
        counts.update(json.loads(unit.file("shard.json").read_text())["counts"])
    shards = [json.loads(unit.file("shard.json").read_text())["shard"] for unit in units]
    if not counts["lines"]:
        shutil.rmtree(preparation.work)
        raise InputError(
            f"--input: nothing is left of {counts['paragraphs']} paragraphs; --layout, --field, --min_characters and "
            "--max_characters say what is taken"
        )
    manifest = {**signature, "counts": dict(sorted(counts.items())), "shards": shards}
    write_json(preparation.output / MANIFEST, manifest)
    shutil.rmtree(preparation.work)
    return manifest


def read_unit(unit: Unit) -> str:
    """Stage 1: writes a unit's sentences, one a line, with sketches and keys."""
    arguments, counts = unit.preparation.arguments, Counter[str]()
    unreadable: list[str] = []

    def bad(error: Unreadable) -> None:
        if arguments.bad_lines == "stop":
            raise InputError(f"{error}; --bad_lines skip leaves it out") from error
        counts["bad"] += 1
        if len(unreadable) < MOST_REPORTED:
            unreadable.append(str(error))

    def sentences() -> Iterator[str]:
        for piece in unit.preparation.units[unit.number]:
            for paragraph in paragraphs(piece, arguments.layout, arguments.field, bad):
                counts["paragraphs"] += 1
                for sentence in split(clean(paragraph)):
                    if len(sentence) < arguments.min_characters:
                        counts["too_short"] += 1
                    elif len(sentence) > arguments.max_characters:
                        counts["too_long"] += 1
                    else:
                        yield sentence

    rows, runs = 0, []
    pending: list[np.ndarray] = []
    with (
        atomically(unit.file("txt")) as texts,
        atomically(unit.file("sketches")) as sketched,
        atomically(unit.file("keys")) as keyed,
        texts.open("w", encoding="utf-8", newline="\n") as text_file,
        sketched.open("wb") as sketch_file,
        keyed.open("wb") as keys_file,
    ):

        def write_run() -> None:
            run = sorted_run(np.concatenate(pending), rows - sum(map(len, pending)))
            run.tofile(keys_file)
            runs.append(len(run))
            pending.clear()

        for lines in _chunks(sentences()):
            text_file.writelines(f"{line}\n" for line in lines)
            sketch = sketches(lines) if arguments.similarity else None
            if sketch is not None:
                sketch.astype("<u2").tofile(sketch_file)
            pending.append(keys_of(lines, sketch))
            rows += len(lines)
            if sum(map(len, pending)) >= RUN_LINES:
                write_run()
        if pending:
            write_run()
    counts["sentences"] = rows
    write_json(unit.file("json"), {"counts": counts, "lines": rows, "runs": runs})
    return "; ".join([f"{rows} sentences", *(f"left out: {message}" for message in unreadable)])


def compare_range(keys: Range) -> str:
    """Stage 2: writes which lines are copies or near duplicates, by the keys of one range."""
    preparation = keys.preparation
    values, lines = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
    for number in range(len(preparation.units)):
        for run in _runs(Unit(preparation, number)):
            first = np.searchsorted(run["key"], np.uint64(keys.first))
            last = np.searchsorted(run["key"], np.uint64(keys.last), "right")
            values.append(np.array(run["key"][first:last]))
            lines.append((number << 32) + run["row"][first:last].astype(np.int64))
    copies, pairs = candidates(np.concatenate(values), np.concatenate(lines))
    pairs = pairs[~np.isin(pairs[:, 0], copies)]
    similar = [pairs[i : i + CHUNK][_similar(preparation, pairs[i : i + CHUNK])] for i in range(0, len(pairs), CHUNK)]
    near = np.unique(np.concatenate([part[:, 0] for part in similar])) if similar else np.empty(0, np.int64)
    with atomically(keys.file) as temporary, temporary.open("wb") as file:
        np.savez(file, copies=copies, near=near)
    return f"{len(copies)} copies, {len(near)} near duplicates"


def pack_unit(unit: Unit) -> str:
    """Stage 3: writes the shard of a unit."""
    preparation, counts = unit.preparation, Counter[str]()
    stay, counts["copies"], counts["near_duplicates"] = _staying(unit)
    tokenizer = _tokenizer(preparation.output)
    with (
        atomically(unit.shard) as temporary,
        unit.file("txt").open(encoding="utf-8", newline="\n") as file,
        ShardWriter(temporary, dtype_of(len(tokenizer))) as writer,
    ):
        kept = (line.rstrip("\n") for line, stays in zip(file, stay) if stays)
        for lines in _chunks(kept):
            for text, line in zip(lines, _tokenized(tokenizer, lines, preparation.arguments.words)):
                if len(line.ids):
                    writer.write(line)
                    counts["lines"] += 1
                    counts["tokens"] += len(line.ids)
                    counts["characters"] += len(text)
    with unit.shard.open("rb") as packed:
        shard = {"file": unit.shard.name, "lines": counts["lines"], "sha256": digest(packed)}
    shard["size"] = unit.shard.stat().st_size
    write_json(unit.file("shard.json"), {"counts": counts, "shard": shard})
    return f"{counts['lines']} lines"


def _vocabulary(name: str) -> WordPiece:
    """Reads the tokenizer of a ``vocab.txt``, or of a model."""
    path = Path(name)
    if path.is_file() or path.suffix == ".txt":
        return WordPiece.from_file(path)
    return WordPiece.from_model(find_model(name, "vocab"))


def _input_files(patterns: Sequence[str], output: Path) -> list[Path]:
    """Finds the files that patterns name, in their order; leaves out what is in the output folder."""
    files: dict[Path, None] = {}
    for pattern in patterns:
        # The name of an existing file or folder is no pattern, whatever characters it has.
        names = [pattern] if Path(pattern).exists() else sorted(glob(pattern, recursive=True))
        paths = [path for name in map(Path, names) for path in (sorted(name.rglob("*")) if name.is_dir() else [name])]
        visible = [path for path in paths if path.is_file() and not path.name.startswith(".")]
        inputs = [path for path in visible if output.resolve() not in path.resolve().parents]
        if not inputs:
            what = f"only what lies in --output {output}" if visible else "no such file"
            raise InputError(f"--input {pattern}: {what}; give files, folders or patterns in quotes")
        files.update(dict.fromkeys(inputs))
    return list(files)


def _name(path: Path) -> str:
    """Returns the name of a file as text, which names on Linux need not be."""
    return path.name.encode("utf-8", "backslashreplace").decode()


def _in_units(arguments: PrepareArguments, files: Iterable[Path]) -> Preparation:
    """Divides files into units."""
    size = max(1, int(arguments.unit_mb * (1 << 20)))
    units: list[list[Piece]] = []
    room = 0
    for path in files:
        for piece in pieces_of(path.resolve(), arguments.layout, size):
            length = path.stat().st_size if piece.end is None else piece.end - piece.start
            if not units or length > room:
                units.append([])
                room = size
            units[-1].append(piece)
            room -= length
    return Preparation(arguments, Path(arguments.output).resolve(), tuple(map(tuple, units)))


@contextmanager
def _claimed(output: Path, signature: dict[str, Any], overwrite: bool) -> Iterator[dict[str, Any] | None]:
    """Claims the folder for this preparation as long as it lasts; gives the manifest if it is finished.

    Raises:
        InputError: the folder is another's, or another process is at work there.
    """
    if output.exists() and not output.is_dir():
        raise InputError(f"--output {output}: is a file; give a folder")
    output.mkdir(parents=True, exist_ok=True)
    folder = os.open(output, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"--output {output}: another preparation is at work there; wait for it") from error
        manifest = _begin(output, signature, overwrite)
        try:
            yield manifest
        except InputError:  # finished units are kept, for the next attempt
            if manifest is None and not any((output / WORK).glob("unit-*.json")):
                _delete(output)
            raise
    finally:
        os.close(folder)


def _begin(output: Path, signature: dict[str, Any], overwrite: bool) -> dict[str, Any] | None:
    """Begins or goes on with a preparation; returns its manifest if it is finished."""
    manifest, begun = output / MANIFEST, output / WORK / "begun.json"
    records = {path: read_json(path) for path in (manifest, begun) if path.exists()}
    ours = any(isinstance(record, dict) and record.get("format") == FORMAT for record in records.values())
    if not ours and any(path.name != WORK for path in output.iterdir()):
        raise InputError(f"--output {output}: holds files that are no prepared corpus; give a new or empty folder")
    if ours and overwrite:
        _delete(output)
        records = {}
    for record in records.values():
        if changed := [key for key, value in signature.items() if record.get(key) != value]:
            raise InputError(
                f"--output {output}: holds what was prepared with other {', '.join(changed)}; "
                "give another folder, or --overwrite"
            )
    if manifest in records:
        shutil.rmtree(begun.parent, ignore_errors=True)
        Shards(output, "output")  # raises InputError if a shard is not whole
        return records[manifest]
    if not records:
        begun.parent.mkdir(exist_ok=True)
        write_json(begun, signature)
    return None


def _delete(output: Path) -> None:
    """Deletes a preparation, and nothing else in its folder."""
    for path in (output / TOKENIZER, output / WORK):
        shutil.rmtree(path, ignore_errors=True)
    for path in (output / MANIFEST, *output.glob("shard-*.array_record")):
        path.unlink(missing_ok=True)


def _ranges(preparation: Preparation, units: Sequence[Unit]) -> list[Range]:
    """Divides keys into as many ranges as keep the keys of a range within memory."""
    keys = sum(unit.file("keys").stat().st_size // RUN.itemsize for unit in units)
    count = max(1, -(-keys // RANGE_KEYS))
    edges = [(1 << 64) * i // count for i in range(count + 1)]
    return [Range(preparation, i, edges[i], edges[i + 1] - 1) for i in range(count)]


def _runs(unit: Unit) -> Iterator[np.ndarray]:
    """Maps the sorted runs of a unit's keys."""
    lengths = json.loads(unit.file("json").read_text())["runs"]
    if lengths:
        keys = np.memmap(unit.file("keys"), RUN, "r")
        for end, length in zip(np.cumsum(lengths), lengths):
            yield keys[end - length : end]


def _similar(preparation: Preparation, pairs: np.ndarray) -> np.ndarray:
    """Tells which pairs of lines are as similar as ``--similarity`` says, by their sketches: bool [C]."""
    sketch = np.empty((*pairs.shape, WIDTH), np.uint16)
    units = pairs >> 32
    for number in np.unique(units):
        rows = np.memmap(Unit(preparation, int(number)).file("sketches"), "<u2", "r").reshape(-1, WIDTH)
        of_unit = units == number
        sketch[of_unit] = rows[pairs[of_unit] & 0xFFFFFFFF]
    return (sketch[:, 0] == sketch[:, 1]).mean(axis=1) >= preparation.arguments.similarity


def _staying(unit: Unit) -> tuple[np.ndarray, int, int]:
    """Tells which rows of a unit stay, bool [rows]; how many are copies, and how many near duplicates."""
    rows = json.loads(unit.file("json").read_text())["lines"]
    copy, near = np.zeros(rows, bool), np.zeros(rows, bool)
    for path in sorted(unit.preparation.work.glob("range-*.npz")):
        with np.load(path) as duplicates:
            for mark, lines in ((copy, duplicates["copies"]), (near, duplicates["near"])):
                first, last = np.searchsorted(lines, [unit.number << 32, (unit.number + 1) << 32])
                mark[lines[first:last] & 0xFFFFFFFF] = True
    near &= ~copy
    return ~(copy | near), int(copy.sum()), int(near.sum())


def _tokenized(tokenizer: WordPiece, lines: list[str], words: bool) -> Iterator[TokenLine]:
    """Makes tokens of lines, and marks where words begin if `words` says so."""
    if not words:
        for encoding in tokenizer.tokenizer.encode_batch_fast(lines, add_special_tokens=False):
            yield TokenLine(np.array(encoding.ids), np.empty(0, bool))
        return
    for encoding, line in zip(tokenizer.tokenizer.encode_batch(lines), lines):
        yield TokenLine(np.array(encoding.ids[1:-1]), word_starts(encoding, line))


@lru_cache(maxsize=1)
def _tokenizer(output: Path) -> WordPiece:
    """Reads the tokenizer of a preparation, once in a process."""
    return WordPiece.from_model(output / TOKENIZER)


def _chunks(lines: Iterator[str]) -> Iterator[list[str]]:
    """Divides lines into lists of at most `CHUNK`."""
    return iter(lambda: list(islice(lines, CHUNK)), [])
