"""Examples of a task, read from its data: a folder with a file for each split, in a layout of `text.readers`."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from backends.files import InputError
from text.corpus import text_files
from text.readers import BLANKS, QUESTIONS, csv_rows, is_blank, json_rows, lines, question_rows, tagged_rows, tsv_rows
from text.rows import Row, nearest, shown, text_of, value_of, whole_number
from text.tasks import TASKS, Columns, Task

Split = Literal["train", "dev", "test"]
UNLABELLED = ("-", "")
"""Values of the label column in rows that annotators did not agree on."""
_LAYOUTS = (".json", ".jsonl", ".tsv", ".csv")
"""Endings of files that are laid out as a split's, where others are plain text."""
_EXPECTED = {
    "classification": "a JSON object on each line, or a table",
    "reading": QUESTIONS,
    "labelling": "a token and its tag a line, blank lines between sentences, or JSON lines with text and tags",
}
"""Contents of files by kind, for a message."""


@dataclass(frozen=True)
class Example:
    """A text, or a pair of them, to be classified."""

    id: Any
    text: str
    pair: str | None
    label: int | None
    """Index of the label among the task's; None in a test set."""


@dataclass(frozen=True)
class Question:
    """A question whose answer is a span of its context."""

    id: Any
    question: str
    context: str
    answers: tuple[str, ...]
    """All right answers, first one that is in the context if any is; none in a test set."""
    start: int | None
    """Place in the context where the first answer begins; None if no answer is in the context."""


@dataclass(frozen=True)
class Sentence:
    """Characters, or words, that each have a tag."""

    id: Any
    tokens: tuple[str, ...]
    tags: tuple[int, ...] | None
    """Indices of the tokens' labels among the task's; None in a test set."""


@dataclass(frozen=True)
class Data:
    """A split that was read."""

    path: Path
    examples: Sequence[Any]
    """`Example`, `Question` or `Sentence`, by the task's kind."""
    unlabelled: int
    """Rows left out because they have no label."""
    bad: Sequence[str]
    """Places and faults of the lines left out on request."""
    absent: Sequence[str]
    """Places of questions none of whose answers is in the context; in a dev or test set they count, as all do."""


def read_split(
    task: Task, data_dir: Path, split: Split, skip_bad_lines: bool = False, instead: Path | None = None
) -> Data:
    """Reads a split's examples; the test set's may lack labels.

    Args:
        skip_bad_lines: leave out what cannot be read, instead of refusing the file.
        instead: a file to read in place of the folder's.

    Raises:
        InputError: no such split, lines that cannot be read, or none that can.
    """
    path = instead or split_file(task, data_dir, split)
    read = ((f"{path}{place}", example) for place, _, example in _examples(task, _rows(task, path), split))
    return _data(path, read, skip_bad_lines, _EXPECTED[task.kind])


def read_unlabelled(task: Task, path: Path, skip_bad_lines: bool = False) -> Data:
    """Reads texts whose labels are not known, or not to be known: a file, or a folder of them.

    A file whose name ends as a split's may (``.json``, ``.jsonl``, ``.tsv``, ``.csv``) is laid out as that, with or
    without labels; any other is plain text: a text a line, of pairs a tab between two, of labelling taken character by
    character, without blanks.

    Args:
        skip_bad_lines: leave out what cannot be read, instead of refusing the file.

    Raises:
        InputError: no such file, none in the folder, plain text that the task has no use for, lines that cannot be
            read, or none that can.
    """
    if not path.exists():
        raise InputError(f"--unlabelled {path}: no such file or folder; give one with texts of {task.name}")

    def read() -> Iterator[tuple[str, Any]]:
        for file in [path] if path.is_file() else text_files(path, "unlabelled"):
            rows = _rows(task, file) if file.suffix in _LAYOUTS else _plain_rows(task, file)
            unlabelled = ((place, _without_labels(task, row)) for place, row in rows)
            for place, _, example in _examples(task, unlabelled, "test"):
                yield f"{file}{place}", example

    return _data(path, read(), skip_bad_lines, f"a text a line, or {_EXPECTED[task.kind]}")


