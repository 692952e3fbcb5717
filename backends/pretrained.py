"""Model folders: finding, reading and writing them, in either framework's layout.

A folder holds ``config.json`` and the weights. Read are ``model.safetensors``
(sharded or not), ``pytorch_model.bin`` and ``model_state.pdparams``, under the
names of transformers or of paddlenlp. Written is a folder that both libraries'
``from_pretrained(folder)`` load as it stands: transformers takes
``model.safetensors``; paddlenlp refuses that file but looks first for
``model.safetensors.index.json``, which points it to ``paddle_model.safetensors``.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from backends.interface import Head, InputError, Weights
from backends.pickles import read_pickled_weights

ALIASES = {
    "roberta-wwm-ext": "hfl/chinese-roberta-wwm-ext",
    "roberta-wwm-ext-large": "hfl/chinese-roberta-wwm-ext-large",
    "hfl/roberta-wwm-ext": "hfl/chinese-roberta-wwm-ext",
    "hfl/roberta-wwm-ext-large": "hfl/chinese-roberta-wwm-ext-large",
    "bert-wwm-ext-chinese": "hfl/chinese-bert-wwm-ext",
    "ernie-3.0-base-zh": "nghuyong/ernie-3.0-base-zh",
}
"""PaddleNLP's names of models -> where Hugging Face's hub has them."""

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin", "model_state.pdparams")
WANTED_FILES = ["*.json", "vocab.txt", "model*.safetensors", "pytorch_model.bin", "model_state.pdparams"]
CLASS_SUFFIXES: dict[Head | None, str] = {
    None: "Model",
    "masked_lm": "ForMaskedLM",
    "sequence_classification": "ForSequenceClassification",
    "token_classification": "ForTokenClassification",
    "question_answering": "ForQuestionAnswering",
}
"""Head -> how both libraries end the name of a class that has it."""
TIED = ("cls.predictions.decoder.weight", "cls.predictions.decoder.bias")
"""Other names of the word embeddings and of ``cls.predictions.bias``, left out everywhere."""
SHAPE_KEYS = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
PREFIXES = ("bert.", "ernie.", "roberta.", "ppminilm.")

# transformers' name -> paddlenlp's name
_NAMES = (
    ("embeddings.LayerNorm.", "embeddings.layer_norm."),
    ("encoder.layer.{}.attention.self.query.", "encoder.layers.{}.self_attn.q_proj."),
    ("encoder.layer.{}.attention.self.key.", "encoder.layers.{}.self_attn.k_proj."),
    ("encoder.layer.{}.attention.self.value.", "encoder.layers.{}.self_attn.v_proj."),
    ("encoder.layer.{}.attention.output.dense.", "encoder.layers.{}.self_attn.out_proj."),
    ("encoder.layer.{}.attention.output.LayerNorm.", "encoder.layers.{}.norm1."),
    ("encoder.layer.{}.intermediate.dense.", "encoder.layers.{}.linear1."),
    ("encoder.layer.{}.output.dense.", "encoder.layers.{}.linear2."),
    ("encoder.layer.{}.output.LayerNorm.", "encoder.layers.{}.norm2."),
    ("cls.predictions.transform.dense.", "cls.predictions.transform."),
    ("cls.predictions.transform.LayerNorm.", "cls.predictions.layer_norm."),
    ("cls.predictions.bias", "cls.predictions.decoder_bias"),
    ("qa_outputs.", "classifier."),
)


def _translator(pairs: list[tuple[str, str]]) -> list[tuple[re.Pattern[str], str]]:
    return [(re.compile(re.escape(old).replace(r"\{\}", r"(\d+)")), new.replace("{}", r"\1")) for old, new in pairs]


_TO_PADDLE = _translator(list(_NAMES))
_FROM_PADDLE = _translator([(paddle, ours) for ours, paddle in _NAMES if ours != "qa_outputs."])


def _translate(name: str, rules: list[tuple[re.Pattern[str], str]]) -> str:
    for pattern, replacement in rules:
        if match := pattern.match(name):
            return match.expand(replacement) + name[match.end() :]
    return name


def to_paddle_name(name: str) -> str:
    """paddlenlp's name for a weight of `backends.interface`'s naming."""
    return _translate(name, _TO_PADDLE)


def from_paddle_name(name: str, head: Head | None = None) -> str:
    """The reverse of `to_paddle_name`; paddlenlp calls two heads ``classifier``,
    so `head` must say if it is the question answering one."""
    if head == "question_answering" and name.startswith("classifier."):
        return "qa_outputs." + name.removeprefix("classifier.")
    return _translate(name, _FROM_PADDLE)


def is_transposed(name: str, array: np.ndarray) -> bool:
    """Whether paddlenlp stores a weight transposed: linear layers, but not the
    embeddings and the MLM decoder tied to them."""
    return array.ndim == 2 and "embeddings" not in name and not name.endswith("decoder.weight")


def find_model(name_or_path: str, option: str) -> Path:
    """The folder of a model, fetched from Hugging Face's hub if it is a name there.

    Args:
        option: the option to name in an error.

    Raises:
        InputError: neither a folder nor a model that can be fetched.
    """
    path = Path(name_or_path)
    if path.is_dir():
        return path
    if path.exists() or name_or_path.startswith((".", "/", "~")):
        raise InputError(
            f"--{option} {name_or_path}: no such folder; give one with config.json, weights and vocab.txt or "
            "tokenizer.json"
        )
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(ALIASES.get(name_or_path, name_or_path), allow_patterns=WANTED_FILES))
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"--{option} {name_or_path}: not a folder here and not fetched from the model hub ({reason}); "
            "give a folder with config.json, weights and vocab.txt or tokenizer.json"
        ) from error


def read_json(path: Path) -> Any:
    """Raises InputError if the file is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error})") from error


