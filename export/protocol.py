"""Requests and answers of the Open Inference Protocol, version 2, which KServe, Triton and others speak,
with its extension for binary tensors."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import TensorProto

DATATYPES: Mapping[int, str] = {TensorProto.INT64: "INT64", TensorProto.FLOAT: "FP32", TensorProto.STRING: "BYTES"}
"""ONNX's types -> the protocol's."""
MAX_ID = 1024
"""Characters of a request's id."""
SHAPES = {"INT64": "[texts, tokens]", "BYTES": "[texts] or [texts, 1]"}
"""Shapes of the models' inputs, by datatype."""


class Refused(Exception):
    """A request is not answered; with the HTTP status that says so, and headers."""

    def __init__(self, status: int, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers


@dataclass(frozen=True)
class Inference:
    """A request for inference."""

    id: str | None
    inputs: Mapping[str, np.ndarray]
    """int64 [texts, tokens], or objects that are strings, [texts] or, as Triton has it, [texts, 1]."""
    outputs: Mapping[str, bool]
    """Names that are wanted -> whether as binary data."""


def parse_json(body: bytes) -> Any:
    """Returns the content of a body; raises Refused unless it is JSON in UTF-8."""
    try:
        return json.loads(body.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise Refused(400, f"body: not UTF-8 at byte {error.start}") from error
    except RecursionError as error:
        raise Refused(400, "body: JSON nested too deep") from error
    except ValueError as error:
        raise Refused(400, f"body: not JSON ({error})") from error


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def parse_inference(
    body: bytes, header_length: str | None, wanted: Mapping[str, str], outputs: Sequence[str]
) -> Inference:
    """Reads a request for inference from a body.

    Args:
        header_length: what the header Inference-Header-Content-Length says: how many bytes are
            JSON, binary tensors being behind them.
        wanted: the model's inputs -> their datatypes.
        outputs: the model's outputs.

    Raises:
        Refused: it is not the protocol's (400), or its tensors are not the model's (422).
    """
    end = len(body)
    if header_length is not None:
        if not (header_length.isascii() and header_length.isdigit() and len(header_length) < 16):
            header_length = str(end + 1)
        if int(header_length) > end:
            raise Refused(400, f"Inference-Header-Content-Length: must be a number up to the body's {len(body)} bytes")
        end = int(header_length)
    request, binary = parse_json(body[:end]), memoryview(body)[end:]
    if not isinstance(request, dict) or not isinstance(request.get("inputs"), list):
        raise Refused(400, "inputs: missing; expected an object with a list of inputs")
    identity = request.get("id")
    if not isinstance(identity, str | None):
        raise Refused(400, "id: expected a string")
    if identity and len(identity) > MAX_ID:
        raise Refused(400, f"id: longer than {MAX_ID} characters")
    arrays: dict[str, np.ndarray] = {}
    for tensor in request["inputs"]:
        name = tensor.get("name") if isinstance(tensor, dict) else None
        if not isinstance(name, str):
            raise Refused(400, "inputs: expected objects with name, datatype, shape and data")
        if name not in wanted or name in arrays:
            fault = "given twice" if name in arrays else f"unknown; the model takes {', '.join(wanted)}"
            raise Refused(422, f"{_short(name)}: {fault}")
        arrays[name], binary = _array(name, tensor, wanted[name], binary)
    if len(binary):
        raise Refused(400, f"body: {len(binary)} bytes behind the binary tensors; binary_data_size says less")
    if missing := [name for name in wanted if name not in arrays]:
        raise Refused(422, f"{missing[0]}: missing; the model takes {', '.join(wanted)}")
    return Inference(identity, arrays, _outputs(request, outputs))


def _array(name: str, tensor: Mapping[str, Any], datatype: str, binary: memoryview) -> tuple[np.ndarray, memoryview]:
    """Returns a tensor, and what binary data is left."""
    shape = tensor.get("shape")
    if tensor.get("datatype") != datatype:
        raise Refused(422, f"{name}: datatype {_short(tensor.get('datatype'))}, expected {datatype}")
    if not isinstance(shape, list) or not all(map(_is_size, shape)) or not _fits(shape, datatype):
        raise Refused(422, f"{name}: shape {_short(shape)}, expected {SHAPES[datatype]}")
    size = _parameters(tensor, name).get("binary_data_size")
    if size is not None:
        if type(size) is not int or not 0 <= size <= len(binary) or "data" in tensor:
            raise Refused(400, f"{name}: binary_data_size {_short(size)}, but {len(binary)} bytes are there")
        flat = _from_binary(name, binary[:size], datatype)
        binary = binary[size:]
    else:
        flat = _from_list(name, tensor.get("data"), datatype)
    count = 1
    for side in shape:
        count *= side
    if count != len(flat):
        raise Refused(422, f"{name}: shape {_short(shape)} has room for {count} values, {len(flat)} are there")
    return flat.reshape(shape), binary


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 31


def _fits(shape: list[int], datatype: str) -> bool:
    return len(shape) == 2 if datatype == "INT64" else shape[1:] in ([], [1]) and len(shape) > 0


def _from_binary(name: str, data: memoryview, datatype: str) -> np.ndarray:
    if datatype == "INT64":
        if len(data) % 8:
            raise Refused(422, f"{name}: {len(data)} bytes are no whole number of INT64")
        return np.frombuffer(data, "<i8").astype(np.int64)
    texts = []
    while len(data):
        length = int.from_bytes(data[:4], "little")
        if len(data) < 4 + length:
            raise Refused(422, f"{name}: a string of {length} bytes is cut short")
        texts.append(bytes(data[4 : 4 + length]))
        data = data[4 + length :]
    try:
        return np.array([text.decode("utf-8") for text in texts], object)
    except UnicodeDecodeError as error:
        raise Refused(422, f"{name}: not UTF-8 at byte {error.start} of a string") from error


def _from_list(name: str, data: Any, datatype: str) -> np.ndarray:
    """Returns the values of a list, perhaps of lists."""
    if not isinstance(data, list):
        raise Refused(422, f"{name}: data missing; expected a list")
    while data and isinstance(data[0], list):
        if not all(isinstance(inner, list) for inner in data):
            raise Refused(422, f"{name}: data of lists and values mixed")
        data = [value for inner in data for value in inner]
    if datatype == "INT64":
        if not all(type(value) is int and -(1 << 63) <= value < 1 << 63 for value in data):
            raise Refused(422, f"{name}: expected whole numbers")
        return np.array(data, np.int64)
    if not all(isinstance(value, str) for value in data):
        raise Refused(422, f"{name}: expected strings")
    try:
        "".join(data).encode()
    except UnicodeEncodeError as error:
        raise Refused(422, f"{name}: holds half a surrogate pair, which is no text") from error
    return np.array([*data, None], object)[:-1]


def _outputs(request: Mapping[str, Any], names: Sequence[str]) -> dict[str, bool]:
    """Returns the outputs that a request wants, of those that the model has, each with whether as binary data."""
    all_binary = _parameters(request, "request").get("binary_data_output") is True
    outputs = request.get("outputs")
    if outputs is None:
        return dict.fromkeys(names, all_binary)
    if not isinstance(outputs, list) or not all(isinstance(output, dict) for output in outputs):
        raise Refused(400, "outputs: expected a list of objects with name")
    wanted = {}
    for output in outputs:
        if output.get("name") not in names:
            raise Refused(422, f"outputs: {_short(output.get('name'))} unknown; there are {', '.join(names)}")
        wanted[output["name"]] = _parameters(output, "outputs").get("binary_data", all_binary) is True
    return wanted or dict.fromkeys(names, all_binary)


def _parameters(holder: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    parameters = holder.get("parameters", {})
    if not isinstance(parameters, dict):
        raise Refused(400, f"{name}: parameters: expected an object")
    return parameters


def _short(value: Any) -> str:
    return reprlib.repr(value)[:60]


def to_json(content: Any) -> bytes:
    """Returns JSON in UTF-8; what is no text, such as half a surrogate pair, stays escaped."""
    return json.dumps(content, ensure_ascii=False).encode("utf-8", "backslashreplace")


def format_inference(
    model: str, version: str, request: Inference, outputs: Mapping[str, np.ndarray]
) -> tuple[bytes, int | None]:
    """Returns the body of an answer, and how many bytes of it are JSON if binary tensors follow."""
    tensors, binary = [], []
    for name, as_binary in request.outputs.items():
        array = outputs[name]
        tensor: dict[str, Any] = {
            "name": name,
            "datatype": "FP32" if array.dtype == np.float32 else "BYTES",
            "shape": list(array.shape),
        }
        if not as_binary:
            tensor["data"] = array.ravel().tolist()
        else:
            if array.dtype == np.float32:
                data = array.astype("<f4").tobytes()
            else:
                texts = [text.encode() for text in array.ravel()]
                data = b"".join(len(text).to_bytes(4, "little") + text for text in texts)
            tensor["parameters"] = {"binary_data_size": len(data)}
            binary.append(data)
        tensors.append(tensor)
    answer: dict[str, Any] = {"model_name": model, "model_version": version, "outputs": tensors}
    if request.id is not None:
        answer["id"] = request.id
    head = to_json(answer)
    return head + b"".join(binary), len(head) if binary else None
