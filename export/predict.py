"""``python -m export predict``: a file of texts becomes a file of answers, in the same order."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, BinaryIO, Literal

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from backends.interface import InputError
from backends.pretrained import digest, read_json, write_json
from export.examples import from_line
from export.model import OnnxModel, check_output
from training.log import console, say

BLOCK = 4096
"""Texts that are sorted by length together; memory holds so many, and their answers."""
LONGEST = 1 << 20
"""Bytes of a line."""
SECONDS = 10.0
"""Between two reports where no progress bar can be drawn."""


@dataclass
class PredictArguments:
    """A file of texts, answered."""

    model: str = field(kw_only=True)
    """the ONNX file"""
    texts: str = field(kw_only=True)
    """the file with a text a line, or a JSON object: text and perhaps text_pair, or question and context, or tokens"""
    output: str | None = None
    """the file for the answers, JSON lines; without, texts.txt becomes texts.answers.jsonl"""
    format: Literal["auto", "text", "json"] = "auto"
    """of the lines; auto takes files named .json and .jsonl for JSON"""
    pairs: bool = False
    """a line of text holds two, with a tab between them"""
    threads: int = 0
    """that compute; 0 takes as many as there are cores"""
    resume: bool = False
    """go on where a run was stopped that answered the same texts"""
    overwrite: bool = False
    """replace answers that are there"""

    def without_effect(self, given: Collection[str]) -> dict[str, str]:
        """Options that others keep from having an effect, each with the reason."""
        lines = self.format == "json" or (self.format == "auto" and Path(self.texts).suffix in (".json", ".jsonl"))
        return {"pairs": "with JSON lines, which name text and text_pair"} if lines else {}


def predict(arguments: PredictArguments) -> Path:
    """Answers every line. Texts of similar length are computed together, within blocks of `BLOCK` lines;
    a block's answers are on disk before the next is begun.

    Raises:
        InputError: the model, the texts or an option is wrong; what was answered before is kept.
    """
    model, texts = OnnxModel(Path(arguments.model), arguments.threads), Path(arguments.texts)
    form = arguments.format
    if form == "auto":
        form = "json" if texts.suffix in (".json", ".jsonl") else "text"
    if form == "text" and model.task.kind == "reading" and not arguments.pairs:
        raise InputError(f"{texts}: {model.path} answers questions; give JSON lines, or --pairs")
    single = form == "text" and model.task.kind == "classification" and not (arguments.pairs or model.in_graph)
    if not texts.is_file():
        raise InputError(f"{texts}: no such file; give a file with a text a line")
    output = Path(arguments.output) if arguments.output else texts.with_name(f"{texts.stem}.answers.jsonl")
    check_output(output, model.path, texts)
    part, record = output.with_name(f"{output.name}.part"), output.with_name(f"{output.name}.of")
    with model.path.open("rb") as first, texts.open("rb") as second:
        run = {"model": digest(first), "texts": digest(second), "format": form, "pairs": arguments.pairs}
    done = _claim(arguments, run, output, part, record)
    began, start = time.monotonic(), done
    with (
        texts.open("rb") as lines,
        _alone(part, record) as answers,
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
        told = began
        for block in _blocks(lines, texts, done):
            if single and done == 0 and all(b"\t" in line for line in block):
                raise InputError(f"{texts}: every line holds a tab; give --pairs if it parts two texts, or JSON lines")
            examples = [
                _example(model, line, number, texts, form, arguments.pairs or model.takes_pairs)
                for number, line in enumerate(block, done)
            ]
            answers.writelines(_json_line(answer) for answer in model.answers(examples))
            answers.flush()
            os.fsync(answers.fileno())
            done += len(block)
            now = time.monotonic()
            status = f"{(done - start) / (now - began):.0f} texts/s"
            progress.update(bar, completed=lines.tell(), status=status)
            if not console.is_terminal and now - told > SECONDS:
                say(f"predict: {done} texts, {100 * lines.tell() / texts.stat().st_size:.0f} %, {status}")
                told = now
    os.replace(part, output)
    record.unlink()
    say(f"{output}: {done} answers, {(done - start) / (time.monotonic() - began):.0f} texts/s")
    return output


def _claim(arguments: PredictArguments, run: dict[str, Any], output: Path, part: Path, record: Path) -> int:
    """Makes the output this run's; returns how many lines are answered already."""
    if output.exists() and not arguments.overwrite:
        raise InputError(f"--output {output}: is there already; give another, or --overwrite")
    if part.exists() and not arguments.overwrite:
        if not arguments.resume or not record.exists():
            raise InputError(f"--output {output}: half done ({part.name}); --resume goes on, --overwrite starts anew")
        before = read_json(record)
        if changed := [key for key in run if before.get(key) != run[key]]:
            raise InputError(f"--resume: {part} was begun with other {' and '.join(changed)}; --overwrite starts anew")
        return _whole_lines(part)
    output.parent.mkdir(parents=True, exist_ok=True)
    part.unlink(missing_ok=True)
    write_json(record, run)
    return 0


@contextmanager
def _alone(part: Path, record: Path) -> Iterator[IO[bytes]]:
    """The file for answers, for this run alone; a run that fails before its first answer leaves nothing."""
    with part.open("ab") as answers:
        try:
            fcntl.flock(answers, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(f"{part}: another run is writing it; wait for that one") from error
        try:
            yield answers
        except BaseException:
            if not part.stat().st_size:
                part.unlink()
                record.unlink()
            raise


def _whole_lines(path: Path) -> int:
    """How many lines a file holds; half a line at its end is cut off."""
    count = end = 0
    with path.open("r+b") as file:
        for line in file:
            if line.endswith(b"\n"):
                count, end = count + 1, end + len(line)
        file.truncate(end)
    return count


def _blocks(file: BinaryIO, path: Path, done: int) -> Iterator[list[bytes]]:
    """The lines after those that are done, in blocks, without their ends."""
    number, block = 0, []
    while line := file.readline(LONGEST + 1):
        number += 1
        if len(line) > LONGEST:
            raise InputError(f"{path}:{number}: longer than {LONGEST} bytes; one text a line is expected")
        if number > done:
            block.append(line.rstrip(b"\r\n"))
            if len(block) == BLOCK:
                yield block
                block = []
    if block:
        yield block


def _example(model: OnnxModel, line: bytes, number: int, path: Path, form: str, pairs: bool) -> Any:
    try:
        return from_line(model, line.decode("utf-8"), number, form, pairs)
    except UnicodeDecodeError as error:
        raise InputError(f"{path}:{number + 1}: not UTF-8 at byte {error.start}") from error
    except ValueError as error:
        raise InputError(f"{path}:{number + 1}: {error}") from error


def _json_line(answer: dict[str, Any]) -> bytes:
    return (json.dumps(answer, ensure_ascii=False) + "\n").encode()
