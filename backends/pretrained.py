"""Model folders: finding, reading and writing them, in either framework's layout.

A folder holds ``config.json`` and the weights. Read are ``model.safetensors``,
``pytorch_model.bin`` and ``model_state.pdparams``, sharded or not, under the
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
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from backends.files import InputError, atomically, check_regular, digest, read_json, write_json
from backends.interface import PROJECTIONS, Head, Weights
from backends.pickles import read_pickled_weights
from backends.settings import OTHER_PROBLEMS, RENAMED, check_settings
from backends.shape import check_sizes, check_weights, listing

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
"""In the order in which they are looked for, each as one file or as the shards that ``<name>.index.json`` names."""
SAFETENSORS_DTYPES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "|i1",
    "U64": "<u8",
    "U32": "<u4",
    "U16": "<u2",
    "U8": "|u1",
    "BOOL": "|b1",
}
HEADER_BYTES = 1 << 22
"""Of a safetensors file; that of a BERT of 24 layers has 50,000."""
CONFIG_FILES = ("config.json", "model_config.json", "bert_config.json")
"""The second is paddlenlp's older one, the third that of BERT's first authors, and of HFL."""
WANTED_FILES = ["*.json", "vocab.txt", "model*.safetensors", "pytorch_model*.bin", "model_state*.pdparams"]
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
PAIRS = "takes_pairs"
"""The key of a fine-tuned classifier's ``config.json`` that says whether its texts come in pairs."""
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
    if name_or_path and os.path.isdir(path):
        for pattern in WANTED_FILES:
            for file in filter(os.path.exists, path.glob(pattern)):
                check_regular(file)
        return path
    if not name_or_path or os.path.exists(path) or name_or_path.startswith((".", "/", "~")):
        shown = name_or_path or "''"
        raise InputError(
            f"--{option} {shown}: no such folder; give one with config.json, weights and vocab.txt or tokenizer.json"
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


def read_config(folder: Path, model_type: str = "bert") -> dict[str, Any]:
    """``config.json`` (or what older folders have in its place) under Hugging Face's keys, without those that are null.

    Args:
        model_type: the model's type, where the file does not say.

    Raises:
        InputError: absent, not JSON, of sizes that no model has, or not of a model that is supported here.
    """
    path = _config_file(folder)
    config = read_json(path)
    try:
        while "hidden_size" not in config and config.get("init_args"):
            # The older layout nests a model's settings in those of its head.
            config = {**config["init_args"][0], "init_class": config.get("init_class")}
        config = {key: value for key, value in config.items() if value is not None}
        class_name = config.pop("init_class", model_type)
        if "For" in class_name:
            config.setdefault("architectures", [class_name])
        config.setdefault("model_type", class_name.split("For")[0].removesuffix("Model").lower())
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not a model's settings, each under its name; expected those of a BERT") from error
    if missing := [key for key in SHAPE_KEYS if key not in config]:
        raise InputError(f"{path}: {', '.join(missing)} missing; expected the configuration of a BERT")
    config = {RENAMED.get(key, key): value for key, value in config.items()}
    if config.get("id2label"):
        config.pop("num_labels", None)  # in both libraries the names count
    architectures = config.get("architectures") or []
    if isinstance(architectures, str):
        config["architectures"] = architectures = [architectures]
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        raise InputError(f"{path}: architectures are no names; expected a list of names of classes")
    check_sizes(config, path)
    check_settings(config, path)
    return config


def _config_file(folder: Path) -> Path:
    path = next((folder / name for name in CONFIG_FILES if (folder / name).exists()), None)
    if path is None:
        raise InputError(f"{folder}: no config.json there, nor {' or '.join(CONFIG_FILES[1:])}; {_listing(folder)}")
    return path


def _listing(folder: Path) -> str:
    return f"there are {listing(sorted(path.name for path in folder.glob('*')), 12)}"


def labels_of(config: Mapping[str, Any], folder: Path) -> tuple[str, ...]:
    """The names of a model's classes, in order; none if its configuration has none.

    Raises:
        InputError: they are not numbered from 0, or the head does not choose one of them.
    """
    names = config.get("id2label") or {}
    try:
        numbers = sorted(names, key=int)
        if not isinstance(names, Mapping) or list(map(int, numbers)) != list(range(len(numbers))):
            raise ValueError
    except (TypeError, ValueError):
        raise InputError(
            f"{folder / 'config.json'}: id2label: expected the numbers from 0 on, each with a name"
        ) from None
    labels = tuple(str(names[number]) for number in numbers)
    problem = config.get("problem_type")
    if problem in OTHER_PROBLEMS or len(labels) == 1:
        problem_named = (
            f"problem_type {problem}" if problem in OTHER_PROBLEMS else "id2label: one name, as for regression"
        )
        raise InputError(
            f"{folder / 'config.json'}: {problem_named}: expected a head that chooses one of several classes"
        )
    if len({*labels}) < len(labels):
        raise InputError(f"{folder / 'config.json'}: id2label: names two classes alike; expected a name for each")
    return labels


def weight_files(folder: Path) -> dict[Path, set[str] | None]:
    """The files that hold a model's weights, each with the names of those to be taken from it (None: all).

    Raises:
        InputError: no weights there, or an index that names none.
    """
    for name in WEIGHT_FILES:
        path, index = folder / name, folder / f"{name}.index.json"
        if path.exists():
            return {path: None}
        if index.exists():
            return _shards(index)
    raise InputError(
        f"{folder}: no weights there; looked for {', '.join(WEIGHT_FILES)}, and for each of them with .index.json; "
        f"{_listing(folder)}"
    )


def _shards(index: Path) -> dict[Path, set[str] | None]:
    content = read_json(index)
    files = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(files, dict) or not files:
        raise InputError(f"{index}: has no weight_map; expected one, from names of weights to names of files")
    shards: dict[Path, set[str] | None] = {}
    ending = Path(index.name.removesuffix(".index.json")).suffix
    for shard in dict.fromkeys(file if isinstance(file, str) else "" for file in files.values()):
        # A name with a separator would reach out of the folder.
        inside = os.path.basename(shard) == shard and shard.endswith(ending) and "\0" not in shard
        if not inside or not os.path.isfile(index.parent / shard):
            raise InputError(
                f"{index}: weight_map names {shard[:80]!r}; expected *{ending} files of {index.parent}, where "
                f"{_listing(index.parent)}"
            )
        shards[index.parent / shard] = {name for name, file in files.items() if file == shard}
    return shards


def takes_pairs(config: Mapping[str, Any]) -> bool | None:
    """Whether a classifier was fine-tuned on pairs of texts; None if its configuration does not say."""
    pairs = config.get(PAIRS)
    return pairs if isinstance(pairs, bool) else None


def read_weights(folder: Path) -> dict[str, np.ndarray]:
    """A model's weights, float32, under the names of `backends.interface`.

    Names may stand under a prefix, as DataParallel, ``torch.compile`` and whoever keeps a model as a part of
    another leave them. What the configuration says is compared before any model is made of it.

    Raises:
        InputError: no weights there, or a file that is cut short or unsafe; or they are not finite, or not
            those of the model that the folder's configuration describes.
    """
    weights: dict[str, np.ndarray] = {}
    for path, names in weight_files(folder).items():
        raw = read_safetensors(path) if path.suffix == ".safetensors" else read_pickled_weights(path)
        for name in list(raw):
            array = _float32(raw.pop(name))
            if names is not None and name not in names:
                continue
            if not np.isfinite(array).all():
                raise InputError(f"{path}: {name[:80]} holds NaN or infinity; expected finite numbers")
            weights[name] = array
    config = read_config(folder)
    reads = any("QuestionAnswering" in name for name in config.get("architectures") or ())
    bare = _bare_names(weights, folder)
    paddle = any(".self_attn." in name for name in bare)
    named = {}
    for name, key in bare.items():
        array = weights.pop(key)
        if paddle:
            name = from_paddle_name(name, "question_answering" if reads else None)
            array = np.ascontiguousarray(array.T) if is_transposed(name, array) else array
        # TensorFlow's names for a norm's weight and bias, kept by early conversions
        name = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", name)
        name = re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name)
        named[name] = array
    check_weights(config, named, _config_file(folder))
    return named


