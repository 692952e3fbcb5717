"""Tasks of CLUE and beside it, and a user's own: what their files hold, which labels there
are, how text is built from a row, how answers are scored and submitted.

A task's data is a folder with a file for each split, JSON lines or tab-separated.
Lines end at "\\n" only: some strings hold U+2028.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from backends.interface import Head, InputError

Kind = Literal["classification", "reading", "labelling"]
Split = Literal["train", "dev", "test"]
HEAD_OF: dict[Kind, Head] = {
    "classification": "sequence_classification",
    "reading": "question_answering",
    "labelling": "token_classification",
}
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Example:
    """A text, or a pair of them, to be classified."""

    id: Any
    text: str
    pair: str | None
    label: int | None
    """Which of the task's labels; None in a test set."""


@dataclass(frozen=True)
class Question:
    """A question whose answer is a span of its context."""

    id: Any
    question: str
    context: str
    answers: tuple[str, ...]
    """Answers that count as right; none in a test set."""
    start: int | None
    """Where in the context the first of them begins."""


@dataclass(frozen=True)
class Sentence:
    """Characters, or words, that each have a tag."""

    id: Any
    tokens: tuple[str, ...]
    tags: tuple[int, ...] | None
    """Which of the task's labels each has; None in a test set."""


@dataclass(frozen=True)
class Task:
    """What a data set is and how it is used."""

    name: str
    kind: Kind
    labels: tuple[str, ...] | None = None
    """Classes or BIO tags; None: those of the training file."""
    text: Callable[[Row], tuple[str, str | None]] | None = None
    """Builds the text, or the two texts, of a row."""
    label_column: str = "label"
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Other spellings of labels."""
    columns: tuple[str, ...] = ()
    """Columns of a tab-separated file, in order; if its first line names them all, the order there holds."""
    files: Mapping[str, str] | None = None
    """Splits' files as published, where they are not <split>.json or the like; MSRA has no dev set."""
    submission: str | None = None
    """Name of the file that CLUE 1.1 takes for the test set."""
    metric: str = "accuracy"
    """What a model is chosen by: see `text.metrics`."""


def _column(row: Row, name: str) -> Any:
    if name not in row:
        raise ValueError(f"no column {name}; there are {', '.join(map(str, row))}")
    return row[name]


def _text(row: Row, name: str) -> str:
    value = _column(row, name)
    if not isinstance(value, str):
        raise ValueError(f"{name} is {value!r}, expected a string")
    if not value.strip():
        raise ValueError(f"{name} is empty")
    return value


def single(column: str) -> Callable[[Row], tuple[str, str | None]]:
    return lambda row: (_text(row, column), None)


def pair(first: str, second: str) -> Callable[[Row], tuple[str, str | None]]:
    return lambda row: (_text(row, first), _text(row, second))


def _keywords_and_abstract(row: Row) -> tuple[str, str | None]:
    """CSL: do these keywords belong to the abstract?"""
    keywords = _column(row, "keyword")
    if not (isinstance(keywords, list) and keywords and all(isinstance(word, str) for word in keywords)):
        raise ValueError(f"keyword is {keywords!r}, expected a list of strings")
    return " ".join(keywords), _text(row, "abst")


def _marked_spans(row: Row) -> tuple[str, str | None]:
    """CLUEWSC2020: _the noun_ and [the pronoun] in their text."""
    text, target = _text(row, "text"), _column(row, "target")
    spans = []
    for number, marks in ((1, "__"), (2, "[]")):
        span, start = _column(target, f"span{number}_text"), _column(target, f"span{number}_index")
        if text[start : start + len(span)] != span:
            raise ValueError(f"span{number}_text {span!r} is not at span{number}_index {start} of the text")
        spans.append((start, span, marks))
    for start, span, marks in sorted(spans, reverse=True):
        text = f"{text[:start]}{marks[0]}{span}{marks[1]}{text[start + len(span) :]}"
    return text, None


_NLI = ("entailment", "contradiction", "neutral")
_PAIR = pair("sentence1", "sentence2")
_ENTITIES = ("B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC", "O")
_TNEWS = tuple(str(number) for number in range(100, 117) if number not in (105, 111))
_TEXTS_AND_LABEL = ("text_a", "text_b", "label")

