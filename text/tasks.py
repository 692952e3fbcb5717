"""Tasks of CLUE and beside it, and a user's own: what their files hold, which labels there
are, how text is built from a row, how answers are scored and submitted.

A task's data is a folder with a file for each split, in a layout of `text.readers`.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from backends.files import InputError
from backends.interface import Head
from text.readers import BLANKS, QUESTIONS, csv_rows, json_rows, question_rows, tagged_rows, tsv_rows

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
    """All that count as right, one that stands in the context first; none in a test set."""
    start: int | None
    """Where in the context the first of them begins; None if none of them stands there."""


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
    """Names of classes, or BIO tags; None: those of the training file."""
    text: Callable[[Row], tuple[str, str | None]] | None = None
    """Builds the text, or the two texts, of a row."""
    label_column: str = "label"
    aliases: Mapping[str, str] = field(default_factory=dict)
    """How the files and the submission spell labels that have other names."""
    columns: tuple[str, ...] = ()
    """Columns of a table, in order; if its first line names them all, the order there holds."""
    files: Mapping[str, str] | None = None
    """Splits' files as published, where they are not <split>.json or the like; MSRA has no dev set."""
    submission: str | None = None
    """Name of the file that CLUE 1.1 takes for the test set."""
    metric: str = "accuracy"
    """What a model is chosen by: see `text.metrics`."""

    def spelling(self, label: str) -> str:
        """A label as the task's files spell it."""
        return next((spelling for spelling, name in self.aliases.items() if name == label), label)

    def with_labels(self, known: Sequence[str]) -> Task | None:
        """The task with its labels in a model's order, as the model calls them (some go by the files' spelling);
        None if it knows others."""
        names = [self.aliases.get(label, label) for label in known]
        if self.labels is not None and sorted(names) != sorted(self.labels):
            return None
        return replace(self, labels=tuple(known), aliases=self.aliases if names == list(known) else {})


