"""``python -m export onnx``: a model folder becomes an ONNX file that is checked before it is there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import yaml
from onnx import TensorProto, checker, helper, numpy_helper, shape_inference

import backends
from backends.interface import HEADS, ONNX_INPUTS, ONNX_OUTPUTS, Backend, Batch, Head, InputError, Model
from backends.pretrained import CLASS_SUFFIXES, atomically, find_model, read_config, read_weights
from export.model import Description, OnnxModel
from export.tokenizer import with_tokenizer
from text.tokenizer import WordPiece
from training.folder import RECORD
from training.log import say

TEXTS = Path(__file__).parents[1] / "general_distill" / "demo"
"""Real text, on which a file is compared with the framework."""
TOLERANCE = 1e-5
"""Of outputs, absolute where they are below 1, relative above."""
PRODUCER = "MiniLM Duet"


@dataclass
class OnnxArguments:
    """A model folder as an ONNX file."""

    model: str
    """the model's folder or its name on the model hub"""
    output: str | None = None
    """the file to write; without, model.onnx in the model's folder"""
    backend: Literal["auto", "torch", "paddle"] = "auto"
    """framework that writes it; auto takes the one installed, torch first"""
    max_seq_length: int | None = None
    """tokens of a sequence that are kept; without, what the model was fine-tuned with, or all it has positions for"""
    tokenizer: Literal["none", "in-graph"] = "none"
    """in-graph: the file takes strings and gives labels and probabilities; classifiers only"""
    pairs: bool = False
    """such a file takes pairs of texts"""


def export(arguments: OnnxArguments) -> Path:
    """Writes a model as ONNX: float32, standard operators, the same inputs and outputs whichever framework wrote it.

    Raises:
        InputError: the folder, its vocabulary or an option is wrong, or the file would not compute
            what the framework computes; no file is left then.
    """
    folder = find_model(arguments.model, "model")
    output = Path(arguments.output) if arguments.output else folder / "model.onnx"
    config = read_config(folder)
    tokenizer = WordPiece.from_model(folder)
    tokenizer.check_fits(config, folder)
    head = head_of(config)
    description = Description(
        head,
        _labels(config) if head in ("sequence_classification", "token_classification") else (),
        max_seq_length(arguments.max_seq_length, config, folder),
        tokenizer.lowercase,
        tuple(tokenizer.tokens),
    )
    if arguments.tokenizer == "in-graph" and head != "sequence_classification":
        raise InputError(f"--tokenizer in-graph: {folder} is no classifier; leave the tokenizer out")
    backend = backends.load(arguments.backend, "cpu")
    model = backend.model(config, read_weights(folder), head, trainable=False)
    output.parent.mkdir(parents=True, exist_ok=True)
    with atomically(output) as temporary:
        model.export_onnx(temporary)
        written = onnx.load(temporary)
        _tidy(written, ONNX_OUTPUTS[head])
        helper.set_model_props(written, description.metadata())
        onnx.save(written, temporary)
        checker.check_model(temporary, full_check=True)
        difference = _compare(OnnxModel(temporary), backend, model, tokenizer)
        if difference > TOLERANCE:
            raise InputError(f"{folder}: ONNX Runtime's outputs differ from {backend.name}'s by {difference:.1e}")
        if arguments.tokenizer == "in-graph":
            limit = description.max_seq_length
            written = with_tokenizer(written, tokenizer, description.labels, arguments.pairs, limit)
            onnx.save(written, temporary)
            checker.check_model(temporary, full_check=True)
            OnnxModel(temporary)
    say(
        f"{output}: {head or 'encoder'}, {output.stat().st_size / 2**20:.0f} MiB, as {backend.name} to {difference:.1e}"
    )
    return output


def head_of(config: dict[str, Any]) -> Head | None:
    """The head of a model folder, as its configuration's ``architectures`` name it; None for a bare encoder,
    and for masked language modelling, of which the encoder is what is wanted."""
    architecture = next(iter(config.get("architectures") or ()), "")
    found = (head for head in HEADS if architecture.endswith(CLASS_SUFFIXES[head]))
    head = next(found, None)
    return None if head == "masked_lm" else head


def _labels(config: dict[str, Any]) -> tuple[str, ...]:
    names = config.get("id2label") or {}
    return tuple(str(names[key]) for key in sorted(names, key=int))


