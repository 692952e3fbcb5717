"""Tasks of CLUE and beside it, and a user's own: what their files hold, which labels there
are, how text is built from a row, how answers are scored and submitted.

`text.data` reads a task's examples from its files.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from backends.files import InputError
from backends.interface import Head
from text.rows import Row, nearest, shown, text_of, value_of, whole_number

Kind = Literal["classification", "reading", "labelling"]
HEAD_OF: dict[Kind, Head] = {
    "classification": "sequence_classification",
    "reading": "question_answering",
    "labelling": "token_classification",
}
KINDS: dict[str, Kind] = {kind: kind for kind in HEAD_OF}
"""Kinds by their names, each of which also stands for a user's own data of that kind."""


@dataclass(frozen=True)
class Task:
    """A data set and its use: columns, labels, files and metric."""

    name: str
    kind: Kind
    labels: tuple[str, ...] | None = None
    """Names of classes, or BIO tags; None: those of the training file (`text.data.with_labels_of`)."""
    text: Callable[[Row], tuple[str, str | None]] | None = None
    """Builds the text, or the two texts, of a row."""
    label_column: str = "label"
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Spellings in the files and the submission -> labels' names, where they differ."""
    columns: tuple[str, ...] = ()
    """Columns of a table, in order; if its first line names them all, the order there holds."""
    files: Mapping[str, str] | None = None
    """Splits' files as published, where they are not <split>.json or the like; MSRA has no dev set."""
    submission: str | None = None
    """Name of the file that CLUE 1.1 takes for the test set."""
    metric: str = "accuracy"
    """The score that a model is chosen by: see `text.metrics`."""

    def spelling(self, label: str) -> str:
        """Returns a label as the task's files spell it."""
        return next((spelling for spelling, name in self.aliases.items() if name == label), label)

    def with_labels(self, labels: Sequence[str]) -> Task | None:
        """Returns the task with a model's labels, in its order and as it calls them (some models use the files'
        spelling); None if they are not the task's."""
        names = [self.aliases.get(label, label) for label in labels]
        if self.labels is not None and sorted(names) != sorted(self.labels):
            return None
        return replace(self, labels=tuple(labels), aliases=self.aliases if names == list(labels) else {})


@dataclass(frozen=True)
class Columns:
    """A `Task.text` of one column, or of two."""

    names: tuple[str, ...]

    def __call__(self, row: Row) -> tuple[str, str | None]:
        text, *second = (text_of(row, name) for name in self.names)
        return text, second[0] if second else None


def single(column: str) -> Columns:
    return Columns((column,))


def pair(first: str, second: str) -> Columns:
    return Columns((first, second))


def _keywords_and_abstract(row: Row) -> tuple[str, str | None]:
    """Builds CSL's texts: the keywords, and the abstract that they belong to or not."""
    keywords = value_of(row, "keyword")
    if not (isinstance(keywords, list) and keywords and all(isinstance(word, str) for word in keywords)):
        raise ValueError(f"keyword is {shown(keywords)}, expected a list of strings")
    return " ".join(keywords), text_of(row, "abst")


def _marked_spans(row: Row) -> tuple[str, str | None]:
    """Builds CLUEWSC2020's text, with marks around _the noun_ and [the pronoun].

    Of spans that overlap, each mark stands where its span begins or ends, so that without marks it is the text.
    """
    text, target = text_of(row, "text"), value_of(row, "target")
    if not isinstance(target, Mapping):
        raise ValueError(f"target is {shown(target)}, expected an object")
    marks = []
    for number, (opening, closing) in ((1, "__"), (2, "[]")):
        span, column = text_of(target, f"span{number}_text"), f"span{number}_index"
        index = whole_number(value_of(target, column), column)
        start = nearest(text, span, index) if 0 <= index < len(text) else None
        if start is None:
            raise ValueError(f"span{number}_text {shown(span)} is not at {column} {index} of the text")
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


def find_task(
    name: str,
    text_column: str = "text",
    text_pair_column: str | None = None,
    label_column: str = "label",
    option: str = "task_name",
) -> Task:
    """Finds a task by its name; the columns are those of a user's own data.

    Args:
        option: the option to name in an error.

    Raises:
        InputError: no such task.
    """
    name = name.lower()
    if name in KINDS:
        text = pair(text_column, text_pair_column) if text_pair_column else single(text_column)
        metric = "accuracy" if name == "classification" else "f1"
        return Task(name, KINDS[name], None, text, label_column, metric=metric)
    if name not in TASKS:
        names = [*TASKS, *KINDS]
        near = [task for task in names if task.startswith(name)] or difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {near[0]}? There are" if near else "there are"
        raise InputError(
            f"--{option} {name}: no such task; {hint} {', '.join(TASKS)}, and {', '.join(KINDS)} for data of your own"
        )
    return TASKS[name]
