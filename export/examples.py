"""Examples of a model's task, from JSON objects, lines of text, and files of them."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from backends.files import InputError
from export.model import OnnxModel
from text.data import Example, Question, Sentence
from text.readers import BLANKS, check_text

LONGEST = 1 << 20
"""Bytes of a line."""

FIELDS = {
    "classification": ("text", "text_pair"),
    "reading": ("question", "context"),
    "labelling": ("text", "tokens"),
}
"""Fields of an object, by kind of task. A text to be labelled is taken character by character, without spaces."""


def sample(model: OnnxModel) -> dict[str, str]:
    """Returns an object that the model can be asked, for a user to try."""
    if model.task.kind == "reading":
        return {"question": "《红楼梦》的作者是谁？", "context": "《红楼梦》的作者是曹雪芹。"}
    text = {"text": "李白生于碎叶城" if model.task.kind == "labelling" else "今天股市大涨"}
    return text | ({"text_pair": "股票今天涨了很多"} if model.takes_pairs else {})


def from_object(model: OnnxModel, value: Any, number: int) -> Any:
    """Returns the example that a JSON object asks about.

    Raises:
        ValueError: it is no object, or lacks a field, or has one that is not a string or not known;
            the message says which.
    """
    known = FIELDS[model.task.kind]
    if not isinstance(value, dict):
        raise ValueError(f"expected an object with {known[0]}")
    if unknown := [name for name in value if name not in known]:
        raise ValueError(f"{ascii(unknown[0])[:40]}: unknown; there are {', '.join(known)}")
    if model.task.kind == "labelling" and "tokens" in value:
        tokens = value["tokens"]
        if "text" in value or not isinstance(tokens, list) or not tokens:
            raise ValueError("tokens: expected a list of strings, and no text beside it")
        return Sentence(number, tuple(_string(token, "tokens") for token in tokens), None)
    first = _string(value.get(known[0]), known[0])
    if model.task.kind == "labelling":
        return Sentence(number, tuple("".join(first.split())) or ("",), None)
    if model.task.kind == "reading":
        return Question(number, first, _string(value.get(known[1]), known[1]), (), None)
    pair = value.get(known[1])
    if pair is not None:
        pair = _string(pair, known[1])
    if model.takes_pairs not in (None, pair is not None):
        fault = "missing; the model takes pairs of texts" if pair is None else "the model takes single texts"
        raise ValueError(f"text_pair: {fault}")
    if pair is not None and not model.may_take_pairs:
        raise ValueError("text_pair: the model has one token type, and takes single texts")
    return Example(number, first, pair, None)


def from_line(model: OnnxModel, line: str, number: int, form: str, pairs: bool) -> Any:
    """Returns the example that a line asks about: an object in JSON, or a text, or two with a tab between them.

    Args:
        form: ``json`` or ``text``.

    Raises:
        ValueError: it asks nothing; the message says why.
    """
    if form == "json":
        try:
            return from_object(model, json.loads(line), number)
        except json.JSONDecodeError as error:
            raise ValueError(f"not JSON ({error.msg})") from error
        except RecursionError as error:
            raise ValueError("JSON nested too deep") from error
    if not pairs:
        return from_object(model, {"text": line}, number)
    texts = line.split("\t")
    if len(texts) != 2:
        raise ValueError(f"expected two texts with a tab between them, found {len(texts)}")
    return from_object(model, dict(zip(FIELDS[model.task.kind], texts)), number)


def form_of(path: Path, advice: str = "") -> str:
    """Returns the form of a file's lines, ``json`` or ``text``, by its name; raises InputError for tables, with what
    else can be given."""
    if path.suffix == ".csv":
        raise InputError(f"{path}: CSV is not read here; give JSON lines or a text a line{advice}")
    return "json" if path.suffix in (".json", ".jsonl") else "text"


def read_lines(file: BinaryIO, path: Path, form: str) -> Iterator[tuple[int, bytes]]:
    """Yields lines with their numbers and without their ends; blank ones among JSON lines are left out."""
    number = 0
    while line := file.readline(LONGEST + 1):
        number += 1
        if len(line) > LONGEST:
            raise InputError(f"{path}:{number}: longer than {LONGEST} bytes; one text a line is expected")
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        line = line.removesuffix(b"\n").removesuffix(b"\r")
        if form == "text" or line.strip(BLANKS.encode()):
            yield number, line


def example_of(model: OnnxModel, line: bytes, count: int, place: str, form: str, pairs: bool) -> Any:
    """Returns the example that a file's line asks about, as `from_line`; raises InputError, which names the place."""
    try:
        return from_line(model, line.decode("utf-8"), count, form, pairs)
    except UnicodeDecodeError as error:
        raise InputError(f"{place}: not UTF-8 at byte {error.start}") from error
    except ValueError as error:
        raise InputError(f"{place}: {error}") from error


def read_examples(model: OnnxModel, path: Path, most: int) -> list[Any]:
    """Returns as many examples of a file, spread over its lines, blank ones left out; all if there are no more.

    Raises:
        InputError: there is no such file, or nothing in it, or one of the lines asks nothing.
    """
    form, pairs = form_of(path), bool(model.takes_pairs) or model.task.kind == "reading"
    if not path.is_file():
        raise InputError(f"{path}: no such file; give a file with a text a line")
    with path.open("rb") as file:
        numbers = [number for number, line in read_lines(file, path, form) if line.strip(BLANKS.encode())]
    if not numbers:
        raise InputError(f"{path}: holds no texts; give a file with a text a line")
    wanted = {numbers[i] for i in np.linspace(0, len(numbers) - 1, min(most, len(numbers))).astype(int)}
    with path.open("rb") as file:
        return [
            example_of(model, line, number, f"{path}:{number}", form, pairs)
            for number, line in read_lines(file, path, form)
            if number in wanted
        ]


def _string(value: Any, name: str) -> str:
    if value is None:
        raise ValueError(f"{name}: missing")
    if not isinstance(value, str):
        raise ValueError(f"{name}: expected a string")
    check_text(value, name)
    return value
