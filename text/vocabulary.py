"""Vocabulary and settings of BERT's tokenizer, read from model folders.

transformers 4 and paddlenlp save ``vocab.txt``, transformers 5 ``tokenizer.json`` alone. Settings are in
``tokenizer_config.json``, tokens that were added to the vocabulary in any of four files. Whatever there changes
the ids of a text is honoured, or refused by its name.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from backends.files import LONGEST, InputError, check_regular, read_json

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
ROLES = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
"""transformers' names of the special tokens."""
VOCABULARY, SERIALIZED, CONFIG = "vocab.txt", "tokenizer.json", "tokenizer_config.json"
SPECIAL_MAP, APPENDED = "special_tokens_map.json", "added_tokens.json"
MAX_WORD = 100
"""Characters of the longest word that is not unknown."""

_BERTS = ("BertTokenizer", "ErnieTokenizer", "PPMiniLMTokenizer", "RobertaChineseTokenizer")
"""Classes of transformers and paddlenlp that are BERT's; their settings are those of `CONFIG`."""
_ANY = ("PreTrainedTokenizer", "TokenizersBackend")
"""transformers' classes for what `SERIALIZED` says; their settings are there."""
_NORMALIZER = {
    "do_lower_case": "lowercase",
    "strip_accents": "strip_accents",
    "tokenize_chinese_chars": "handle_chinese_chars",
}
"""Settings' names in `CONFIG` -> in `SERIALIZED`."""
_UNDERSTOOD: dict[str, Sequence[Any]] = {
    "auto_map": (None,),
    "clean_text": (True,),
    "do_basic_tokenize": (True,),
    "never_split": (None, []),
    "padding_side": ("right",),
    "split_special_tokens": (False,),
    "truncation_side": ("right",),
    "wordpieces_prefix": ("##",),
}
"""Other keys of `CONFIG` that change ids, and the values that are honoured."""


class Added(NamedTuple):
    """A token that is looked for in a text before words are; the fields are those of ``tokenizers.AddedToken``."""

    content: str
    special: bool = True
    normalized: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False


