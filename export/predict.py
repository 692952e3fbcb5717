"""``python -m export predict``: a file of texts becomes a file of answers, in the same order."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Literal

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from backends.files import InputError, digest, is_at, locked, read_sealed, write_sealed
from export.examples import example_of, form_of, read_lines
from export.model import check_output
from export.runtime_choice import RuntimeChoice, open_model
from programs.console import console, say

BLOCK = 4096
"""Texts that are sorted by length together; memory holds as many, and their answers."""
SECONDS = 10.0
"""Seconds between two reports where no progress bar can be drawn."""


@dataclass
class PredictArguments:
    """A file of texts, answered."""

    model: str = field(kw_only=True)
    """the ONNX file"""
    texts: str = field(kw_only=True)
    """the file with a text a line, or a JSON object (blank lines are left out): text and perhaps text_pair, or question
    and context, or tokens"""
    output: str | None = None
    """the file for the answers, JSON lines; without, texts.txt becomes texts.answers.jsonl"""
    format: Literal["auto", "text", "json"] = "auto"
    """of the lines; auto takes files named .json and .jsonl for JSON"""
    pairs: bool = False
    """a line of text holds two, with a tab between them"""
    runtime: RuntimeChoice = "onnxruntime"
    """what computes; auto takes the fastest that is installed"""
    threads: int = 0
    """that compute; 0 takes as many as there are cores"""
    resume: bool = False
    """go on where a run was stopped that answered the same texts"""
    overwrite: bool = False
    """replace answers that are there"""

    def without_effect(self, options: Collection[str]) -> dict[str, str]:
        """Returns the options that others keep from having an effect, each with the reason."""
        lines = self.format == "json" or (self.format == "auto" and Path(self.texts).suffix in (".json", ".jsonl"))
        return {"pairs": "with JSON lines, which name text and text_pair"} if lines else {}


def predict(arguments: PredictArguments) -> Path:
    """Answers every line. Texts of similar length are computed together, within blocks of `BLOCK` lines;
    a block's answers are on disk before the next is begun.

    Raises:
        InputError: the model, the texts or an option is wrong; what was answered before is kept.
    """
    model, texts = open_model(Path(arguments.model), arguments.threads, arguments.runtime), Path(arguments.texts)
    form = form_of(texts, ", or --format text") if arguments.format == "auto" else arguments.format
    if form == "text" and model.task.kind == "reading" and not arguments.pairs:
        raise InputError(f"{texts}: {model.path} answers questions; give JSON lines, or --pairs")
    single = (
        form == "text" and model.task.kind == "classification" and not arguments.pairs and model.takes_pairs is None
    )
    if not texts.is_file():
        raise InputError(f"{texts}: no such file; give a file with a text a line")
    output = Path(arguments.output) if arguments.output else texts.with_name(f"{texts.stem}.answers.jsonl")
    check_output(output, model.path, texts)
    part, record = output.with_name(f"{output.name}.part"), output.with_name(f"{output.name}.of")
    with model.path.open("rb") as first, texts.open("rb") as second:
        run = {"model": digest(first), "texts": digest(second), "format": form, "pairs": arguments.pairs}
    run |= {"runtime": model.runtime.name, "threads": model.threads}
    with (
        texts.open("rb") as lines,
        _claimed(arguments, run, output, part, record) as (answers, done),
        Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        ) as progress,
    ):
        bar = progress.add_task("predict", total=texts.stat().st_size, status="")
        began, start = time.monotonic(), done
        reported = began
        for block in _blocks(islice(read_lines(lines, texts, form), done, None)):
            if single and done == 0 and all(b"\t" in line for _, line in block):
                raise InputError(f"{texts}: every line holds a tab; give --pairs if it parts two texts, or JSON lines")
            examples = [
                example_of(model, line, done + i, f"{texts}:{number}", form, arguments.pairs or bool(model.takes_pairs))
                for i, (number, line) in enumerate(block)
            ]
            answers.writelines(_json_line(answer) for answer in model.answers(examples))
            answers.flush()
            os.fsync(answers.fileno())
            if not is_at(answers, part):
                raise InputError(f"{part}: was removed while answers were written to it; run the command again")
            done += len(block)
            now = time.monotonic()
            status = f"{(done - start) / (now - began):.0f} texts/s"
            progress.update(bar, completed=lines.tell(), status=status)
            if not console.is_terminal and now - reported > SECONDS:
                say(f"predict: {done} texts, {100 * lines.tell() / texts.stat().st_size:.0f} %, {status}")
                reported = now
        os.replace(part, output)
        record.unlink(missing_ok=True)
    say(f"{output}: {done} answers, {(done - start) / (time.monotonic() - began):.0f} texts/s")
    return output


@contextmanager
def _claimed(
    arguments: PredictArguments, run: dict[str, Any], output: Path, part: Path, record: Path
) -> Iterator[tuple[BinaryIO, int]]:
    """Opens the file for answers, for this run alone, and yields it with the number of answers that it holds. What
    others left is looked at, and overwritten, only behind the lock. A run that fails before its first answer leaves
    nothing."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with locked(part) as answers:
        try:
            yield answers, _begin(arguments, run, output, answers, part, record)
        except BaseException:
            if is_at(answers, part) and not part.stat().st_size:
                part.unlink()
                record.unlink(missing_ok=True)
            raise


def _begin(
    arguments: PredictArguments, run: dict[str, Any], output: Path, answers: BinaryIO, part: Path, record: Path
) -> int:
    """Begins or goes on; returns the number of answers that the file holds already."""
    if output.exists() and not arguments.overwrite:
        raise InputError(f"--output {output}: is there already; give another, or --overwrite")
    if part.stat().st_size and not arguments.overwrite:
        if not arguments.resume or not record.exists():
            raise InputError(f"--output {output}: half done ({part.name}); --resume goes on, --overwrite starts anew")
        try:
            before = read_sealed(record)
        except (OSError, ValueError) as error:
            raise InputError(f"--resume: {record}: {error}; --overwrite starts anew") from error
        same = all(before.get(key) == run[key] for key in ("model", "texts", "format", "pairs"))
        if (
            same
            and {"runtime", "threads"} <= before.keys()
            and any(before.get(key) != run[key] for key in ("runtime", "threads"))
        ):
            options = f"--runtime {before.get('runtime')} --threads {before.get('threads')}"
            raise InputError(f"--resume: {part} was begun with {options}; give these, or --overwrite starts anew")
        if changed := [key for key in run if before.get(key) != run[key]]:
            raise InputError(f"--resume: {part} was begun with other {' and '.join(changed)}; --overwrite starts anew")
        return _whole_blocks(answers)
    answers.truncate(0)  # first: a record never stands beside answers of another run
    write_sealed(record, run)
    return 0


def _whole_blocks(file: BinaryIO) -> int:
    """Returns the number of answers of a file's whole blocks; what is behind them is cut off: it is computed again,
    together with the same texts as in an uninterrupted run."""
    count = end = read = 0
    file.seek(0)
    for line in file:
        count, read = count + line.endswith(b"\n"), read + len(line)
        if count % BLOCK == 0 and line.endswith(b"\n"):
            end = read
    file.truncate(end)
    return count // BLOCK * BLOCK


def _blocks(lines: Iterable[tuple[int, bytes]]) -> Iterator[list[tuple[int, bytes]]]:
    """Yields lines in blocks."""
    lines = iter(lines)
    while block := list(islice(lines, BLOCK)):
        yield block


def _json_line(answer: dict[str, Any]) -> bytes:
    return (json.dumps(answer, ensure_ascii=False) + "\n").encode()