def max_seq_length(given: int | None, config: dict[str, Any], folder: Path) -> int:
    """The option's length; without, what the folder's model was fine-tuned with, or all it has positions for."""
    positions = config.get("max_position_embeddings", 512)
    if given is None:
        record = folder / RECORD
        run = yaml.safe_load(record.read_text(encoding="utf-8")) if record.exists() else {}
        return int(run.get("max_seq_length", positions))
    if not 3 <= given <= positions:
        raise InputError(f"--max_seq_length {given}: must be from 3 to the model's {positions} positions")
    return given


def _tidy(model: onnx.ModelProto, outputs: Sequence[str]) -> None:
    """Brings what either framework wrote into one form: constants as initializers, outputs under our
    names, the same names of axes, nothing of the machine that wrote it."""
    graph = model.graph
    renamed = {output.name: name for output, name in zip(graph.output, outputs) if output.name != name}
    constants = {initializer.name for initializer in graph.initializer}
    nodes = []
    for node in graph.node:
        if node.op_type == "Constant":
            value = helper.get_node_attr_value(node, node.attribute[0].name)
            tensor = value if isinstance(value, TensorProto) else numpy_helper.from_array(np.asarray(value))
            tensor.name = node.output[0]
            graph.initializer.append(tensor)
            constants.add(tensor.name)
        elif node.op_type == "Identity" and node.input[0] in constants:  # weights that are equal
            renamed[node.output[0]] = node.input[0]
            constants.add(node.output[0])
        else:
            nodes.append(node)
    makers = {name: node for node in nodes for name in node.output}
    for node in nodes:
        node.doc_string = ""
        if node.op_type == "LayerNormalization" and makers[node.input[0]].op_type == "Add":
            # The same sum; but ONNX Runtime fuses Add with the norm into an operator four times as slow on CPUs.
            makers[node.input[0]].op_type = "Sum"
        for names in (node.input, node.output):
            names[:] = [_last(renamed, name) for name in names]
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)
    graph.name = "graph"
    model.doc_string = graph.doc_string = ""
    model.producer_name, model.producer_version = PRODUCER, f"{model.producer_name} {model.producer_version}".strip()
    for put in (*graph.input, *graph.output):
        put.name = renamed.get(put.name, put.name)
        axes = put.type.tensor_type.shape.dim
        for axis, name in zip(axes, ("batch", "length") if len(axes) == 3 or put.name in _BY_TOKEN else ("batch",)):
            axis.dim_param = name
    inferred = shape_inference.infer_shapes(model, strict_mode=True)
    model.CopyFrom(inferred)


_BY_TOKEN = (*ONNX_INPUTS, *ONNX_OUTPUTS["question_answering"])


def _last(names: dict[str, str], name: str) -> str:
    while name in names:
        name = names[name]
    return name


def _compare(exported: OnnxModel, backend: Backend, model: Model, tokenizer: WordPiece) -> float:
    """The largest difference of an ONNX file's outputs from the model's, on real text, at several batch
    sizes and lengths; relative to outputs that are larger than 1."""
    lines = [line for path in sorted(TEXTS.glob("*.txt")) for line in path.read_text(encoding="utf-8").split("\n")]
    limit = exported.description.max_seq_length
    worst = 0.0
    for count, length in ((1, 3), (1, limit), (3, 17), (8, 64)):
        some = ["".join(lines[i : i + 1 + length // 30]) for i in range(0, count * 20, 20)]
        batch = tokenizer.encode(some, min(length, limit)).batch
        with backend.no_grad():
            wanted = _outputs(backend, model, batch)
        kept = batch.attention_mask.astype(bool)
        for name, found, right in zip(ONNX_OUTPUTS[exported.description.head], exported.run(batch), wanted):
            found = found[kept] if name in exported.by_token else found
            worst = max(worst, float((np.abs(found - right) / np.maximum(1.0, np.abs(right))).max()))
    return worst


def _outputs(backend: Backend, model: Model, batch: Batch) -> list[np.ndarray]:
    """What the exported model should give: logits, or hidden states, of tokens alone where they are of tokens."""
    if head_of_model := getattr(model, "head", None):
        logits = backend.numpy(model.logits(batch))
        return [logits[:, 0], logits[:, 1]] if head_of_model == "question_answering" else [logits]
    return [backend.numpy(model.hidden_states(batch))]