@dataclass(frozen=True)
class Settings:
    """Settings that ids depend on, under transformers' names."""

    do_lower_case: bool = True
    strip_accents: bool | None = None
    """None: as `do_lower_case`."""
    tokenize_chinese_chars: bool = True
    pad_token: str = "[PAD]"
    unk_token: str = "[UNK]"
    cls_token: str = "[CLS]"
    sep_token: str = "[SEP]"
    mask_token: str = "[MASK]"
    added: tuple[Added, ...] = ()
    """Added tokens in the order of their ids; the five above that are not here are added too, as special tokens."""
    appended: int = 0
    """Number of tokens at the vocabulary's end that were added to it: words are not made of them."""

    @property
    def special(self) -> tuple[str, ...]:
        """The five tokens, in the order of `ROLES`."""
        return tuple(getattr(self, role) for role in ROLES)

    @property
    def whole(self) -> tuple[Added, ...]:
        """All tokens that are looked for in a text."""
        named = {token.content for token in self.added}
        return (*(Added(token) for token in self.special if token not in named), *self.added)

    @property
    def without_accents(self) -> bool:
        return self.do_lower_case if self.strip_accents is None else self.strip_accents

    def changed(self) -> dict[str, Any]:
        """Returns the settings that are not BERT's, as JSON takes them."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        different = {field.name: values[field.name] for field in fields(self) if values[field.name] != field.default}
        return different | ({"added": [token._asdict() for token in self.added]} if self.added else {})

    @classmethod
    def of(cls, changed: Mapping[str, Any]) -> Settings:
        """Reverses `changed`; raises TypeError or ValueError if it is not one."""
        settings = cls(**{**changed, "added": tuple(Added(**token) for token in changed.get("added", ()))})
        values = {field.name: (field.default, getattr(settings, field.name)) for field in fields(cls)}
        values["strip_accents"] = (None, None) if settings.strip_accents is None else (True, settings.strip_accents)
        flags = (flag for token in settings.added for flag in zip(Added("", *[True] * 5), token))
        for default, value in (*values.values(), *flags):
            if type(value) is not type(default):
                raise TypeError(f"{value!r} where {type(default).__name__} is expected")
        return settings


AS_BERT = Settings()


def read_vocabulary(path: Path) -> list[str]:
    """Reads the tokens of a ``vocab.txt``, one a line, in the order of their ids.

    Raises:
        InputError: no such file, or not UTF-8.
    """
    if not path.exists():
        raise InputError(f"{path}: no such file; expected a {VOCABULARY}, one token a line")
    check_regular(path, LONGEST)
    try:
        content = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 at byte {error.start}") from error
    tokens = content.rstrip("\n").split("\n")
    last = {token: number for number, token in enumerate(tokens)}
    # Of equal lines BERT's tokenizer takes the last. A name with spaces is no word.
    return [token if token and last[token] == number else _nameless(number) for number, token in enumerate(tokens)]


def read_tokenizer(folder: Path) -> tuple[list[str], Settings]:
    """Reads the vocabulary of a model folder, in the order of ids, and its settings.

    Raises:
        InputError: no vocabulary there, or a setting of another tokenizer than BERT's.
    """
    config, serialized = _read(folder / CONFIG), _read(folder / SERIALIZED)
    _check_config(config, folder / CONFIG)
    if serialized:
        _check_serialized(serialized, folder / SERIALIZED)
    if (folder / VOCABULARY).exists():
        tokens = read_vocabulary(folder / VOCABULARY)
    elif serialized:
        tokens = _vocabulary_of(serialized, folder / SERIALIZED)
    else:
        names = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
        raise InputError(f"{folder}: neither {VOCABULARY} nor {SERIALIZED} there, only {names}; add the model's own")
    if "added_tokens_decoder" not in config:
        config = config | _read(folder / SPECIAL_MAP)
    values = {key: config[key] for key in _NORMALIZER if key in config}
    if serialized and _class_of(config) in _ANY:
        values = {key: serialized["normalizer"][name] for key, name in _NORMALIZER.items()}
    values |= {role: _token(config[role], True, folder / CONFIG).content for role in ROLES if config.get(role)}
    rows = _added_tokens(folder, config, serialized, bool(values.get("do_lower_case", True)), set(tokens))
    appended = _append(tokens, rows, folder, values.get("unk_token", "[UNK]"))
    numbers = {token: number for number, token in enumerate(tokens)}
    added = sorted((token for token, _ in rows.values()), key=lambda token: numbers[token.content])
    named = {values.get(role, token) for role, token in zip(ROLES, SPECIAL_TOKENS)}
    added = [token for token in added if token != Added(token.content) or token.content not in named]
    try:
        settings = Settings.of({**values, "added": [token._asdict() for token in added], "appended": appended})
    except TypeError as error:
        raise InputError(f"{folder / CONFIG}: {error}") from None
    if serialized:
        _check_frame(serialized, settings, numbers, folder / SERIALIZED)
    return tokens, settings


def check_agreement(folder: Path) -> None:
    """Raises InputError if a folder's two vocabularies differ: paddlenlp and some of transformers' tokenizers
    read ``vocab.txt``, others ``tokenizer.json``."""
    if not ((folder / VOCABULARY).exists() and (folder / SERIALIZED).exists()):
        return
    lines = read_vocabulary(folder / VOCABULARY)
    tokens = _vocabulary_of(_read(folder / SERIALIZED), folder / SERIALIZED)
    for number, (line, token) in enumerate(zip(lines, tokens)):
        if line != token:
            raise InputError(
                f"{folder}: token {number} is {line!r} in {VOCABULARY} and {token!r} in {SERIALIZED}; delete the file "
                "that the model was not trained with"
            )


def _read(path: Path) -> dict[str, Any]:
    """Reads a JSON object; returns an empty one where there is no such file."""
    content = read_json(path) if path.exists() else {}
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a JSON object")
    return content


def _expect(path: Path, key: str, value: Any, understood: Sequence[Any]) -> None:
    """Raises InputError unless a key's value is one of those that are honoured."""
    if value not in understood:
        value = value.get("type") if isinstance(value, dict) else value
        raise InputError(f"{path}: {key} {str(value)[:80]!r}: not honoured; expected {understood[0]!r}, as BERT has it")