def _data(path: Path, read: Iterator[tuple[str, Any]], skip_bad_lines: bool, expected: str) -> Data:
    """Gathers what `_examples` yields, each with its file and place.

    Raises:
        InputError: lines that cannot be read, or none that can.
    """
    examples: list[Any] = []
    bad: list[str] = []
    absent: list[str] = []
    unlabelled = total = 0
    for total, (place, example) in enumerate(read, 1):  # noqa: B007
        if isinstance(example, Exception):
            bad.append(f"{place}: {example}")
        elif example is None:
            unlabelled += 1
        else:
            examples.append(example)
            if isinstance(example, Question) and example.answers and example.start is None:
                absent.append(place)
    if bad and not skip_bad_lines:
        raise InputError(
            f"{bad[0]} ({len(bad)} of {total} cannot be read; --skip_bad_lines true leaves such lines out)"
        )
    if not examples:
        raise InputError(f"{path}: no example in it; expected {expected}")
    return Data(path, examples, unlabelled, bad, absent)


def labelled_rows(task: Task, data_dir: Path, skip_bad_lines: bool = False) -> tuple[Path, list[Row]]:
    """Returns the training file and its rows that have a label, as they stand there.

    Raises:
        InputError: as `read_split`.
    """
    data = read_split(task, data_dir, "train", skip_bad_lines)
    read = _examples(task, _rows(task, data.path), "train")
    rows = [row for _, row, example in read if isinstance(example, Example)]
    return data.path, rows


def with_labels_of(task: Task, data_dir: Path, instead: Path | None = None) -> Task:
    """Returns the task with its labels, read from the training file where it declares none.

    Args:
        instead: a file to read in place of the folder's.

    Raises:
        InputError: no training file, or fewer than two labels in it.
    """
    if task.labels is not None or task.kind == "reading":
        return task
    path = instead or split_file(task, data_dir, "train")
    column = "tags" if task.kind == "labelling" else task.label_column
    labels: set[str] = set()
    fault = ""
    columns: dict[Any, None] = {}
    for place, row in _rows(task, path):
        try:
            if isinstance(row, ValueError):
                raise row
            columns |= dict.fromkeys(row)
            values = (_tags(row) or ()) if task.kind == "labelling" else [row[column]] if column in row else ()
            labels.update(map(_label_name, values))
        except ValueError as error:
            fault = fault or f"{path}{place}: {error}"
    labels.difference_update(UNLABELLED)
    if len(labels) < 2:
        names = f"columns are {', '.join(map(str, columns)) or 'none'}"
        if column not in columns:
            raise InputError(fault or f"{path}: no column {column}; {names}")
        raise InputError(fault or f"{path}: column {column} has {len(labels)} labels; expected at least 2 ({names})")
    numbers = all(re.fullmatch(r"-?\d{1,18}", label) for label in labels)
    return replace(task, labels=tuple(sorted(labels, key=lambda label: (int(label), label) if numbers else (0, label))))