def read_config(folder: Path, model_type: str = "bert") -> dict[str, Any]:
    """``config.json`` (or paddlenlp's older ``model_config.json``) under Hugging Face's keys.

    Args:
        model_type: the model's type, where the file does not say.

    Raises:
        InputError: absent, not JSON, or not of a model that is supported here.
    """
    path = next((folder / name for name in ("config.json", "model_config.json") if (folder / name).exists()), None)
    if path is None:
        raise InputError(f"{folder}: no config.json there; a model folder has one")
    config = read_json(path)
    while "hidden_size" not in config and config.get("init_args"):
        # The older layout nests a model's settings in those of its head.
        config = {"init_class": config.get("init_class"), **config["init_args"][0]}
    class_name = config.pop("init_class", None) or model_type
    config.setdefault("model_type", class_name.split("For")[0].removesuffix("Model").lower())
    if missing := [key for key in SHAPE_KEYS if key not in config]:
        raise InputError(f"{path}: {', '.join(missing)} missing; expected the configuration of a BERT")
    if config["model_type"] not in ("bert", "roberta", "ernie", "ppminilm") or config.get("pad_token_id") not in (
        None,
        0,
    ):
        raise InputError(
            f"{path}: model_type {config['model_type']} with pad_token_id {config.get('pad_token_id')}: expected bert, "
            "ernie, ppminilm, or roberta with BERT's vocabulary (RoBERTa-wwm-ext), whose padding is 0"
        )
    return config


def labels_of(config: Mapping[str, Any], folder: Path) -> tuple[str, ...]:
    """The names of a model's classes, in order; none if its configuration has none.

    Raises:
        InputError: they are not numbered from 0.
    """
    names = config.get("id2label") or {}
    try:
        numbers = sorted(names, key=int)
        if list(map(int, numbers)) != list(range(len(numbers))):
            raise ValueError
    except (TypeError, ValueError):
        raise InputError(
            f"{folder / 'config.json'}: id2label: expected the numbers from 0 on, each with a name"
        ) from None
    return tuple(str(names[number]) for number in numbers)


