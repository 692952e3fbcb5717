"""Admission of ONNX files: those are opened that are made of what ``python -m export`` writes, whoever made them.

A file is read into memory once, and checked before a runtime sees it: ONNX Runtime would read other files that this one
names, run a loop for as long as it says, and load its own binary format. What remains is the arithmetic of the
operators below on shapes that follow from a request: a file can still be made to take much memory and time at
a request. Give a server of strangers' files a limit of memory.
"""

from __future__ import annotations

import os
import shlex
import stat
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
from onnx import AttributeProto, TensorProto, helper

from backends.files import InputError

_ARITHMETIC = """
    Add And ArgMax BitShift BitwiseAnd Cast Clip Compress Concat CumSum DequantizeLinear Div DynamicQuantizeLinear
    Equal Erf Expand Gather GatherND Gelu Gemm Greater GreaterOrEqual LayerNormalization LeakyRelu Less LessOrEqual
    Loop MatMul MatMulInteger Max Min Mish Mul NonZero Not Or Pow QuantizeLinear Range ReduceMax ReduceMean
    ReduceMin ReduceSum RegexFullMatch Relu Reshape ScatterElements ScatterND Shape Sigmoid Slice Softmax Softplus Split
    Sqrt Squeeze Sub Sum Tanh Transpose Unsqueeze Where
"""
OPERATORS: Mapping[str, Sequence[str]] = {
    "": _ARITHMETIC.split(),
    "ai.onnx.ml": ["LabelEncoder"],
    "com.microsoft": ["MatMulIntegerToFloat", "Tokenizer"],
}
"""Domain -> operators that the exporters of both frameworks, the quantizers and `export.tokenizer_graph` write."""
LARGEST = (1 << 31) - 1
"""Bytes of an ONNX file at most; protobuf sets the limit."""
TURNS = 128
"""Turns of a loop at most: a vocabulary's longest token is read in as many steps or fewer."""
_PLAIN_ATTRIBUTES = (
    *(AttributeProto.INT, AttributeProto.INTS, AttributeProto.FLOAT, AttributeProto.FLOATS),
    *(AttributeProto.STRING, AttributeProto.STRINGS),
)
_VALUES = ("float_data", "int32_data", "string_data", "int64_data", "double_data", "uint64_data")


class Put(NamedTuple):
    """An input or output, as the graph declares it."""

    type: int
    """A `TensorProto.DataType`."""
    shape: tuple[int, ...]
    """-1 for sizes that are a request's."""


class Admitted(NamedTuple):
    """A file that was checked."""

    content: bytes
    inputs: Mapping[str, Put]
    """By name, in their order; so the outputs."""
    outputs: Mapping[str, Put]
    operators: frozenset[str]
    metadata: Mapping[str, str]
    answers: tuple[str, ...]
    """Values of the output ``label``, in the order of classes; none without that output."""
    tables: Mapping[str, int]
    """Index into a table (the name of an input, or ``""`` for what the graph computes) -> the table's rows, the most
    of several."""


class _Refused(ValueError):
    """A file is not opened; the message says why."""


def admit(path: Path) -> Admitted:
    """Reads and checks an ONNX file.

    Raises:
        InputError: there is none, it is no ONNX, or it holds what ``python -m export`` does not write.
    """
    content = _read(path)
    try:
        model = onnx.ModelProto.FromString(content)
    except Exception as error:  # protobuf's
        raise InputError(f"{path}: not an ONNX model ({error})") from error
    try:
        return _checked(model, content)
    except _Refused as error:
        raise InputError(f"{path}: {error}; export the folder of the model with python -m export onnx") from error


def _read(path: Path) -> bytes:
    """Returns the bytes of a regular file; nothing else is waited for."""
    if path.is_dir():
        ready = path / "model.onnx"
        advice = f"python -m export onnx {shlex.quote(str(path))} makes one of it"
        if ready.is_file():
            advice = f"give {ready}"
        raise InputError(f"{path}: is a folder, an ONNX file is wanted; {advice}")
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; give a model that python -m export onnx wrote") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from error
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"{path}: is no regular file; give a model that python -m export onnx wrote")
        if status.st_size > LARGEST:
            raise InputError(f"{path}: {status.st_size} bytes; an ONNX file has at most {LARGEST}")
        return file.read(LARGEST)