def _shown(value: Any) -> str:
    """A value of a file, for a message."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _column(row: Row, name: str) -> Any:
    if name not in row:
        raise ValueError(f"no column {name}; there are {', '.join(map(str, row))}")
    return row[name]


def _text(row: Row, name: str) -> str:
    value = _column(row, name)
    if not isinstance(value, str):
        raise ValueError(f"{name} is {_shown(value)}, expected a string")
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
        raise ValueError(f"keyword is {_shown(keywords)}, expected a list of strings")
    return " ".join(keywords), _text(row, "abst")


def _whole_number(value: Any, name: str) -> int:
    if isinstance(value, bool) or not (isinstance(value, int) or isinstance(value, float) and value.is_integer()):
        raise ValueError(f"{name} is {_shown(value)}, expected a number of characters")
    return int(value)


def _nearest(text: str, part: str, start: int) -> int | None:
    """Where a part of a text begins, nearest to where it is said to; None if it is not in the text."""
    before, after = text.rfind(part, 0, max(0, start) + len(part)), text.find(part, max(0, start))
    places = [place for place in (before, after) if place >= 0]
    return min(places, key=lambda place: abs(place - start), default=None)


def _marked_spans(row: Row) -> tuple[str, str | None]:
    """CLUEWSC2020: _the noun_ and [the pronoun] in their text; of spans that overlap, each mark stands where its span
    begins or ends, so that the text without marks is the text."""
    text, target = _text(row, "text"), _column(row, "target")
    if not isinstance(target, Mapping):
        raise ValueError(f"target is {_shown(target)}, expected an object")
    marks = []
    for number, (opening, closing) in ((1, "__"), (2, "[]")):
        span, column = _text(target, f"span{number}_text"), f"span{number}_index"
        index = _whole_number(_column(target, column), column)
        start = _nearest(text, span, index) if 0 <= index < len(text) else None
        if start is None:
            raise ValueError(f"span{number}_text {_shown(span)} is not at {column} {index} of the text")
        end = start + len(span)
        # At one place what ends comes first, what began last before it; then what begins, what ends last first.
        marks += [(start, 1, -end, opening), (end, 0, -start, closing)]
    for place, *_, mark in sorted(marks, reverse=True):
        text = text[:place] + mark + text[place:]
    return text, None


_NLI = ("entailment", "contradiction", "neutral")
_PAIR = pair("sentence1", "sentence2")
_ENTITIES = ("B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC", "O")
_TNEWS = (
    "story culture entertainment sports finance - house car edu tech military - travel world stock agriculture game"
)
_IFLYTEK = (
    "打车 地图导航 免费WIFI 租车 同城服务 快递物流 婚庆 家政 公共交通 政务 社区服务 薅羊毛 魔幻 仙侠 卡牌 飞行空战 "
    "射击游戏 休闲益智 动作类 体育竞技 棋牌中心 经营养成 策略 MOBA 辅助工具 约会社交 即时通讯 工作社交 论坛圈子 "
    "婚恋社交 情侣社交 社交工具 生活社交 微博博客 新闻 漫画 小说 技术 教辅 问答交流 搞笑 杂志 百科 影视娱乐 求职 "
    "兼职 视频 短视频 音乐 直播 电台 K歌 成人 中小学 职考 公务员 英语 视频教育 高等教育 成人教育 艺术 语言(非英语) "
    "旅游资讯 综合预定 民航 铁路 酒店 行程管理 民宿短租 出国 工具 亲子儿童 母婴 驾校 违章 汽车咨询 汽车交易 "
    "日常养车 行车辅助 租房 买房 装修家居 电子产品 问诊挂号 养生保健 医疗服务 减肥瘦身 美妆美业 菜谱 餐饮店 "
    "体育咨讯 运动健身 支付 保险 股票 借贷 理财 彩票 记账 银行 美颜 影像剪辑 摄影修图 相机 绘画 二手 电商 团购 外卖 "
    "电影票务 社区超市 购物咨询 笔记 办公 日程管理 女性 经营 收款 其他"
)
_TNEWS_CODES = {str(code): f"news_{name}" for code, name in enumerate(_TNEWS.split(" "), 100) if name != "-"}
_IFLYTEK_CODES = {str(code): name for code, name in enumerate(_IFLYTEK.split(" "))}
_TEXTS_AND_LABEL = ("text_a", "text_b", "label")

TASKS = {
    task.name: task
    for task in (
        Task("afqmc", "classification", ("0", "1"), _PAIR, submission="afqmc_predict.json"),
        Task(
            "tnews",
            "classification",
            tuple(_TNEWS_CODES.values()),
            single("sentence"),
            aliases=_TNEWS_CODES,
            submission="tnews11_predict.json",
        ),
        Task(
            "iflytek",
            "classification",
            tuple(_IFLYTEK_CODES.values()),
            single("sentence"),
            aliases=_IFLYTEK_CODES,
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
    endings = ("json", "jsonl", "tsv", "txt", *(["csv"] if task.kind == "classification" else []))
    wanted = [f"{split}.{ending}" for ending in endings]
    if task.files and split in task.files:
        wanted.append(task.files[split])
    for name in wanted:
        if (folder / name).is_file():
            return folder / name
    here = sorted(path.name for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
    there = ("there are " + ", ".join(here)) if here else "no file there" if folder.is_dir() else "no such folder"
    fetch = f"; python -m finetuning.download --tasks {task.name} --data_dir {data_dir} fetches it"
    raise InputError(
        f"--data_dir {data_dir}: no {split} set of {task.name} in {folder} ({there}); expected {' or '.join(wanted)}"
        + (fetch if task.name in TASKS and not here else "")
    )


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
    absent: Sequence[str]
    """Questions none of whose answers is in the context: of a dev or test set they count, as all do."""


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
    absent: list[str] = []
    unlabelled = total = 0
    for total, (place, row) in enumerate(_rows(task, path), 1):  # noqa: B007
        try:
            if isinstance(row, ValueError):
                raise row
            example = read(task, row, split, total - 1)
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            bad.append(f"{path}{place}: {error}")
            continue
        if example is None:
            unlabelled += 1
        else:
            examples.append(example)
            if isinstance(example, Question) and example.answers and example.start is None:
                absent.append(f"{path}{place}")
    if bad and not skip_bad_lines:
        raise InputError(
            f"{bad[0]} ({len(bad)} of {total} cannot be read; --skip_bad_lines true leaves such lines out)"
        )
    if not examples:
        raise InputError(f"{path}: no example in it; expected {_EXPECTED[task.kind]}")
    return Data(path, examples, unlabelled, bad, absent)


_EXPECTED = {
    "classification": "a JSON object on each line, or a table",
    "reading": QUESTIONS,
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
    labels: set[str] = set()
    wrong = ""
    columns: dict[Any, None] = {}
    for place, row in _rows(task, path):
        try:
            if isinstance(row, ValueError):
                raise row
            columns |= dict.fromkeys(row)
            values = (_tags(row) or ()) if task.kind == "labelling" else [row[column]] if column in row else ()
            labels.update(map(label_name, values))
        except ValueError as error:
            wrong = wrong or f"{path}{place}: {error}"
    labels.difference_update(UNLABELLED)
    if len(labels) < 2:
        there = f"columns are {', '.join(map(str, columns)) or 'none'}"
        if column not in columns:
            raise InputError(wrong or f"{path}: no column {column}; {there}")
        raise InputError(wrong or f"{path}: column {column} has {len(labels)} labels; expected at least 2 ({there})")
    numbers = all(re.fullmatch(r"-?\d{1,18}", label) for label in labels)
    return replace(task, labels=tuple(sorted(labels, key=lambda label: (int(label), label) if numbers else (0, label))))


def label_name(value: Any) -> str:
    """Labels come as strings, numbers and truth values; raises ValueError for anything else."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, (str, int, float)) or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError(f"label is {_shown(value)}, expected a string or a number")
    return str(value).strip(BLANKS)


def _label(task: Task, value: Any) -> int:
    assert task.labels is not None
    name = label_name(value)
    try:
        return task.labels.index(task.aliases.get(name, name))
    except ValueError:
        some = ", ".join(map(task.spelling, task.labels[:6])) + (", ..." if len(task.labels) > 6 else "")
        raise ValueError(f"label {name!r} is none of the {len(task.labels)} of {task.name}: {some}") from None