TASKS = {
    task.name: task
    for task in (
        Task("afqmc", "classification", ("0", "1"), _PAIR, submission="afqmc_predict.json"),
        Task("tnews", "classification", _TNEWS, single("sentence"), submission="tnews11_predict.json"),
        Task(
            "iflytek",
            "classification",
            tuple(map(str, range(119))),
            single("sentence"),
            submission="iflytek_predict.json",
        ),
        Task("cmnli", "classification", _NLI, _PAIR, submission="cmnli_predict.json"),
        Task(
            "ocnli",
            "classification",
            _NLI,
            _PAIR,
            files={"train": "train.50k.json"},
            submission="ocnli_50k_predict.json",
        ),
        Task("cluewsc2020", "classification", ("true", "false"), _marked_spans, submission="cluewsc11_predict.json"),
        Task("csl", "classification", ("0", "1"), _keywords_and_abstract, submission="csl_predict.json"),
        Task("bustm", "classification", ("0", "1"), _PAIR),
        Task("lcqmc", "classification", ("0", "1"), pair("text_a", "text_b"), columns=_TEXTS_AND_LABEL),
        Task("bq", "classification", ("0", "1"), pair("text_a", "text_b"), columns=_TEXTS_AND_LABEL),
        Task("chnsenticorp", "classification", ("0", "1"), single("text_a"), columns=("text_a", "label")),
        Task(
            "xnli",
            "classification",
            _NLI,
            pair("premise", "hypo"),
            aliases={"contradictory": "contradiction"},
            columns=("premise", "hypo", "label"),
        ),
        Task("cmrc2018", "reading", submission="cmrc2018_predict.json", metric="f1"),
        Task("drcd", "reading", submission="drcd_predict.json", metric="f1"),
        Task("msra_ner", "labelling", _ENTITIES, files={"dev": "test.tsv"}, metric="f1"),
        Task("peoples_daily_ner", "labelling", _ENTITIES, metric="f1"),
    )
}
OWN: dict[str, Kind] = {"classification": "classification", "reading": "reading", "labelling": "labelling"}
"""Names that stand for a user's own data of each kind."""
UNLABELLED = ("-", "")
"""What stands in the label column of a row that annotators did not agree on."""


def find_task(
    name: str,
    text_column: str = "text",
    text_pair_column: str | None = None,
    label_column: str = "label",
    option: str = "task_name",
) -> Task:
    """A task by its name; the columns are those of a user's own data.

    Args:
        option: what asked for it, for the error.

    Raises:
        InputError: no such task.
    """
    name = name.lower()
    if name in OWN:
        text = pair(text_column, text_pair_column) if text_pair_column else single(text_column)
        metric = "accuracy" if name == "classification" else "f1"
        return Task(name, OWN[name], None, text, label_column, metric=metric)
    if name not in TASKS:
        names = [*TASKS, *OWN]
        near = [task for task in names if task.startswith(name)] or difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {near[0]}? There are" if near else "there are"
        raise InputError(
            f"--{option} {name}: no such task; {hint} {', '.join(TASKS)}, and {', '.join(OWN)} for data of your own"
        )
    return TASKS[name]


def split_file(task: Task, data_dir: Path, split: Split) -> Path:
    """Where a split lies: in the folder itself or in its subfolder of the task's name.

    Raises:
        InputError: it is not there.
    """
    folder = data_dir / task.name if (data_dir / task.name).is_dir() else data_dir
    wanted = [f"{split}.{ending}" for ending in ("json", "jsonl", "tsv", "txt")]
    if task.files and split in task.files:
        wanted.append(task.files[split])
    for name in wanted:
        if (folder / name).is_file():
            return folder / name
    here = ", ".join(sorted(path.name for path in folder.iterdir() if path.is_file())) if folder.is_dir() else ""
    raise InputError(f"--data_dir {folder}: no {split} set there ({here or 'nothing'}); expected {' or '.join(wanted)}")


@dataclass(frozen=True)
class Data:
    """A split that was read."""

    path: Path
    examples: Sequence[Any]
    """`Example`, `Question` or `Sentence`, as the task's kind is."""
    unlabelled: int
    """Rows left out because they have no label."""
    bad: Sequence[str]
    """What was wrong with lines left out on request."""


