"""What ``config.json`` says of what a model computes: each key is honoured on every backend, or refused.

Compared key by key with transformers' BertConfig, ErnieConfig and RobertaConfig (4.57 and 5) and paddlenlp's
BertConfig, ErnieConfig, RobertaConfig and PPMiniLMConfig (2.8). A key that is not named here changes nothing that
these libraries compute of an encoder: how memory is used, what is returned, how text is generated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from backends import shape
from backends.files import InputError
from backends.interface import Head

HONOURED = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act"),
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout", "initializer_range"),
    *("max_position_embeddings", "type_vocab_size", "use_task_id", "task_type_vocab_size", "pad_token_id"),
    *("layer_norm_eps", "id2label", "num_labels"),
)
"""What a framework's library is told; no other key reaches it. Sizes of single layers are `backends.shape`'s."""
DEFAULTS = {**shape.DEFAULTS, "layer_norm_eps": 1e-12, "hidden_act": "gelu"}
"""Of keys that are absent, transformers'."""
RENAMED = {"num_classes": "num_labels", "dropout": "classifier_dropout"}
"""paddlenlp's names for keys."""
REQUIRED: Mapping[str, tuple[Any, ...]] = {
    "model_type": ("bert", "roberta", "ernie", "ppminilm"),
    "position_embedding_type": ("absolute",),
    "pool_act": ("tanh",),
    "is_decoder": (False,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "pruned_heads": ({}, []),
    "quantization_config": ({},),
    "task_id": (0,),
    "pad_token_id": (0,),
}
"""Keys of which no other values are computed here."""
SHARES = (
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"),
    *("initializer_range", "layer_norm_eps"),
)
"""Keys whose values are numbers from 0 to 1."""
OTHER_PROBLEMS = ("regression", "multi_label_classification")
"""Values of ``problem_type`` that give a head's outputs another meaning than one class of several."""


def check_settings(config: Mapping[str, Any], path: Path) -> None:
    """Raises InputError if a model's configuration asks for what is not computed here.

    Args:
        path: of the file, to be named.
    """
    for key, allowed in REQUIRED.items():
        value = config.get(key, allowed[0])
        if value not in allowed:
            expected = ", ".join(str(choice) for choice in allowed if not isinstance(choice, list))
            raise InputError(f"{path}: {key} {_short(value)}: not computed here; expected {expected}")
    code = config.get("auto_map")
    if isinstance(code, Mapping) and any(key.startswith(("AutoModel", "TFAutoModel")) for key in map(str, code)):
        raise InputError(f"{path}: auto_map: the model is computed by code of its own; give one of transformers' own")
    if config.get("model_type") == "roberta" and config.get("transformers_version") is not None:
        raise InputError(
            f"{path}: model_type roberta: transformers' RobertaModel counts positions from pad_token_id + 1; expected "
            "RoBERTa-wwm-ext, whose model_type is bert there"
        )
    for key in SHARES:
        value = config.get(key, 0)
        if type(value) not in (int, float) or not 0 <= value <= 1:
            raise InputError(f"{path}: {key} {_short(value)}: expected a number from 0 to 1")
    names = config.get("id2label", {})
    if not isinstance(names, Mapping) or not all(map(str.isdecimal, names)):
        raise InputError(f"{path}: id2label: expected the numbers from 0 on, each with a name")


def library_settings(
    config: Mapping[str, Any], head: Head | None, activations: Sequence[str], name: str
) -> dict[str, Any]:
    """What a backend's library is told of a model.

    Args:
        activations: values of ``hidden_act`` that the backend computes.
        name: the backend's.

    Raises:
        InputError: the backend lacks the activation, or the head is not computed so.
    """
    settings = {**DEFAULTS, **{key: config[key] for key in HONOURED if config.get(key) is not None}}
    activation = settings["hidden_act"]
    if activation not in activations:
        raise InputError(
            f"config.json: hidden_act {_short(activation)}: the {name} backend has {', '.join(activations)}"
        )
    if head == "masked_lm" and config.get("tie_word_embeddings") is False:
        raise InputError("config.json: tie_word_embeddings false: the head of masked words here takes the embeddings")
    return settings


def _short(value: Any) -> str:
    return str(value)[:60]
