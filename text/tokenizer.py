"""WordPiece through the `tokenizers` library, with the same ids as transformers' slow BertTokenizer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import (
    AddedToken,
    Encoding,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from backends.files import InputError, atomically, write_json
from backends.interface import Batch
from text.vocabulary import (
    APPENDED,
    AS_BERT,
    CONFIG,
    MAX_WORD,
    ROLES,
    SERIALIZED,
    SPECIAL_MAP,
    SPECIAL_TOKENS,
    VOCABULARY,
    Settings,
    check_agreement,
    read_tokenizer,
    read_vocabulary,
)

# The slow BertTokenizer of transformers splits text by Python's tables of Unicode 15. The normalizer and the
# pre-tokenizer that the tokenizers library calls BERT's have older tables, do not compose what Unicode composes, and
# miss 256 Chinese characters; its regular expressions have those of Unicode 15, and take less time.
_REMOVED = r"[\p{Cc}\p{Cf}\p{Co}\x{fffd}&&[^\t\n\r]]"
_ACCENTS = r"[\p{Mn}\x{1171e}]"
_PUNCTUATION = r"!-/:-@\[-`{-~\p{P}"
_CHINESE = (
    r"\x{4e00}-\x{9fff}\x{3400}-\x{4dbf}\x{20000}-\x{2a6df}\x{2a700}-\x{2ceaf}\x{f900}-\x{faff}\x{2f800}-\x{2fa1f}"
)
_PADDED_TO = (8, 64, 128, 1000)
"""Numbers of embeddings are rounded up to multiples of these, for speed, and in ERNIE."""
_WHOLE = 21128
"""Number of embeddings of BERT's Chinese vocabulary, which is never rounded up."""


class TokenLine(NamedTuple):
    """A line as its tokens, without special ones."""

    ids: np.ndarray
    """Unsigned integers [T]."""
    starts: np.ndarray
    """bool [T], where a word begins; empty if the corpus was prepared without --words."""


class Encoded(NamedTuple):
    """A batch, and the tokens of its lines."""

    batch: Batch
    encodings: Sequence[Encoding | TokenLine]


