"""Paragraphs -> clean sentences, by the punctuation of Chinese and of Latin script."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from functools import lru_cache

# Control and format characters, private ones and those that stand for what was lost.
_UNWANTED = re.compile(
    r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\xad\u200b-\u200f\u202a-\u202e"
    r"\u2060-\u206f\ud800-\uf8ff\ufdd0-\ufdef\ufeff\ufff0-\uffff]"
)
_DIRTY = re.compile(rf"[&<]|\s\s|[^\S ]|{_UNWANTED.pattern}")
_TAG = re.compile(r"""</?[A-Za-z][^<>"']*(?:(?:"[^"<]*"|'[^'<]*')[^<>"']*)*>""")
_VALUE = r"""[A-Za-z_:][\w:.-]*\s*=\s*(?:"[^"]*"|'[^']*'|[^\s"'<>`]+)"""
_FLAG = (
    "(?:async|autoplay|checked|compact|controls|defer|disabled|hidden|loop|multiple|muted|noshade|novalidate|nowrap|open|"
    "readonly|required|reversed|selected)"
)
_PARTS = re.compile(rf"<(/?)([A-Za-z][\w:.-]*)((?:\s+(?:{_VALUE}|{_FLAG}))*)\s*(/?)>", re.ASCII)
_HTML = (
    "a abbr acronym address applet area article aside audio b base basefont bdi bdo big blink blockquote body br "
    "button canvas caption center cite code col colgroup data datalist dd del details dfn dialog dir div dl dt em "
    "embed fieldset figcaption figure font footer form frame frameset h1 h2 h3 h4 h5 h6 head header hgroup hr html i "
    "iframe img input ins kbd label legend li link main map mark marquee menu meta meter nav nobr noframes noscript "
    "object ol optgroup option output p param picture pre progress q rb rp rt rtc ruby s samp script search section "
    "select slot small source span strike strong style sub summary sup svg table tbody td template textarea tfoot th "
    "thead time title tr track tt u ul var video wbr"
)
_WIKI = "doc gallery includeonly math noinclude nowiki onlyinclude poem ref references syntaxhighlight timeline"
_ELEMENTS = frozenset(f"{_HTML} {_WIKI}".split(" "))
_HIDING = re.compile(r"<!--|<(script|style)(?:\s[^<>]*)?>", re.IGNORECASE)
_HIDING_ENDS = {
    None: re.compile("-->"),
    "script": re.compile(r"</script\s*>", re.IGNORECASE),
    "style": re.compile(r"</style\s*>", re.IGNORECASE),
}
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
    """Removes tags, entities, control characters and runs of blanks.

    A tag has the syntax of HTML: an element's name in lower or upper case, or a name of XML that is closed or has an
    attribute with a value. Comments, scripts and styles are removed with their content. Anything else between ``<`` and
    ``>`` (``p<q``, ``List<String>``), or escaped, is text.
    """
    if _DIRTY.search(text):
        if "<" in text:
            text = _TAG.sub(lambda tag: " " if _is_tag(tag[0]) else tag[0], _without_hidden(text))
        text = html.unescape(text) if "&" in text else text
        text = _UNWANTED.sub("", text)
        text = _SPACE.sub(" ", text)
    return text.strip()


def _without_hidden(text: str) -> str:
    """Removes comments, scripts and styles that have an end."""
    parts, begin = [], 0
    endless = set()
    for mark in _HIDING.finditer(text):
        kind = mark[1] and mark[1].lower()
        if mark.start() < begin or kind in endless:
            continue
        if end := _HIDING_ENDS[kind].search(text, mark.end()):
            parts.append(text[begin : mark.start()])
            begin = end.end()
        else:
            endless.add(kind)
    return " ".join([*parts, text[begin:]])


@lru_cache(4096)
def _is_tag(text: str) -> bool:
    parts = _PARTS.fullmatch(text)
    if parts is None:
        return False
    closing, name, attributes, closed = parts.groups()
    element = name.lower() in _ELEMENTS and (name.islower() or name.isupper())
    return bool(element or closing or closed or "=" in attributes)


def split(text: str) -> Iterator[str]:
    """Splits a paragraph into sentences.

    A sentence ends with 。！？!? or an ellipsis, or with a Latin period before a blank, and the brackets and quotes
    that close after it. A quotation of up to 300 characters, or text in brackets, is never cut; where a quotation
    ends with such a mark, the sentence ends with it unless the text goes on with a comma or the like.
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