def read_split(task: Task, data_dir: Path, split: Split, skip_bad_lines: bool = False) -> Data:
    """A split's examples; the test set's may lack labels.

    Args:
        skip_bad_lines: leave out what cannot be read, instead of refusing the file.

    Raises:
        InputError: no such split, lines that cannot be read, or none that can.
    """
    path = split_file(task, data_dir, split)
    read = {"classification": _read_example, "reading": _read_question, "labelling": _read_sentence}[task.kind]
    examples: list[Any] = []
    bad: list[str] = []
    unlabelled = total = 0
    for total, (place, row) in enumerate(_rows(task, path), 1):  # noqa: B007
        try:
            if isinstance(row, ValueError):
                raise row
            example = read(task, row, split == "test", total - 1)
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            bad.append(f"{path}{place}: {error}")
            continue
        if example is None:
            unlabelled += 1
        else:
            examples.append(example)
    if bad and not skip_bad_lines:
        raise InputError(
            f"{bad[0]} ({len(bad)} of {total} cannot be read; --skip_bad_lines true leaves such lines out)"
        )
    if not examples:
        raise InputError(f"{path}: no example in it; expected {_EXPECTED[task.kind]}")
    return Data(path, examples, unlabelled, bad)


_EXPECTED = {
    "classification": "a JSON object or tab-separated columns on each line",
    "reading": "SQuAD's or CMRC 2018's layout, or JSON lines with context, question and answers",
    "labelling": "a token and its tag a line, blank lines between sentences, or JSON lines with text and tags",
}


def with_labels_of(task: Task, data_dir: Path) -> Task:
    """The task with its labels, read from the training file where it declares none.

    Raises:
        InputError: no training file, or fewer than two labels in it.
    """
    if task.labels is not None or task.kind == "reading":
        return task
    path = split_file(task, data_dir, "train")
    column = "tags" if task.kind == "labelling" else task.label_column
    found: set[str] = set()
    wrong, columns = "", ""
    for place, row in _rows(task, path):
        if isinstance(row, ValueError):
            wrong = wrong or f"{path}{place}: {row}"
            continue
        columns = columns or ", ".join(map(str, row))
        values = (row.get(column) or ()) if task.kind == "labelling" else (row.get(column),)
        found.update(map(label_name, values))
    found.difference_update(UNLABELLED)
    if len(found) < 2:
        raise InputError(
            wrong
            or f"{path}: column {column} has {len(found)} different labels; expected at least 2 "
            f"(columns are {columns or 'none'})"
        )
    numbers = all(label.lstrip("-").isdecimal() for label in found)
    return replace(task, labels=tuple(sorted(found, key=lambda label: (int(label), label) if numbers else (0, label))))


def label_name(value: Any) -> str:
    """Labels come as strings, numbers and truth values."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return str(int(value) if isinstance(value, float) and value.is_integer() else value).strip()


def _label(task: Task, value: Any) -> int:
    assert task.labels is not None
    name = label_name(value)
    try:
        return task.labels.index(task.aliases.get(name, name))
    except ValueError:
        some = ", ".join(task.labels[:6]) + (", ..." if len(task.labels) > 6 else "")
        raise ValueError(f"label {name!r} is none of the {len(task.labels)} of {task.name}: {some}") from None


def _read_example(task: Task, row: Row, test: bool, number: int) -> Example | None:
    assert task.text is not None
    value = row.get(task.label_column) if test else _column(row, task.label_column)
    label = None
    if label_name(value) not in UNLABELLED:
        try:
            label = _label(task, value)
        except ValueError:
            if not test:  # where anything may stand in for the labels that are kept back
                raise
    elif not test:
        return None
    text, second = task.text(row)
    return Example(row.get("id", row.get("idx", number)), text, second, label)


def _read_question(task: Task, row: Row, test: bool, number: int) -> Question:
    context, question = _text(row, "context"), _column(row, "question")
    if not isinstance(question, str):  # it may be empty: CMRC 2018 has such, and its evaluation counts them
        raise ValueError(f"question is {question!r}, expected a string")
    given = row.get("answers") or ()
    if isinstance(given, Mapping):  # as in the hub's data sets: a list of texts and one of starts
        starts = given.get("answer_start", [None] * len(_column(given, "text")))
        given = [{"text": text, "answer_start": start} for text, start in zip(given["text"], starts)]
    answers: list[str] = []
    first = None
    for answer in given:
        told = None
        if isinstance(answer, Mapping):
            answer, told = _column(answer, "text"), answer.get("answer_start")
        answer = str(answer)
        if not answer.strip() or answer not in context:
            if test:
                continue
            raise ValueError(f"answer {answer!r} is not in its context")
        if first is None:
            right = isinstance(told, int) and told >= 0 and context[told : told + len(answer)] == answer
            first = told if right else context.index(answer)
        answers.append(answer)
    if not answers and not test:
        raise ValueError("no answers")
    return Question(row.get("id", number), question, context, tuple(answers), first)


def _read_sentence(task: Task, row: Row, test: bool, number: int) -> Sentence:
    tokens = tuple(row.get("tokens") or _column(row, "text"))
    given = row.get("tags")
    if not tokens or not all(isinstance(token, str) for token in tokens):
        raise ValueError("no tokens")
    if given is None and not test:
        raise ValueError("no tags")
    if given is not None and len(given) != len(tokens):
        raise ValueError(f"{len(given)} tags for {len(tokens)} tokens")
    tags = None if given is None else tuple(_label(task, tag) for tag in given)
    return Sentence(row.get("id", number), tokens, tags)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Non-blank and blank lines with their numbers, from 1."""
    try:
        content = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 at byte {error.start}; convert the file") from error
    for number, line in enumerate(content.split("\n"), 1):
        yield number, line.rstrip("\r")


