"""Files of data as rows, each with its place, as what follows the file's name.

Lines end at "\\n" only, perhaps with "\\r" before it: strings hold U+2028 and U+0085. Columns are parted by what a
layout names, and blank lines hold nothing but spaces and tabs: an ideographic space (U+3000) is text. A row that
cannot be read is the ValueError that says why.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from backends.files import InputError

BLANKS = " \t\r\n"
QUESTIONS = "SQuAD's or CMRC 2018's layout, or JSON lines with context, question and answers"
_HALVES = re.compile(r"\\u[dD][89a-fA-F]")
"""Surrogates as JSON writes them, also those that make whole pairs."""
_LONGEST_FIELD = 1 << 30
"""Characters of a field of CSV; the library's default is 131,072."""


def is_blank(text: str) -> bool:
    return not text.strip(BLANKS)


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yields all lines with their numbers, from 1; a byte order mark before the first is left out.

    Raises:
        InputError: the file is not UTF-8.
    """
    try:
        content = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = error.object.count(b"\n", 0, error.start) + 1
        place = error.start - error.object.rfind(b"\n", 0, error.start) - 1
        raise InputError(f"{path}:{number}: not UTF-8 at byte {place}; convert the file") from error
    for number, line in enumerate(content.split("\n"), 1):
        yield number, line.removesuffix("\r")


def check_text(value: Any, name: str = "a string") -> None:
    """Raises ValueError, naming the string, if there is half a surrogate pair in a value of JSON."""
    waiting = [(name, value)]
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, str):
            try:
                value.encode()
            except UnicodeEncodeError as error:
                message = f"{name}: holds half a surrogate pair at character {error.start}, which is no text"
                raise ValueError(message) from error
        elif isinstance(value, list):
            waiting += [(name, item) for item in value]
        elif isinstance(value, dict):
            waiting += [*value.items(), *(("a name", key) for key in value)]


def from_json(text: str) -> Any:
    """Parses JSON; raises ValueError if the text is none, or holds half a surrogate pair."""
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError("JSON nested too deep") from error
    except ValueError as error:
        raise ValueError(f"not JSON ({error})") from error
    if _HALVES.search(text):
        check_text(value)
    return value


def json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Reads JSON lines: yields the objects."""
    for number, line in lines(path):
        if is_blank(line):
            continue
        try:
            row = from_json(line)
        except ValueError as error:
            row = error
        yield f":{number}", row if isinstance(row, (dict, ValueError)) else ValueError("expected a JSON object")


def tsv_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Reads tab-separated values: yields the cells of each line; quotes are text."""
    for number, line in lines(path):
        if not is_blank(line):
            yield f":{number}", line.split("\t")


def csv_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Reads comma-separated values as in RFC 4180: yields the cells of each row; in quotes may be line ends."""
    csv.field_size_limit(_LONGEST_FIELD)
    reader = csv.reader((f"{line}\n" for _, line in lines(path)), strict=True)
    while True:
        place = f":{reader.line_num + 1}"
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            reason = str(error).partition(" - ")[0].replace("new-line character", "carriage return")
            yield place, ValueError(f"not CSV ({reason}); a field with commas, quotes or line ends stands in quotes")
            continue
        if not all(map(is_blank, cells)):
            yield place, cells


def tagged_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Reads tagged text: yields ``tokens`` and ``tags`` of each sentence.

    A line holds a token and its tag, a tab or spaces between them, and blank lines part sentences; or, in paddlenlp's
    layout, a line holds a sentence, with U+0002 between tokens and between tags.
    """
    tokens: list[str] = []
    tags: list[str] = []
    start, by_sentence = 1, False
    for number, line in lines(path):
        cells = line.split("\t") if "\t" in line else [cell for cell in line.split(" ") if cell]
        if number == 1:
            by_sentence = "\x02" in line or cells == ["text_a", "label"]
            if cells == ["text_a", "label"]:
                continue
        if by_sentence:
            if not is_blank(line):
                text, _, tag = line.partition("\t")
                yield f":{number}", {"tokens": text.split("\x02"), **({"tags": tag.split("\x02")} if tag else {})}
        elif is_blank(line):
            if tokens:
                yield f":{start}", {"tokens": tokens, **({"tags": tags} if tags else {})}
            tokens, tags, start = [], [], number + 1
        elif len(cells) > 2:
            yield f":{number}", ValueError(f"{len(cells)} columns, expected a token and its tag")
        else:
            tokens.append(cells[0])
            tags += cells[1:]
    if tokens:
        yield f":{start}", {"tokens": tokens, **({"tags": tags} if tags else {})}


def question_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Reads questions: yields ``context``, ``question``, ``answers`` and, where it has one, ``id`` of each.

    A file is in SQuAD's layout (CMRC 2018's second one, and DRCD's), in CMRC 2018's first one, or JSON lines.
    """
    content = [line for _, line in lines(path)]
    text = "\n".join(content)
    try:
        whole = json.loads(text)
    except RecursionError:
        yield ":1", ValueError("JSON nested too deep")
        return
    except ValueError as error:
        if any(map(_is_json, [line for line in content if not is_blank(line)][:2])):
            yield from json_rows(path)
        else:
            yield f":{getattr(error, 'lineno', 1)}", ValueError(f"not JSON ({error})")
        return
    halves = _HALVES.search(text) is not None
    number = 0
    try:
        for number, row in enumerate(_questions(whole), 1):
            place = f", question {number}"
            try:
                if halves:
                    check_text(row)
            except ValueError as error:
                yield place, error
            else:
                yield place + (f" ({row['id']})" if "id" in row else ""), row
    except (AttributeError, TypeError):
        yield f", after question {number}", ValueError(f"expected {QUESTIONS}")


def _questions(whole: Any) -> Iterator[dict[str, Any]]:
    """Yields the questions of a file that is a single value of JSON; raises AttributeError or TypeError where it has
    none of the layouts."""
    if isinstance(whole, dict) and "question" in whole:
        yield whole
        return
    articles: Any = whole.get("data") if isinstance(whole, dict) else whole
    for article in articles:
        for paragraph in article.get("paragraphs", [article]):
            context = paragraph.get("context", paragraph.get("context_text"))
            for question in paragraph.get("qas", ()):
                row = {
                    "context": context,
                    "question": question.get("question", question.get("query_text")),
                    "answers": question.get("answers"),
                }
                name = question.get("id", question.get("query_id"))
                yield row if name is None else {"id": name, **row}


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True
