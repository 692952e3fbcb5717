"""Words of a text that others may stand in for, and variants of the text, as TinyBERT augments data.

Follows Jiao et al., 2019 (arXiv:1909.10351), Algorithm 1, and the code published with it, for Chinese too.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from text.masking import words_in

_HAS_CHINESE = re.compile(r"[\u3400-\u9fff]")
_ENGLISH = (  # with what stands at both sides of the apostrophe in "don't" and the like
    "a about above after again against ain all am an and any are aren as at be because been before being below between "
    "both but by can cannot could couldn d did didn do does doesn doing don down during each few for from further had "
    "hadn has hasn have haven having he her here hers herself him himself his how i if in into is isn it its itself "
    "just ll m may me might mightn more most must mustn my myself n need needn neither never no nor not now o of "
    "off on once only or other our ours ourselves out over own re s same shall shan she should shouldn so some such t "
    "than that the their theirs them themselves then there these they this those through to too under until up ve "
    "very was wasn we were weren what when where which while who whom whose why will with without wo won would "
    "wouldn y you your yours yourself yourselves"
)
_CHINESE = (
    "的 地 得 了 着 过 吗 呢 吧 啊 呀 嘛 么 哦 之 所 而 且 或 和 与 及 以及 跟 同 并 并且 而且 但 但是 可是 不过 然而 "
    "因 因为 由于 所以 因此 如果 若 虽 虽然 即使 则 就 才 也 又 再 还 还是 都 只 只是 很 太 更 最 在 于 从 自 向 往 到 "
    "对 对于 关于 把 被 将 让 使 给 为 为了 以 按 按照 由 比 除 除了 是 不是 有 没有 没 不 无 非 未 别 勿 莫 否 不要 "
    "会 能 可 可以 能够 应 应该 要 必须 我 你 您 他 她 它 我们 你们 他们 她们 它们 自己 咱们 这 那 哪 这个 那个 这些 "
    "那些 这样 那样 这里 那里 什么 谁 怎么 怎样 如何 为什么 多少 几 个 些 们 等 第"
)
FUNCTION_WORDS = frozenset([*_ENGLISH.split(), *_CHINESE.split()])
"""Words that say how others belong together, or turn a meaning round: a label would not survive their exchange."""


class Replaceable(NamedTuple):
    """A word of a text, and what may stand in for it."""

    start: int
    end: int
    """Where it is in the text, in characters."""
    candidates: Sequence[str]


def is_content_word(word: str) -> bool:
    """Tells whether a word may be replaced, and stand in for another: one of letters alone, and no function word."""
    return word.isalpha() and word.lower() not in FUNCTION_WORDS


def replaceable_words(text: str) -> list[tuple[int, int]]:
    """Finds where the content words of a text are, in characters.

    Words are jieba's where the text has a Chinese character; elsewhere blanks and punctuation part them.
    """
    spans, end = [], 0
    for word in words_in(text) if _HAS_CHINESE.search(text) else re.findall(r"\w+|\W+", text):
        start, end = end, end + len(word)
        if is_content_word(word):
            spans.append((start, end))
    return spans


def variants(
    text: str, words: Sequence[Replaceable], copies: int, probability: float, random: np.random.Generator
) -> list[str]:
    """Makes variants of a text: in each of `copies` attempts every word is, with `probability`, replaced by one of its
    candidates, each as likely as another. What came out before, and the text itself, do not count.

    Args:
        words: in the text's order, each with at least one candidate.
    """
    counts = [len(word.candidates) for word in words]
    replaced = random.random((copies, len(words))) < probability
    drawn = random.integers(0, counts, (copies, len(words)))
    made: dict[str, None] = {}
    for attempt in range(copies):
        parts, end = [], 0
        for number in np.flatnonzero(replaced[attempt]).tolist():
            word = words[number]
            old, new = text[word.start : word.end], word.candidates[drawn[attempt, number]]
            parts += [text[end : word.start], new[:1].upper() + new[1:] if old[0].isupper() else new]
            end = word.end
        made["".join([*parts, text[end:]])] = None
    made.pop(text, None)
    return [*made]