def _float32(array: np.ndarray) -> np.ndarray:
    if array.dtype.kind == "u" and array.itemsize == 2:  # bfloat16
        return (array.astype("<u4") << 16).view("<f4")
    with np.errstate(over="ignore"):
        return np.require(array, np.float32, ["C_CONTIGUOUS", "WRITEABLE"])  # PyTorch warns of others


def _bare_names(names: Iterable[str], folder: Path) -> dict[str, str]:
    """Names without the prefix that a wrapper gave them nor the encoder's, each with the name that it is in the file.

    Raises:
        InputError: there is no encoder among them, or more than one.
    """
    wanted = "embeddings.word_embeddings.weight"
    prefixes = [name.removesuffix(wanted) for name in names if name == wanted or name.endswith(f".{wanted}")]
    if not prefixes:
        raise InputError(f"{folder}: no {wanted} among the weights, under any prefix; there are {listing(list(names))}")
    if len(prefixes) > 1:
        raise InputError(f"{folder}: the weights of several models, {listing(prefixes)}; expected those of one")
    family = next((prefix for prefix in PREFIXES if f".{prefixes[0]}".endswith(f".{prefix}")), "")
    wrapper = prefixes[0].removesuffix(family)
    bare: dict[str, str] = {}
    for key in names:
        name = key.removeprefix(wrapper)
        name = next((name.removeprefix(prefix) for prefix in PREFIXES if name.startswith(prefix)), name)
        if bare.setdefault(name, key) != key:
            raise InputError(f"{folder}: the weights {bare[name][:80]} and {key[:80]} are one; expected one model's")
    return bare