def _checked(model: onnx.ModelProto, content: bytes) -> Admitted:
    graph = model.graph
    if not graph.node:
        raise _Refused("not an ONNX model: it has no operators")
    if model.functions or model.training_info:
        raise _Refused("defines functions or training of its own")
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    if len(metadata) < len(model.metadata_props):
        raise _Refused("its metadata holds a name twice")
    _check_tensors(graph)
    sizes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    for node in graph.node:
        _check_node(node)
        if node.op_type == "Loop":
            _check_loop(node, graph)
    inputs = {str(put.name): _put(put) for put in graph.input}  # protobuf gives bytes that are not UTF-8 as bytes
    _check_constants(graph.node, sizes.keys())
    answers: tuple[str, ...] = ()
    tables: dict[str, int] = {}
    for node in graph.node:
        if node.op_type == "Gather" and len(sizes.get(node.input[0], ())) == 2:
            key = node.input[1] if node.input[1] in inputs else ""
            tables[key] = max(tables.get(key, 0), sizes[node.input[0]][0])
        elif node.op_type == "LabelEncoder" and "label" in node.output:
            answers = tuple(value.decode("utf-8", "replace") for value in _strings(node, "values_strings"))
    outputs = {str(put.name): _put(put) for put in graph.output}
    operators = frozenset(node.op_type for node in graph.node)
    return Admitted(content, inputs, outputs, operators, metadata, answers, tables)


def _put(put: onnx.ValueInfoProto) -> Put:
    tensor = put.type.tensor_type
    sizes = (size.dim_value if size.HasField("dim_value") else -1 for size in tensor.shape.dim)
    return Put(tensor.elem_type, tuple(sizes))


def _strings(node: onnx.NodeProto, name: str) -> Sequence[bytes]:
    return next((attribute.strings for attribute in node.attribute if attribute.name == name), ())


def _check_tensors(graph: onnx.GraphProto) -> None:
    """Checks that a graph's tensors are in the file, as large as they say."""
    if graph.sparse_initializer or graph.quantization_annotation:
        raise _Refused("holds sparse tensors or annotations")
    if len({tensor.name for tensor in graph.initializer}) < len(graph.initializer):
        raise _Refused("holds two tensors of one name")  # of which ONNX Runtime takes the last
    for tensor in graph.initializer:
        if tensor.data_location != TensorProto.DEFAULT or tensor.external_data:
            raise _Refused(f"tensor {tensor.name[:60]!r}: its data are in another file")
        count = 1
        for side in tensor.dims:
            count *= side
        if tensor.HasField("raw_data"):
            try:
                stored = len(tensor.raw_data) / helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
            except (KeyError, TypeError) as error:
                raise _Refused(f"tensor {tensor.name[:60]!r}: of type {tensor.data_type}") from error
        else:
            stored = sum(len(getattr(tensor, name)) for name in _VALUES)
        if min(tensor.dims, default=1) < 0 or stored != count:
            raise _Refused(f"tensor {tensor.name[:60]!r}: has not the size that it says")


def _check_node(node: onnx.NodeProto) -> None:
    if node.op_type not in OPERATORS.get("" if node.domain == "ai.onnx" else node.domain, ()):
        raise _Refused(f"holds the operator {f'{node.domain} {node.op_type}'.strip()[:60]}")
    if node.op_type in ("Gather", "Loop") and len(node.input) < 2:
        raise _Refused(f"{node.op_type}: has {len(node.input)} inputs, at least 2 are expected")
    for attribute in node.attribute:
        body = node.op_type == "Loop" and attribute.type == AttributeProto.GRAPH
        if attribute.ref_attr_name or not (body or attribute.type in _PLAIN_ATTRIBUTES):
            raise _Refused(f"{node.op_type}: holds a tensor, a graph or a function as {attribute.name[:60]!r}")


def _check_loop(node: onnx.NodeProto, graph: onnx.GraphProto) -> None:
    """Checks that a loop turns a fixed number of times, and holds no loop."""
    turns = next((tensor for tensor in graph.initializer if tensor.name == node.input[0]), None)
    if turns is None or turns.data_type != TensorProto.INT64 or len(turns.raw_data) != 8:
        raise _Refused("holds a loop without a fixed number of turns")
    if not 0 <= int(np.frombuffer(turns.raw_data, "<i8")[0]) <= TURNS:
        raise _Refused(f"holds a loop of more than {TURNS} turns")
    for attribute in node.attribute:
        _check_tensors(attribute.g)
        for inner in attribute.g.node:
            _check_node(inner)
            if inner.op_type == "Loop":
                raise _Refused("holds a loop within a loop")


def _check_constants(nodes: Iterable[onnx.NodeProto], constants: Iterable[str]) -> None:
    """Checks that all results depend on inputs: ONNX Runtime computes others when it opens the file."""
    fixed = {"", *constants}
    for node in nodes:
        if node.op_type == "Loop":
            for attribute in node.attribute:
                _check_constants(attribute.g.node, {*fixed, *(tensor.name for tensor in attribute.g.initializer)})
        elif fixed.issuperset(node.input):
            if node.op_type != "DequantizeLinear":  # weights, no larger than they are
                raise _Refused(f"{node.op_type} {node.name[:60]!r}: computes a constant")
            fixed.update(node.output)