def split_file(task: Task, data_dir: Path, split: Split) -> Path:
    """Finds the file of a split, in the folder itself or in its subfolder of the task's name.

    Raises:
        InputError: no such file.
    """
    folder = data_dir / task.name if (data_dir / task.name).is_dir() else data_dir
    endings = ("json", "jsonl", "tsv", "txt", *(["csv"] if task.kind == "classification" else []))
    names = [f"{split}.{ending}" for ending in endings]
    if task.files and split in task.files:
        names.append(task.files[split])
    for name in names:
        if (folder / name).is_file():
            return folder / name
    files = sorted(path.name for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
    content = ("there are " + ", ".join(files)) if files else "no file there" if folder.is_dir() else "no such folder"
    fetch = f"; python -m finetuning.download --tasks {task.name} --data_dir {data_dir} fetches it"
    raise InputError(
        f"--data_dir {data_dir}: no {split} set of {task.name} in {folder} ({content}); expected {' or '.join(names)}"
        + (fetch if task.name in TASKS and not files else "")
    )


def _examples(task: Task, rows: Iterator[tuple[str, Any]], split: Split) -> Iterator[tuple[str, Any, Any]]:
    """Yields of each row (`_rows`) its place, the row itself, and the example made of it, the exception that refuses
    it, or None if it has no label and needs one."""
    read = {"classification": _example, "reading": _question, "labelling": _sentence}[task.kind]
    for number, (place, row) in enumerate(rows):
        try:
            if isinstance(row, ValueError):
                raise row
            yield place, row, read(task, row, split, number)
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            yield place, row, error


def _rows(task: Task, path: Path) -> Iterator[tuple[str, Any]]:
    """Reads a file's rows as `text.readers` does: of each its place, and the row or the ValueError that refuses it."""
    if task.kind == "reading":
        return question_rows(path)
    if path.suffix in (".json", ".jsonl"):
        return json_rows(path)
    if task.kind == "labelling":
        return tagged_rows(path)
    return _table_rows(task, path)


def _plain_rows(task: Task, path: Path) -> Iterator[tuple[str, Any]]:
    """Reads plain text as `_rows` does a table; raises InputError if the task's texts are more than such lines."""
    columns = task.text.names if isinstance(task.text, Columns) and task.kind == "classification" else ()
    if not columns and task.kind != "labelling":
        raise InputError(f"--unlabelled {path}: plain text has not all that {task.name} needs; give JSON lines, .json")
    for number, line in lines(path):
        if is_blank(line):
            continue
        place, texts = f":{number}", line.split("\t") if len(columns) == 2 else [line.strip(BLANKS)]
        if task.kind == "labelling":
            yield place, {"tokens": [*"".join(line.split())]}
        elif len(texts) != len(columns):
            yield place, ValueError(f"{len(texts)} columns, expected 2, a tab between: {', '.join(columns)}")
        else:
            yield place, dict(zip(columns, texts))


def _without_labels(task: Task, row: Any) -> Any:
    """Returns a row without what says the right answer; a ValueError as it is."""
    if isinstance(row, ValueError):
        return row
    return {name: value for name, value in row.items() if name not in (task.label_column, "answers", "tags")}


def _table_rows(task: Task, path: Path) -> Iterator[tuple[str, Any]]:
    """Reads the rows of a TSV or CSV file, whose first line may name the columns."""
    columns: Sequence[str] = task.columns
    first = True
    for place, cells in csv_rows(path) if path.suffix == ".csv" else tsv_rows(path):
        if isinstance(cells, ValueError):
            yield place, cells
            continue
        if first:
            first = False
            if not columns or set(columns) <= set(cells):
                columns = cells
                if twice := [name for name in cells if cells.count(name) > 1]:
                    raise InputError(f"{path}{place}: two columns are called {twice[0]!r}; give each its own name")
                continue
            # Some publishers name the columns otherwise: a first line without a label is a header too.
            labels = (*(task.labels or ()), *task.aliases)
            if len(cells) == len(columns) and cells[columns.index(task.label_column)] not in labels:
                continue
        # A test set may come without its labels.
        if len(cells) not in (len(columns), len(columns) - (task.label_column == columns[-1])):
            yield place, ValueError(f"{len(cells)} columns, expected {len(columns)}: {', '.join(columns)}")
            continue
        yield place, dict(zip(columns, cells))


def _label_name(value: Any) -> str:
    """Returns a label of a file, a string, number or truth value, as a string; raises ValueError if it is none."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, (str, int, float)) or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError(f"label is {shown(value)}, expected a string or a number")
    return str(value).strip(BLANKS)


def _label(task: Task, value: Any) -> int:
    """Returns the index of a label; raises ValueError if it is none of the task's."""
    assert task.labels is not None
    name = _label_name(value)
    try:
        return task.labels.index(task.aliases.get(name, name))
    except ValueError:
        labels = ", ".join(map(task.spelling, task.labels[:6])) + (", ..." if len(task.labels) > 6 else "")
        raise ValueError(f"label {name!r} is none of the {len(task.labels)} of {task.name}: {labels}") from None


def _id(row: Row, number: int) -> Any:
    """Returns a row's id, or else its number."""
    value = row.get("id", row.get("idx"))
    if isinstance(value, (list, dict)) or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError(f"id is {shown(value)}, expected a string or a number")
    return number if value is None else value


def _example(task: Task, row: Row, split: Split, number: int) -> Example | None:
    """Makes an example of a row; None if it has no label and needs one."""
    assert task.text is not None
    label = None
    try:
        value = value_of(row, task.label_column)
        if _label_name(value) not in UNLABELLED:
            label = _label(task, value)
    except ValueError:
        if split != "test":  # where anything may stand in for the labels that are kept back
            raise
    if label is None and split != "test":
        return None
    text, pair = task.text(row)
    return Example(_id(row, number), text, pair, label)


def _answers(value: Any) -> list[tuple[str, int | None]]:
    """Parses answers, each with the place where it is said to begin, if any: strings, objects, or an object of the
    hub's, with a list of texts and one of places."""
    if value is None:
        return []
    if isinstance(value, Mapping):
        texts, starts = value_of(value, "text"), value.get("answer_start")
        if isinstance(texts, str):
            value = [value]
        else:
            if not isinstance(texts, list) or not isinstance(starts, list | None):
                raise ValueError(f"answers is {shown(value)}, expected a list of text, and of answer_start")
            starts = [None] * len(texts) if starts is None else starts
            if len(starts) != len(texts):
                raise ValueError(f"{len(texts)} answers, but {len(starts)} of answer_start")
            value = [{"text": text, "answer_start": start} for text, start in zip(texts, starts)]
    if not isinstance(value, list):
        raise ValueError(f"answers is {shown(value)}, expected a list")
    answers: list[tuple[str, int | None]] = []
    for answer in value:
        start = None
        if isinstance(answer, Mapping):
            answer, start = value_of(answer, "text"), answer.get("answer_start")
        if not isinstance(answer, str):
            raise ValueError(f"answer is {shown(answer)}, expected a string")
        answers.append((answer, None if start is None else whole_number(start, "answer_start")))
    return answers


def _question(task: Task, row: Row, split: Split, number: int) -> Question:
    """Makes a question of a row."""
    context, question = text_of(row, "context"), value_of(row, "question")
    if not isinstance(question, str):  # it may be empty: CMRC 2018 has such, and its evaluation counts them
        raise ValueError(f"question is {shown(question)}, expected a string")
    answers = _answers(row.get("answers"))
    if not any(text.strip() for text, _ in answers):
        if split != "test":
            raise ValueError("no answers; a question that has none (SQuAD 2.0's is_impossible) is not learnt")
        answers = []
    texts = [text for text, _ in answers]
    starts = [nearest(context, text, offset or 0) if text.strip() else None for text, offset in answers]
    first = next((i for i, start in enumerate(starts) if start is not None), None)
    if first is not None:
        texts.insert(0, texts.pop(first))
    elif split == "train":
        raise ValueError(f"none of the answers is in the context: {', '.join(map(shown, texts[:3]))}")
    elif split == "test":  # what stands in for the answers that are kept back
        texts = []
    start = None if first is None else starts[first]
    return Question(_id(row, number), question, context, tuple(texts), start)


def _tags(row: Row) -> list[Any] | None:
    """Returns a row's tags, if it has any."""
    tags = row.get("tags")
    if tags is not None and not isinstance(tags, list):
        raise ValueError(f"tags is {shown(tags)}, expected a list")
    return tags


def _sentence(task: Task, row: Row, split: Split, number: int) -> Sentence:
    """Makes a sentence of a row."""
    tokens = row.get("tokens") or value_of(row, "text")
    if not tokens or not isinstance(tokens, (str, list)) or not all(isinstance(token, str) for token in tokens):
        raise ValueError("no tokens")
    tags = _tags(row)
    if tags is None and split != "test":
        raise ValueError("no tags")
    if tags is not None and len(tags) != len(tokens):
        raise ValueError(f"{len(tags)} tags for {len(tokens)} tokens")
    labels = None if tags is None else tuple(_label(task, tag) for tag in tags)
    return Sentence(_id(row, number), tuple(tokens), labels)