def _class_of(config: Mapping[str, Any]) -> str:
    return str(config.get("tokenizer_class") or _BERTS[0]).removesuffix("Fast")


def _check_config(config: Mapping[str, Any], path: Path) -> None:
    _expect(path, "tokenizer_class", _class_of(config), (*_BERTS, *_ANY))
    for key, understood in _UNDERSTOOD.items():
        _expect(path, key, config.get(key, understood[0]), understood)
    names = config.get("model_input_names", ["token_type_ids"])
    if isinstance(names, list) and "token_type_ids" not in names:
        raise InputError(f"{path}: model_input_names without token_type_ids: not honoured here; BERT has them")


def _check_serialized(serialized: Mapping[str, Any], path: Path) -> None:
    """Raises InputError unless a ``tokenizer.json`` is of BERT's tokenizer."""
    for part, types in (
        ("model", (None, "WordPiece")),
        ("normalizer", ("BertNormalizer",)),
        ("pre_tokenizer", ("BertPreTokenizer",)),
        ("post_processor", ("TemplateProcessing", "BertProcessing")),
    ):
        content = serialized.get(part)
        _expect(path, part, content.get("type") if isinstance(content, dict) else "none", types)
    model, normalizer = serialized["model"], serialized["normalizer"]
    _expect(path, "continuing_subword_prefix", model.get("continuing_subword_prefix", "##"), ("##",))
    _expect(path, "max_input_chars_per_word", model.get("max_input_chars_per_word", MAX_WORD), (MAX_WORD,))
    _expect(path, "clean_text", normalizer.get("clean_text", True), (True,))
    if missing := [name for name in _NORMALIZER.values() if name not in normalizer]:
        raise InputError(f"{path}: normalizer without {', '.join(missing)}")


def _check_frame(serialized: Mapping[str, Any], settings: Settings, numbers: Mapping[str, int], path: Path) -> None:
    """Raises InputError unless a ``tokenizer.json`` puts texts between [CLS] and [SEP]."""
    _expect(path, "unk_token", serialized["model"].get("unk_token", settings.unk_token), (settings.unk_token,))
    cls, sep = settings.cls_token, settings.sep_token
    marks = ((cls, 0), (sep, 0), (sep, 1))
    start, end, last = ({"SpecialToken": {"id": token, "type_id": kind}} for token, kind in marks)
    first, second = ({"Sequence": {"id": name, "type_id": kind}} for name, kind in (("A", 0), ("B", 1)))
    template = {
        "type": "TemplateProcessing",
        "single": [start, first, end],
        "pair": [start, first, end, second, last],
        "special_tokens": {
            token: {"id": token, "ids": [numbers.get(token)], "tokens": [token]} for token in (cls, sep)
        },
    }
    older = {"type": "BertProcessing", "sep": [sep, numbers.get(sep)], "cls": [cls, numbers.get(cls)]}
    if serialized["post_processor"] not in (template, older):
        raise InputError(f"{path}: post_processor: expected {cls} text {sep}, and {cls} text {sep} text {sep} of pairs")


def _nameless(number: int) -> str:
    return f"[unused line {number}]"


def _vocabulary_of(serialized: Mapping[str, Any], path: Path) -> list[str]:
    model = serialized.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(vocabulary, dict) or not vocabulary:
        raise InputError(f"{path}: no vocabulary of words' pieces there; expected WordPiece's, as BERT has it")
    size = max(number if type(number) is int and number >= 0 else 1 << 62 for number in vocabulary.values()) + 1
    if size > 2 * len(vocabulary):
        raise InputError(f"{path}: its vocabulary of {len(vocabulary)} tokens does not number them from 0")
    tokens = [_nameless(number) for number in range(size)]
    for token, number in vocabulary.items():
        tokens[number] = _one_line(token, path) or tokens[number]
    return tokens


def _one_line(token: str, path: Path) -> str:
    if "\n" in token or "\r" in token:
        raise InputError(f"{path}: token {token!r}: has a line end; no {VOCABULARY} can hold it")
    return token