def read_weights(folder: Path) -> dict[str, np.ndarray]:
    """A model's weights, float32, under the names of `backends.interface`.

    Raises:
        InputError: no weights there, or a file that is cut short or unsafe.
    """
    index = folder / "model.safetensors.index.json"
    path = next((folder / name for name in WEIGHT_FILES if (folder / name).exists()), None)
    raw: dict[str, np.ndarray] = {}
    if path is None and index.exists():
        for shard in sorted(set(read_json(index)["weight_map"].values())):
            raw |= read_safetensors(folder / Path(shard).name)
    elif path is None:
        raise InputError(f"{folder}: no weights there; expected {', '.join(WEIGHT_FILES)}")
    else:
        raw = read_safetensors(path) if path.suffix == ".safetensors" else read_pickled_weights(path)
    paddle = any(".self_attn." in name for name in raw)
    weights = {}
    for name, array in raw.items():
        name = next((name.removeprefix(prefix) for prefix in PREFIXES if name.startswith(prefix)), name)
        if paddle:
            name = from_paddle_name(name)
            array = array.T if is_transposed(name, array) else array
        # TensorFlow's names for a norm's weight and bias, kept by early conversions
        name = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", name)
        name = re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name)
        weights[name] = np.ascontiguousarray(array, dtype=np.float32)
    return weights


def fingerprint(folder: Path) -> str:
    """Sixteen digits that tell a model's weights from others'.

    Raises:
        InputError: no weights there.
    """
    names = (*WEIGHT_FILES, "model.safetensors.index.json")
    path = next((folder / name for name in names if (folder / name).exists()), None)
    if path is None:
        raise InputError(f"{folder}: no weights there; expected {', '.join(WEIGHT_FILES)}")
    with open(path, "rb") as file:
        return digest(file)[:16]


def digest(content: IO[bytes], algorithm: str = "sha256") -> str:
    """Of all that can be read from there on, in hexadecimal digits."""
    found = hashlib.new(algorithm)
    while block := content.read(1 << 20):
        found.update(block)
    return found.hexdigest()


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Arrays by name.

    Raises:
        InputError: the file is absent, cut short or not safetensors.
    """
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: cannot be read ({error}); it is cut short or not a safetensors file") from error


@contextmanager
def atomically(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place, flushed to disk, when
    the block ends well and vanishes when it does not."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_safetensors(path: Path, arrays: Weights, metadata: dict[str, str] | None = None) -> None:
    """Raises OSError if the disk is full or not writable."""
    with atomically(path) as temporary:
        try:
            save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, temporary, metadata)
        except SafetensorError as error:
            raise OSError(f"{path}: cannot be written ({error})") from error


def write_json(path: Path, content: Any) -> None:
    with atomically(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")


def write_model(folder: Path, config: Mapping[str, Any], weights: Weights, head: Head | None = None) -> None:
    """Writes config and weights so that both libraries load the folder as it stands."""
    family = "ernie" if config["model_type"] == "ernie" else "bert"
    if head is not None:
        encoder = ("embeddings.", "encoder.", "pooler.")
        weights = {f"{family}.{name}" if name.startswith(encoder) else name: a for name, a in weights.items()}
    for_paddle = {}
    for name, array in weights.items():
        prefix = f"{family}." if name.startswith(f"{family}.") else ""
        bare = name.removeprefix(prefix)
        for_paddle[prefix + to_paddle_name(bare)] = array.T if is_transposed(bare, array) else array
    architecture = family.capitalize() + CLASS_SUFFIXES[head]
    write_json(
        folder / "config.json",
        {**config, "model_type": family, "architectures": [architecture], "dtype": "float32"},
    )
    write_safetensors(folder / "model.safetensors", weights, {"format": "pt"})
    write_safetensors(folder / "paddle_model.safetensors", for_paddle, {"format": "np"})
    write_json(
        folder / "model.safetensors.index.json",
        {
            "metadata": {"total_size": sum(array.nbytes for array in for_paddle.values())},
            "weight_map": dict.fromkeys(for_paddle, "paddle_model.safetensors"),
        },
    )