def _id(row: Row, number: int) -> Any:
    """What a row is called, or else its number."""
    value = row.get("id", row.get("idx"))
    if isinstance(value, (list, dict)) or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError(f"id is {_shown(value)}, expected a string or a number")
    return number if value is None else value


def _read_example(task: Task, row: Row, split: Split, number: int) -> Example | None:
    assert task.text is not None
    label = None
    try:
        value = _column(row, task.label_column)
        if label_name(value) not in UNLABELLED:
            label = _label(task, value)
    except ValueError:
        if split != "test":  # where anything may stand in for the labels that are kept back
            raise
    if label is None and split != "test":
        return None
    text, second = task.text(row)
    return Example(_id(row, number), text, second, label)


def _answers(given: Any) -> list[tuple[str, int | None]]:
    """Answers and where each is said to begin, if anywhere: strings, objects, or the hub's lists of both."""
    if given is None:
        return []
    if isinstance(given, Mapping):
        texts, starts = _column(given, "text"), given.get("answer_start")
        if isinstance(texts, str):
            given = [given]
        else:
            if not isinstance(texts, list) or not isinstance(starts, list | None):
                raise ValueError(f"answers is {_shown(given)}, expected a list of text, and of answer_start")
            starts = [None] * len(texts) if starts is None else starts
            if len(starts) != len(texts):
                raise ValueError(f"{len(texts)} answers, but {len(starts)} of answer_start")
            given = [{"text": text, "answer_start": start} for text, start in zip(texts, starts)]
    if not isinstance(given, list):
        raise ValueError(f"answers is {_shown(given)}, expected a list")
    answers: list[tuple[str, int | None]] = []
    for answer in given:
        start = None
        if isinstance(answer, Mapping):
            answer, start = _column(answer, "text"), answer.get("answer_start")
        if not isinstance(answer, str):
            raise ValueError(f"answer is {_shown(answer)}, expected a string")
        answers.append((answer, None if start is None else _whole_number(start, "answer_start")))
    return answers


def _read_question(task: Task, row: Row, split: Split, number: int) -> Question:
    context, question = _text(row, "context"), _column(row, "question")
    if not isinstance(question, str):  # it may be empty: CMRC 2018 has such, and its evaluation counts them
        raise ValueError(f"question is {_shown(question)}, expected a string")
    answers = _answers(row.get("answers"))
    if not any(text.strip() for text, _ in answers):
        if split != "test":
            raise ValueError("no answers; a question that has none (SQuAD 2.0's is_impossible) is not learnt")
        answers = []
    texts = [text for text, _ in answers]
    starts = [_nearest(context, text, offset or 0) if text.strip() else None for text, offset in answers]
    first = next((number for number, start in enumerate(starts) if start is not None), None)
    if first is not None:
        texts.insert(0, texts.pop(first))
    elif split == "train":
        raise ValueError(f"none of the answers is in the context: {', '.join(map(_shown, texts[:3]))}")
    elif split == "test":  # what stands in for the answers that are kept back
        texts = []
    start = None if first is None else starts[first]
    return Question(_id(row, number), question, context, tuple(texts), start)


def _tags(row: Row) -> list[Any] | None:
    tags = row.get("tags")
    if tags is not None and not isinstance(tags, list):
        raise ValueError(f"tags is {_shown(tags)}, expected a list")
    return tags


def _read_sentence(task: Task, row: Row, split: Split, number: int) -> Sentence:
    tokens = row.get("tokens") or _column(row, "text")
    if not tokens or not isinstance(tokens, (str, list)) or not all(isinstance(token, str) for token in tokens):
        raise ValueError("no tokens")
    given = _tags(row)
    if given is None and split != "test":
        raise ValueError("no tags")
    if given is not None and len(given) != len(tokens):
        raise ValueError(f"{len(given)} tags for {len(tokens)} tokens")
    tags = None if given is None else tuple(_label(task, tag) for tag in given)
    return Sentence(_id(row, number), tuple(tokens), tags)


def _rows(task: Task, path: Path) -> Iterator[tuple[str, Any]]:
    """Where a row stands, as what follows the file's name, and the row, or the ValueError that says why it is none."""
    if task.kind == "reading":
        return question_rows(path)
    if path.suffix in (".json", ".jsonl"):
        return json_rows(path)
    if task.kind == "labelling":
        return tagged_rows(path)
    return _table_rows(task, path)


def _table_rows(task: Task, path: Path) -> Iterator[tuple[str, Any]]:
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
            # Some publishers call the columns otherwise
            known = (*(task.labels or ()), *task.aliases)
            if len(cells) == len(columns) and cells[columns.index(task.label_column)] not in known:
                continue
        # A test set may come without its labels.
        if len(cells) not in (len(columns), len(columns) - (task.label_column == columns[-1])):
            yield place, ValueError(f"{len(cells)} columns, expected {len(columns)}: {', '.join(columns)}")
            continue
        yield place, dict(zip(columns, cells))