def _rows(task: Task, path: Path) -> Iterator[tuple[str, Any]]:
    """Where a row stands, as what follows the file's name, and the row, or the ValueError that says why it is none."""
    if task.kind == "reading":
        yield from _question_rows(path)
    elif path.suffix in (".json", ".jsonl"):
        yield from _json_rows(path)
    elif task.kind == "labelling":
        yield from _tagged_rows(path)
    else:
        yield from _table_rows(task, path)


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            yield f":{number}", ValueError(f"not JSON ({error})")
            continue
        yield f":{number}", row if isinstance(row, dict) else ValueError("expected a JSON object")


def _table_rows(task: Task, path: Path) -> Iterator[tuple[str, Any]]:
    columns: Sequence[str] = task.columns
    first = True
    for number, line in _lines(path):
        if not line.strip():
            continue
        cells = line.split("\t")
        if first:
            first = False
            if not columns or set(columns) <= set(cells):
                columns = cells
                continue
            # Some publishers call the columns otherwise
            known = (*(task.labels or ()), *task.aliases)
            if len(cells) == len(columns) and cells[columns.index(task.label_column)] not in known:
                continue
        # A test set may come without its labels.
        if len(cells) not in (len(columns), len(columns) - (task.label_column == columns[-1])):
            yield f":{number}", ValueError(f"{len(cells)} columns, expected {len(columns)}: {', '.join(columns)}")
            continue
        yield f":{number}", dict(zip(columns, cells))


def _tagged_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """A token and its tag a line, sentences apart by blank lines; or paddlenlp's
    layout, a sentence a line with U+0002 between tokens and between tags."""
    tokens: list[str] = []
    tags: list[str] = []
    start, by_sentence = 1, False
    for number, line in _lines(path):
        cells = line.split("\t") if "\t" in line else line.split()
        if number == 1:
            by_sentence = "\x02" in line or cells == ["text_a", "label"]
            if cells == ["text_a", "label"]:
                continue
        if by_sentence:
            if line.strip():
                text, _, tag = line.partition("\t")
                yield f":{number}", {"tokens": text.split("\x02"), **({"tags": tag.split("\x02")} if tag else {})}
        elif not line.strip():
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


def _question_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """SQuAD's layout, CMRC 2018's first one, or JSON lines."""
    lines = [(number, line) for number, line in _lines(path) if line.strip()]
    if len(lines) > 1 and _is_json(lines[0][1]):
        yield from _json_rows(path)
        return
    try:
        whole = json.loads("\n".join(line for _, line in _lines(path)))
    except ValueError as error:
        yield f":{getattr(error, 'lineno', 1)}", ValueError(f"not JSON ({error})")
        return
    if isinstance(whole, dict) and "question" in whole:
        yield ":1", whole
        return
    articles: Any = whole.get("data") if isinstance(whole, dict) else whole
    number = 0
    try:
        for article in articles:
            for paragraph in article.get("paragraphs", [article]):
                context = paragraph.get("context", paragraph.get("context_text"))
                for asked in paragraph.get("qas", ()):
                    number += 1
                    row = {
                        "context": context,
                        "question": asked.get("question", asked.get("query_text")),
                        "answers": asked.get("answers"),
                    }
                    name = asked.get("id", asked.get("query_id"))
                    yield f", question {number}", row if name is None else {"id": name, **row}
    except (AttributeError, TypeError):
        yield f", after question {number}", ValueError(f"expected {_EXPECTED['reading']}")


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True
