"""``python -m export onnx``: a model folder becomes an ONNX file, which is checked before it is in place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from onnx import TensorProto, checker, helper, numpy_helper, shape_inference

import backends
from backends.files import InputError, atomically
from backends.interface import HEADS, ONNX_INPUTS, ONNX_OUTPUTS, Backend, Batch, Head, Model, Wanted, Weights
from backends.pretrained import CLASS_SUFFIXES
from export.model import Description, OnnxModel, check_output
from export.tokenizer_graph import with_tokenizer
from programs.console import say
from text.data import Example
from text.features import classification_features
from text.folder import ModelFolder
from text.tokenizer import WordPiece
from training.folder import RECORD, read_record

TEXTS = Path(__file__).parents[1] / "general_distill" / "demo"
"""Folder of real text, on which a file is compared with the framework."""
TOLERANCE = 1e-5
"""Difference of outputs that passes, absolute where they are below 1, relative above."""
PRODUCER = "MiniLM Duet"
LEAST_FOR_READING = 16
"""Tokens of a window at least: half of them for the question, and some for a context."""


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
    source = ModelFolder.find(arguments.model, "model")
    folder, config = source.path, source.config
    output = Path(arguments.output) if arguments.output else folder / "model.onnx"
    check_output(output)
    tokenizer, head, single = source.tokenizer, head_of(config, folder), source.shape.token_types < 2
    if single and (arguments.pairs or head == "question_answering"):
        raise InputError(f"{folder}: its type_vocab_size is 1, so it takes single texts, no pairs")
    if arguments.tokenizer == "in-graph" and head != "sequence_classification":
        raise InputError(f"--tokenizer in-graph: {folder} is no classifier; leave the tokenizer out")
    if arguments.pairs and arguments.tokenizer != "in-graph":
        raise InputError("--pairs: goes with --tokenizer in-graph; a file of tokens takes single texts and pairs alike")
    weights = source.weights()
    layer = "qa_outputs.weight" if head == "question_answering" else "classifier.weight"
    if head is not None and layer not in weights:
        raise InputError(f"{folder}: its architecture has a head, and {layer} is not among the weights; train it first")
    limit = max_seq_length(arguments.max_seq_length, source)
    if head == "question_answering" and limit < LEAST_FOR_READING:
        raise InputError(f"--max_seq_length {limit}: leaves no room for a context; give at least {LEAST_FOR_READING}")
    description = Description(
        head,
        _labels(source, weights) if head in ("sequence_classification", "token_classification") else (),
        limit,
        tokenizer.settings,
        tuple(tokenizer.tokens),
        pairs=source.takes_pairs if head == "sequence_classification" else None,
    )
    pairs = description.pairs_of_strings(arguments.pairs)
    backend = backends.load(arguments.backend, "cpu")
    model = backend.model(config, weights, head, trainable=False)
    output.parent.mkdir(parents=True, exist_ok=True)
    with atomically(output) as temporary:
        model.export_onnx(temporary)
        written = onnx.load(temporary)
        _tidy(written, ONNX_OUTPUTS[head])
        helper.set_model_props(written, description.metadata())
        onnx.save(written, temporary)
        checker.check_model(temporary, full_check=True)
        plain = OnnxModel(temporary)
        library, reference = _reference(backend, model, folder, weights)
        names = list(ONNX_OUTPUTS[head])
        if head is None and "pooler.dense.weight" not in weights:
            say(f"{folder}: has no pooler; pooler_output comes of random weights")
            names.remove("pooler_output")
        difference = _largest_difference(plain, reference, tokenizer, names)
        if not difference <= TOLERANCE:  # nor if it is no number
            raise InputError(f"{folder}: ONNX Runtime's outputs differ from those of {library} by {difference:.1e}")
        if arguments.tokenizer == "in-graph":
            written = with_tokenizer(written, tokenizer, description.labels, pairs, limit)
            onnx.save(written, temporary)
            checker.check_model(temporary, full_check=True)
            check_strings(OnnxModel(temporary), plain)
    say(
        f"{output}: {head or 'encoder'}, {output.stat().st_size / 2**20:.0f} MiB; its outputs differ from "
        f"those of {library} by at most {difference:.1e}"
    )
    return output


def head_of(config: Mapping[str, Any], folder: Path) -> Head | None:
    """Returns the head of a model folder, as its configuration's ``architectures`` name it; None for a bare encoder,
    and for pretraining's heads, of which the encoder is exported.

    Raises:
        InputError: another head.
    """
    named = config.get("architectures") or [""]
    architecture = named if isinstance(named, str) else str(named[0])
    for head in HEADS:
        if architecture.endswith(CLASS_SUFFIXES[head]):
            return None if head == "masked_lm" else head
    if not architecture or architecture.endswith(("Model", "ForPreTraining")):
        return None
    raise InputError(
        f"{folder / 'config.json'}: {architecture} is not exported; classifiers of sequences and of tokens, readers "
        "and encoders are"
    )


def _labels(source: ModelFolder, weights: Weights) -> tuple[str, ...]:
    """Returns the names of classes; where there are none, those that transformers gives."""
    count = len(weights["classifier.bias"]) if "classifier.bias" in weights else 0
    names = source.labels or tuple(f"LABEL_{i}" for i in range(count))
    if len(names) != count:
        raise InputError(f"{source.path}: its head has {count} classes, config.json's id2label has {len(names)}")
    return names


def max_seq_length(length: int | None, source: ModelFolder) -> int:
    """Returns the option's length; without, what the model was fine-tuned with, or all it has positions for."""
    positions = source.shape.positions
    record, name = source.path / RECORD, "--max_seq_length"
    if length is None:
        length, name = positions, f"{record}: max_seq_length"
        if record.exists():
            try:
                length = read_record(record).get("max_seq_length", positions)
            except ValueError as error:
                raise InputError(
                    f"{record}: not the arguments of a run ({error}); give --max_seq_length, or mend it"
                ) from error
    if type(length) is not int or not 3 <= length <= positions:
        raise InputError(f"{name} {length}: must be from 3 to the model's {positions} positions")
    return length


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
    _keep_axes(graph)
    _fold_scales(graph)
    _transpose_twice(graph)
    inferred = shape_inference.infer_shapes(model, strict_mode=True)
    model.CopyFrom(inferred)