def _token(value: Any, special: bool, path: Path) -> Added:
    """Parses a token as `CONFIG` and its like write it, bare or with its flags."""
    row = value if isinstance(value, dict) else {"content": value}
    if not isinstance(row.get("content"), str) or not row["content"]:
        raise InputError(f"{path}: {str(value)[:80]!r} where a token is expected")
    special = bool(row.get("special", special))
    flags = {"special": special, "normalized": not special} | {key: row[key] for key in Added._fields if key in row}
    return Added(**{**flags, "content": _one_line(row["content"], path)})


def _check_types(content: Mapping[str, Any], path: Path, **types: type | tuple[type, ...]) -> None:
    """Raises InputError unless values under these keys, where there are any, have these types."""
    for key, kind in types.items():
        if content.get(key) is not None and not isinstance(content[key], kind):
            raise InputError(f"{path}: {key} {str(content[key])[:80]!r}: expected a list or an object of tokens")


def _added_tokens(
    folder: Path, config: Mapping[str, Any], serialized: Mapping[str, Any], lowercase: bool, taken: Container[str]
) -> dict[str, tuple[Added, int | None]]:
    """Collects added tokens by content, each with its id where a file says it.

    Args:
        lowercase: what is looked for in normalized text is so written, as transformers writes it.
        taken: the vocabulary; a token that it has in lower case is not written so again.
    """
    rows: dict[str, tuple[Added, int | None]] = {}

    def add(value: Any, special: bool, number: Any, name: str) -> None:
        token = _token(value, special, folder / name)
        lower = token.content.lower()
        if token.normalized and not token.special and lowercase and lower not in taken:
            token = token._replace(content=lower)
        before = rows.get(token.content, (None, None))[1]
        if number is not None and (type(number) is not int or before not in (None, number)):
            raise InputError(f"{folder / name}: {token.content!r} has the id {number!r}, elsewhere {before}")
        rows[token.content] = (token, before if number is None else number)

    _check_types(serialized, folder / SERIALIZED, added_tokens=list)
    _check_types(config, folder / CONFIG, extra_special_tokens=(list, dict), additional_special_tokens=list)
    _check_types(config, folder / CONFIG, added_tokens_decoder=dict)
    extra = config.get("extra_special_tokens") or []
    special = [config[role] for role in ROLES if config.get(role)]
    special += config.get("additional_special_tokens") or []
    special += list(extra.values()) if isinstance(extra, dict) else extra
    for token in special:
        add(token, True, None, CONFIG)
    decoder = config.get("added_tokens_decoder")
    if decoder is None:
        names = {*rows, *SPECIAL_TOKENS}
        for content, number in _read(folder / APPENDED).items():
            add(content, content in names, number, APPENDED)
    for row in serialized.get("added_tokens") or []:
        add(row, False, row.get("id") if isinstance(row, dict) else None, SERIALIZED)
    for number, row in (decoder or {}).items():
        add(row, False, int(number) if number.isdecimal() else number, CONFIG)
    return rows


def _append(tokens: list[str], rows: Mapping[str, tuple[Added, int | None]], folder: Path, unknown: str) -> int:
    """Appends added tokens to their vocabulary; returns the number of tokens that words are not made of.

    Raises:
        InputError: their ids are not those of the vocabulary, or not the next ones.
    """
    numbers = {token: number for number, token in enumerate(tokens)}
    entries = len(tokens)
    for content, (_, number) in sorted(rows.items(), key=lambda row: -1 if row[1][1] is None else row[1][1]):
        place = numbers.get(content)
        if place is not None and number in (None, place):
            continue
        if place is None and number == len(tokens):
            tokens.append(content)
        elif place is None and number is not None and 0 <= number < entries and tokens[number] == _nameless(number):
            tokens[number] = content
        elif number is None:
            raise InputError(f"{folder}: {content!r} is in no vocabulary there; a special token needs an id")
        else:
            has = repr(tokens[number]) if 0 <= number < len(tokens) else f"{len(tokens)} tokens before it"
            raise InputError(
                f"{folder}: the added token {content!r} has the id {number}, where the vocabulary has {has}; lines are "
                "missing, or it is another model's: give the vocabulary the model was trained with"
            )
    if unknown in tokens[entries:]:  # words become it, so it is not among those that words are not made of
        entries = tokens.index(unknown) + 1
    return len(tokens) - entries
