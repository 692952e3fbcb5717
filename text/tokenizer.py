"""WordPiece through the `tokenizers` library, the same ids as transformers' BertTokenizer."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import (
    AddedToken,
    Encoding,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from backends.interface import Batch, InputError
from backends.pretrained import atomically, read_json, write_json

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


class TokenLine(NamedTuple):
    """A line as its tokens, without special ones."""

    ids: np.ndarray
    """Unsigned integers [T]."""
    starts: np.ndarray
    """bool [T], where a word begins; empty if nobody asked."""


class Encoded(NamedTuple):
    """A batch and what its lines are as tokens."""

    batch: Batch
    encodings: Sequence[Encoding | TokenLine]


class WordPiece:
    """BERT's tokenizer.

    Args:
        tokens: the vocabulary, by id.
        lowercase: BERT's ``do_lower_case``: lower case and no accents.

    Raises:
        InputError: a special token is missing, or padding is not token 0.
    """

    def __init__(self, tokens: Sequence[str], lowercase: bool = True) -> None:
        self.tokens = list(tokens)
        self.lowercase = lowercase
        self.ids = {token: i for i, token in enumerate(self.tokens)}
        if missing := [token for token in SPECIAL_TOKENS if token not in self.ids]:
            raise InputError(f"vocabulary: {', '.join(missing)} missing; expected BERT's special tokens")
        if self.ids["[PAD]"] != 0:
            raise InputError(f"vocabulary: [PAD] is entry {self.ids['[PAD]']}, expected 0")
        self.tokenizer = Tokenizer(models.WordPiece(self.ids, unk_token="[UNK]"))
        self.tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
        self.tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
        self.tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        self.tokenizer.post_processor = processors.BertProcessing(
            ("[SEP]", self.ids["[SEP]"]), ("[CLS]", self.ids["[CLS]"])
        )
        self.tokenizer.decoder = decoders.WordPiece()

    def __len__(self) -> int:
        return len(self.tokens)

    @classmethod
    def from_file(cls, path: Path, lowercase: bool = True) -> WordPiece:
        """From a ``vocab.txt``, one token a line.

        Raises:
            InputError: no such file, not UTF-8, or not BERT's.
        """
        try:
            content = path.read_bytes().decode("utf-8")
        except OSError as error:
            raise InputError(f"{path}: no such file; expected a vocab.txt, one token a line") from error
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: not UTF-8 at byte {error.start}") from error
        tokens = [line.rstrip("\r") for line in content.removesuffix("\n").split("\n")]
        try:
            return cls(tokens, lowercase)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error

    @classmethod
    def from_model(cls, folder: Path) -> WordPiece:
        """From a model folder's ``vocab.txt`` and, if there, ``tokenizer_config.json``."""
        config = folder / "tokenizer_config.json"
        settings = read_json(config) if config.exists() else {}
        return cls.from_file(folder / "vocab.txt", bool(settings.get("do_lower_case", True)))

    def check_fits(self, config: Mapping[str, Any], folder: Path) -> None:
        """Raises InputError unless the vocabulary is the model's; embeddings may be
        rounded up by fewer than 128 rows, as some are for speed."""
        if not 0 <= config["vocab_size"] - len(self) < 128:
            raise InputError(
                f"{folder / 'vocab.txt'}: {len(self)} entries, but the model embeds {config['vocab_size']} tokens; "
                "give the vocabulary the model was trained with"
            )

    @classmethod
    def trained(cls, lines: Iterable[str], vocab_size: int) -> WordPiece:
        """From a vocabulary trained on `lines`, which are read twice (lower case, Chinese by characters)."""
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
        """What WordPiece splits into pieces: words, Chinese characters, punctuation."""
        normalized = self.tokenizer.normalizer.normalize_str(line)
        return [word for word, _ in self.tokenizer.pre_tokenizer.pre_tokenize_str(normalized)]

    def encode(self, lines: Sequence[str | TokenLine], max_seq_length: int) -> Encoded:
        """Token sequences ``[CLS] ... [SEP]``, cut to `max_seq_length` and padded to the longest."""
        encodings: Sequence[Encoding | TokenLine] = [line for line in lines if isinstance(line, TokenLine)]
        if not encodings:
            encodings = self.tokenizer.encode_batch(lines)
        ids = [line.ids if isinstance(line, TokenLine) else line.ids[1:-1] for line in encodings]
        kept = [min(len(tokens), max_seq_length - 2) for tokens in ids]
        input_ids = np.zeros((len(ids), max(kept) + 2), dtype=np.int64)
        mask = np.zeros_like(input_ids)
        for row, (tokens, length) in enumerate(zip(ids, kept)):
            input_ids[row, 0] = self.ids["[CLS]"]
            input_ids[row, 1 : length + 1] = tokens[:length]
            input_ids[row, length + 1] = self.ids["[SEP]"]
            mask[row, : length + 2] = 1
        truncated = sum(len(tokens) > length for tokens, length in zip(ids, kept))
        return Encoded(Batch(input_ids, np.zeros_like(input_ids), mask, truncated), encodings)

    def fingerprint(self) -> str:
        """SHA-256 of the vocabulary and of what is done to case, in hexadecimal digits."""
        return hashlib.sha256("\n".join([*self.tokens, f"lowercase {self.lowercase}"]).encode()).hexdigest()

    def save(self, folder: Path, max_length: int) -> None:
        """Writes what transformers' and paddlenlp's BertTokenizer load."""
        with atomically(folder / "vocab.txt") as temporary:
            temporary.write_bytes(("\n".join(self.tokens) + "\n").encode("utf-8"))
        with atomically(folder / "tokenizer.json") as temporary:
            self.tokenizer.save(str(temporary))
        special = {f"{token.strip('[]').lower()}_token": token for token in SPECIAL_TOKENS}
        write_json(folder / "special_tokens_map.json", special)
        write_json(
            folder / "tokenizer_config.json",
            {
                "tokenizer_class": "BertTokenizer",
                "do_lower_case": self.lowercase,
                "tokenize_chinese_chars": True,
                "strip_accents": None,
                "model_max_length": max_length,
                **special,
            },
        )