def _keep_axes(graph: onnx.GraphProto) -> None:
    """Reshapes by constants where the first axes, batch and length, stay as they are: PyTorch's exporter has their
    sizes looked up by seven operators each time, which a short text alone feels."""
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    makers = {name: node for node in graph.node for name in node.output}

    def is_axis(name: str, axis: int) -> bool:
        """Whether `name` is a size looked up of this axis."""
        for kind in ("Unsqueeze", "Gather", "Shape"):
            node = makers.get(name)
            if node is None or node.op_type != kind or (kind == "Gather" and constants.get(node.input[1]) != axis):
                return False
            name = node.input[0]
        return True

    for node in graph.node:
        shape = makers.get(node.input[1]) if node.op_type == "Reshape" else None
        if shape is None or shape.op_type != "Concat":
            continue
        known = [constants[name] for name in shape.input if name in constants]
        kept = len(shape.input) - len(known)
        if kept > 0 and all(is_axis(name, axis) for axis, name in enumerate(shape.input[:kept])):
            sizes = numpy_helper.from_array(np.concatenate([np.zeros(kept, np.int64), *known]), shape.output[0])
            graph.initializer.append(sizes)
            shape.op_type = ""
    _drop_unused(graph)


def _drop_unused(graph: onnx.GraphProto) -> None:
    """Drops nodes and constants that nothing takes."""
    used = {put.name for put in graph.output}
    kept = []
    for node in reversed(graph.node):
        if node.op_type and used.intersection(node.output):
            kept.append(node)
            used.update(node.input)
    del graph.node[:]
    graph.node.extend(reversed(kept))
    constants = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(constants)


def _fold_scales(graph: onnx.GraphProto) -> None:
    """Multiplies weights and biases by numbers that their sums are multiplied by: queries', by 1/sqrt(head size)."""
    constants = {tensor.name: tensor for tensor in graph.initializer}
    makers = {name: node for node in graph.node for name in node.output}
    uses = Counter(name for node in graph.node for name in node.input)
    for node in [node for node in graph.node if node.op_type == "Mul"]:
        scale = next((name for name in node.input if name in constants and np.prod(constants[name].dims) == 1), "")
        adding = makers.get(next((name for name in node.input if name != scale), ""))
        if not scale or adding is None or adding.op_type != "Add" or uses[adding.output[0]] > 1:
            continue
        product = next((makers[name] for name in adding.input if name in makers), None)
        if product is None or product.op_type != "MatMul" or uses[product.output[0]] > 1:
            continue
        bias = next((name for name in adding.input if name in constants), "")
        if not bias or product.input[1] not in constants:
            continue
        factor = numpy_helper.to_array(constants[scale]).reshape(())
        for user, name in ((adding, bias), (product, product.input[1])):
            scaled = numpy_helper.from_array(numpy_helper.to_array(constants[name]) * factor, f"{name}_of_{user.name}")
            graph.initializer.append(scaled)
            user.input[:] = [scaled.name if put == name else put for put in user.input]
        adding.output[:] = node.output
        graph.node.remove(node)
    _drop_unused(graph)


def _transpose_twice(graph: onnx.GraphProto) -> None:
    """Transposes keys [B, L, heads, d] to [B, heads, L, d], and this once more, where PyTorch's exporter made one
    transposition of both: the second is part of the product on either runtime, and the first ten times as fast."""
    nodes = []
    for node in graph.node:
        if node.op_type == "Transpose" and list(helper.get_node_attr_value(node, "perm")) == [0, 2, 3, 1]:
            by_head = f"{node.output[0]}_by_head"
            nodes.append(helper.make_node("Transpose", node.input, [by_head], name=by_head, perm=[0, 2, 1, 3]))
            node = helper.make_node("Transpose", [by_head], node.output, name=node.name, perm=[0, 1, 3, 2])
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)


