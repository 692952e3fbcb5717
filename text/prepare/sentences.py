"""Paragraphs -> clean sentences, by the punctuation of Chinese and of Latin script."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator

# Control and format characters, private ones and those that stand for what was lost.
_UNWANTED = re.compile(
    r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\xad\u200b-\u200f\u202a-\u202e"
    r"\u2060-\u206f\ud800-\uf8ff\ufdd0-\ufdef\ufeff\ufff0-\uffff]"
)
_DIRTY = re.compile(rf"[&<]|\s\s|[^\S ]|{_UNWANTED.pattern}")
_TAG = re.compile(r"</?[A-Za-z][^<>]{0,300}>")
_SPACE = re.compile(r"\s+")

_QUOTED = "|".join(
    (r"“[^“”]{0,300}”", r"‘[^‘’]{0,300}’", r"「[^「」]{0,300}」", r"『[^『』]{0,300}』", r'"[^"]{0,300}"')
)
_BRACKETED = "|".join((r"（[^（）]{0,300}）", r"\([^()]{0,300}\)", r"《[^《》]{0,100}》"))
_END = r"[!?]*[。！？][。！？!?]*|[!?]+(?![A-Za-z0-9=&/%#.])|…{2,}|(?<!\.)\.{3,}(?=\s|$)|(?<=\w)\.(?=\s+[^a-z\s]|\s*$)"
_MARK = re.compile(rf"(?P<quoted>{_QUOTED})|(?P<bracketed>{_BRACKETED})|(?P<end>{_END})")
_CLOSING = re.compile(r"[”’」』）)\]】》]*")
_ABBREVIATION = re.compile(r"\b(?:[A-Za-z]|Mrs?|Ms|Dr|Prof|St|No|vs|[JS]r|Inc|Ltd|Co|etc|Fig)$")
_GOES_ON = tuple("，、；：,;:—…的")


def clean(text: str) -> str:
    """Without entities, tags, control characters and runs of blanks."""
    if _DIRTY.search(text):
        text = html.unescape(text) if "&" in text else text
        text = _UNWANTED.sub("", _TAG.sub(" ", text))
        text = _SPACE.sub(" ", text)
    return text.strip()


def split(text: str) -> Iterator[str]:
    """The sentences of a paragraph.

    One ends with 。！？!? or an ellipsis, or with a Latin period before a blank, and what closes after it. A
    quotation of up to 300 characters, or what is in brackets, is never cut; where one ends with such a mark, the
    sentence ends with it unless the text goes on with a comma or the like.
    """
    begin = 0
    for mark in _MARK.finditer(text):
        end = mark.end()
        if end <= begin or mark["bracketed"]:
            continue
        if mark["quoted"]:
            if text[end - 2] not in "。！？!?…":
                continue
        elif mark["end"] == "." and _ABBREVIATION.search(text, max(begin, end - 6), end - 1):
            continue
        else:
            closing = _CLOSING.match(text, end)
            end = closing.end() if closing else end
        if text.startswith(_GOES_ON, end):
            continue
        if sentence := text[begin:end].strip():
            yield sentence
        begin = end
    if rest := text[begin:].strip():
        yield rest