class WordPiece:
    """BERT's tokenizer.

    Args:
        tokens: the vocabulary, in the order of ids.
        settings: what ids depend on beside the vocabulary.

    Raises:
        InputError: a special token is missing, or padding is not token 0.
    """

    def __init__(self, tokens: Sequence[str], settings: Settings = AS_BERT) -> None:
        self.tokens = list(tokens)
        self.settings = settings
        self.ids = {token: i for i, token in enumerate(self.tokens)}
        if missing := [token for token in settings.special if token not in self.ids]:
            raise InputError(f"vocabulary: {', '.join(missing)} missing; expected BERT's special tokens")
        self.pad, self.unk, self.cls, self.sep, self.mask = (self.ids[token] for token in settings.special)
        if self.pad != 0:
            raise InputError(f"vocabulary: {settings.pad_token} is entry {self.pad}, expected 0")
        self.pieces = {token: i for token, i in self.ids.items() if i < len(self.tokens) - settings.appended}
        """The tokens that words are made of, and their ids."""
        if settings.unk_token not in self.pieces:
            raise InputError(f"vocabulary: {settings.unk_token} is among tokens that were added, which words are not")
        steps = [normalizers.Replace(Regex(_REMOVED), "")]
        steps += [normalizers.Lowercase()] if settings.do_lower_case else []
        if settings.without_accents:
            steps += [normalizers.NFD(), normalizers.Replace(Regex(_ACCENTS), "")]
        else:
            steps += [normalizers.NFC()]
        alone = _PUNCTUATION + _CHINESE * settings.tokenize_chinese_chars
        self.tokenizer = self._tokenizer(
            normalizers.Sequence(steps),
            pre_tokenizers.Split(Regex(rf"[{alone}]|[^\s{alone}]+"), "removed", invert=True),
        )

    def _tokenizer(self, normalizer: normalizers.Normalizer, pre_tokenizer: pre_tokenizers.PreTokenizer) -> Tokenizer:
        settings = self.settings
        tokenizer = Tokenizer(
            models.WordPiece(self.pieces, unk_token=settings.unk_token, max_input_chars_per_word=MAX_WORD)
        )
        tokenizer.normalizer = normalizer  # before tokens are added, which it may change
        tokenizer.add_tokens([AddedToken(**token._asdict()) for token in settings.whole])
        tokenizer.pre_tokenizer = pre_tokenizer
        tokenizer.post_processor = processors.BertProcessing(
            (settings.sep_token, self.sep), (settings.cls_token, self.cls)
        )
        tokenizer.decoder = decoders.WordPiece()
        return tokenizer

    def __len__(self) -> int:
        return len(self.tokens)

    @classmethod
    def from_file(cls, path: Path, lowercase: bool = True) -> WordPiece:
        """Makes a tokenizer from a ``vocab.txt``, one token a line.

        Raises:
            InputError: no such file, not UTF-8, or not BERT's.
        """
        tokens = read_vocabulary(path)
        try:
            return cls(tokens, Settings(do_lower_case=lowercase))
        except InputError as error:
            raise InputError(f"{path}: {error}") from error

    @classmethod
    def from_model(cls, folder: Path) -> WordPiece:
        """Makes a tokenizer from a model folder as transformers or paddlenlp saves it (`text.vocabulary`).

        Raises:
            InputError: no vocabulary there, or not BERT's tokenizer.
        """
        tokens, settings = read_tokenizer(folder)
        try:
            return cls(tokens, settings)
        except InputError as error:
            raise InputError(f"{folder}: {error}") from error

    def check_fits(self, rows: int, folder: Path) -> None:
        """Raises InputError unless the vocabulary is that of a model with so many rows of embeddings, which may be
        rounded up by fewer than 128, as some are for speed."""
        entries = len(self)
        rounded = rows != _WHOLE and rows in (-(-entries // multiple) * multiple for multiple in _PADDED_TO)
        if entries != rows and not (rounded and rows - entries < 128):
            name = VOCABULARY if (folder / VOCABULARY).exists() else SERIALIZED
            raise InputError(
                f"{folder / name}: {entries} entries, but the model embeds {rows} tokens; give the vocabulary "
                "the model was trained with"
            )
        check_agreement(folder)

    @classmethod
    def trained(cls, lines: Iterable[str], vocab_size: int) -> WordPiece:
        """Trains a vocabulary on `lines`, which are read twice (lower case, Chinese by characters)."""
        untrained = cls(SPECIAL_TOKENS)
        # The trainer numbers pieces inside words in the order of a hash map, and ties follow the
        # numbers (huggingface/tokenizers#1794). Named in advance, they are the same in every run.
        inner = {character for line in lines for word in untrained.words(line) for character in word[1:]}
        trainer = trainers.WordPieceTrainer(
            vocab_size=vocab_size,
            special_tokens=[*SPECIAL_TOKENS, *sorted(f"##{character}" for character in inner)],
            show_progress=False,
        )
        untrained.tokenizer.train_from_iterator(lines, trainer)
        ids = untrained.tokenizer.get_vocab()
        return cls(sorted(ids, key=ids.__getitem__))

    def words(self, line: str) -> list[str]:
        """Splits a line into what WordPiece takes: words, Chinese characters, punctuation."""
        normalized = self.tokenizer.normalizer.normalize_str(line)
        return [word for word, _ in self.tokenizer.pre_tokenizer.pre_tokenize_str(normalized)]

    def encode(self, lines: Sequence[str | TokenLine], max_seq_length: int) -> Encoded:
        """Makes token sequences ``[CLS] ... [SEP]``, cut to `max_seq_length` and padded to the longest."""
        encodings: Sequence[Encoding | TokenLine] = [line for line in lines if isinstance(line, TokenLine)]
        if not encodings:
            encodings = self.tokenizer.encode_batch(lines)
        ids = [line.ids if isinstance(line, TokenLine) else line.ids[1:-1] for line in encodings]
        kept = [min(len(tokens), max_seq_length - 2) for tokens in ids]
        input_ids = np.zeros((len(ids), max(kept) + 2), dtype=np.int64)
        mask = np.zeros_like(input_ids)
        for row, (tokens, length) in enumerate(zip(ids, kept)):
            input_ids[row, 0] = self.cls
            input_ids[row, 1 : length + 1] = tokens[:length]
            input_ids[row, length + 1] = self.sep
            mask[row, : length + 2] = 1
        truncated = sum(len(tokens) > length for tokens, length in zip(ids, kept))
        return Encoded(Batch(input_ids, np.zeros_like(input_ids), mask, truncated), encodings)

    def fingerprint(self) -> str:
        """Returns the SHA-256 of the vocabulary and of the settings, in hexadecimal digits."""
        changed = self.settings.changed()
        lowercase = changed.pop("do_lower_case", True)
        others = [json.dumps(changed, sort_keys=True)] if changed else []
        return hashlib.sha256("\n".join([*self.tokens, f"lowercase {lowercase}", *others]).encode()).hexdigest()

    def save(self, folder: Path, max_length: int) -> None:
        """Writes the files that transformers' and paddlenlp's BertTokenizer load."""
        settings = self.settings
        words, appended = self.tokens[: len(self) - settings.appended], self.tokens[len(self) - settings.appended :]
        with atomically(folder / VOCABULARY) as temporary:
            temporary.write_bytes(("\n".join(words) + "\n").encode("utf-8"))
        published = self._tokenizer(
            normalizers.BertNormalizer(
                handle_chinese_chars=settings.tokenize_chinese_chars,
                strip_accents=settings.strip_accents,
                lowercase=settings.do_lower_case,
            ),
            pre_tokenizers.BertPreTokenizer(),
        )
        with atomically(folder / SERIALIZED) as temporary:
            published.save(str(temporary))
        special: dict[str, Any] = dict(zip(ROLES, settings.special))
        config = {
            "tokenizer_class": "BertTokenizer",
            "do_lower_case": settings.do_lower_case,
            "tokenize_chinese_chars": settings.tokenize_chinese_chars,
            "strip_accents": settings.strip_accents,
            "model_max_length": max_length,
        }
        if settings.added:
            config["added_tokens_decoder"] = {str(self.ids[token.content]): token._asdict() for token in settings.whole}
            others = [
                token.content for token in settings.added if token.special and token.content not in settings.special
            ]
            special |= {"additional_special_tokens": others} if others else {}
        write_json(folder / SPECIAL_MAP, special)
        write_json(folder / CONFIG, {**config, **special})
        if appended:
            write_json(folder / APPENDED, {token: self.ids[token] for token in appended})
        else:
            (folder / APPENDED).unlink(missing_ok=True)