_BY_TOKEN = (*ONNX_INPUTS, *ONNX_OUTPUTS["question_answering"])


def _last(names: dict[str, str], name: str) -> str:
    while name in names:
        name = names[name]
    return name


def _reference(
    backend: Backend, model: Model, folder: Path, weights: Weights
) -> tuple[str, Callable[[Batch], list[np.ndarray]]]:
    """Returns the name and the function of what outputs are compared with: the library's own model of the folder,
    which may heed a setting that `model` and its export do not; or `model`, if the library does not load the folder."""
    try:
        return backend.library, backend.reference(folder, model.config["model_type"], weights, model.head)
    except Exception as error:  # the library's, which share no class
        reason = " ".join(str(error).split())[:150] or type(error).__name__
        say(f"{folder}: {backend.library} does not load it ({reason}); compared with what {backend.name} computes here")

    def outputs(batch: Batch) -> list[np.ndarray]:
        with backend.no_grad():
            return _outputs(backend, model, batch)

    return backend.name, outputs


def _largest_difference(
    exported: OnnxModel, reference: Callable[[Batch], list[np.ndarray]], tokenizer: WordPiece, names: Sequence[str]
) -> float:
    """Returns the largest difference of the named outputs of an ONNX file from the reference's, on real text, single
    and in pairs, at several batch sizes and lengths; relative to outputs above 1. NaN if there is one."""
    limit, outputs = exported.description.max_seq_length, ONNX_OUTPUTS[exported.description.head]
    differences = [0.0]
    for count, length in ((1, 3), (1, limit), (3, 17), (8, 64)):
        texts = real_texts(count, 1 + length // 30)
        examples = [
            Example(i, a, b if i % 2 and exported.may_take_pairs else None, None)
            for i, (a, b) in enumerate(zip(texts, texts[::-1]))
        ]
        batch = classification_features(tokenizer, examples, min(length, limit)).batch(np.arange(count))
        kept = batch.attention_mask.astype(bool)
        for name, values, wanted in zip(outputs, exported.run(batch), reference(batch), strict=True):
            if name not in names:
                continue
            if name in exported.by_token:
                values, wanted = values[kept], wanted[kept]
            differences.append(float((np.abs(values - wanted) / np.maximum(1.0, np.abs(wanted))).max()))
    return float(np.max(differences))


def real_texts(count: int, lines: int) -> list[str]:
    """Returns `count` texts, each of `lines` lines."""
    corpus = [line for path in sorted(TEXTS.glob("*.txt")) for line in path.read_text(encoding="utf-8").split("\n")]
    return ["".join(corpus[i : i + lines]) for i in range(0, count * 20, 20)]


def _outputs(backend: Backend, model: Model, batch: Batch) -> list[np.ndarray]:
    """Computes `ONNX_OUTPUTS` by the framework; those of tokens have zeros for padding."""

    def padded(values: np.ndarray) -> np.ndarray:
        kept = batch.attention_mask.astype(bool)
        spread = np.zeros((*kept.shape, *values.shape[1:]), values.dtype)
        spread[kept] = values
        return spread

    if model.head is not None:
        logits = backend.numpy(model.run(batch, Wanted(logits=True)).logits)
        if model.head == "sequence_classification":
            return [logits]
        return [padded(logits)] if model.head == "token_classification" else [*np.moveaxis(padded(logits), -1, 0)]
    last = len(model.shape.layers)
    states, weights = padded(backend.numpy(model.run(batch, Wanted(states=[last])).states[last])), model.weights()
    return [states, np.tanh(states[:, 0] @ weights["pooler.dense.weight"].T + weights["pooler.dense.bias"])]


def check_finite(model: OnnxModel) -> None:
    """Raises InputError if a file gives anything but finite numbers for real text."""
    batch = model.tokenizer.encode(real_texts(8, 2), model.description.max_seq_length).batch
    if not all(np.isfinite(output).all() for output in model.run(batch)):
        raise InputError(f"{model.path}: its answers to real text are not all finite; take another method")


def check_strings(inside: OnnxModel, plain: OnnxModel) -> None:
    """Raises InputError if a file with its tokenizer does not answer strings as the one without it does."""
    texts = ["", *real_texts(8, 2)]
    examples = [
        Example(i, a, b if inside.takes_pairs else None, None) for i, (a, b) in enumerate(zip(texts, texts[::-1]))
    ]
    for example in examples:  # each alone: the ranges of INT8 are a batch's
        [answer], [wanted] = inside.answers([example]), plain.answers([example])
        if not abs(answer["probability"] - wanted["probability"]) <= 1e-4:
            raise InputError(f"{inside.path}: with the tokenizer inside, {example.text[:20]!r} is answered differently")