def fingerprint(folder: Path) -> str:
    """Sixteen digits that tell a model's weights from others'.

    Raises:
        InputError: no weights there.
    """
    digests = []
    for path in weight_files(folder):
        check_regular(path)
        with open(path, "rb") as file:
            digests.append(digest(file))
    return (digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest())[:16]


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Arrays by name; bfloat16, which NumPy has not, as its bits, uint16, as paddlenlp keeps it.

    Raises:
        InputError: the file is absent, cut short or not safetensors, or has a dtype that is not read.
    """
    check_regular(path)
    arrays = {}
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > HEADER_BYTES:
                raise ValueError(f"its header is said to have {length} bytes")
            with safe_open(path, framework="np"):
                pass  # the library compares every shape and place with the file
            for name, entry in json.loads(file.read(length)).items():
                if name == "__metadata__":
                    continue
                if entry["dtype"] not in SAFETENSORS_DTYPES:
                    raise InputError(
                        f"{path}: {name[:80]} is of dtype {entry['dtype']}, which is not read; expected one of "
                        f"{', '.join(SAFETENSORS_DTYPES)}"
                    )
                dtype, (start, end) = np.dtype(SAFETENSORS_DTYPES[entry["dtype"]]), entry["data_offsets"]
                file.seek(8 + length + start)
                arrays[name] = np.fromfile(file, dtype, (end - start) // dtype.itemsize).reshape(entry["shape"])
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{path}: cannot be read ({error}); it is cut short or not a safetensors file") from error
    return arrays


def write_safetensors(path: Path, arrays: Weights, metadata: dict[str, str] | None = None) -> None:
    """Raises OSError if the disk is full or not writable."""
    with atomically(path) as temporary:
        try:
            save_file({name: np.asarray(array, order="C") for name, array in arrays.items()}, temporary, metadata)
        except SafetensorError as error:
            raise OSError(f"{path}: cannot be written ({error})") from error


def write_model(folder: Path, config: Mapping[str, Any], weights: Weights, head: Head | None = None) -> None:
    """Writes config and weights so that both libraries load the folder as it stands; projections are left out."""
    weights = {name: array for name, array in weights.items() if not name.startswith(PROJECTIONS)}
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
