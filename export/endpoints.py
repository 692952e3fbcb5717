"""The server's endpoints: requests become rows of the queue, and results become answers.

They speak the Open Inference Protocol, version 2 (`export.protocol`), and ``POST /predict``, JSON objects as
`export.examples` says.
"""

from __future__ import annotations

import re
import time
import traceback
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from export.admission import Put
from export.batching import Batcher, QueueFull, Stopped
from export.examples import from_object
from export.http import Answer, Request
from export.model import TEXT_INPUTS, OnnxModel
from export.protocol import DATATYPES, Inference, Refused, format_inference, parse_inference, parse_json, to_json
from export.rows import ExampleRow, StringRow

VERSION = "1"
"""Version of the model; there is one."""
MAX_LISTED = 1 << 18
"""Numbers of an answer that go out as a list."""


class Endpoints:
    """Endpoints of a server: about itself, and by its model.

    Args:
        name: the model's, in addresses.
        batcher: computes `export.rows`.
        max_texts: of a request.
        max_characters: of a text.
    """

    def __init__(self, model: OnnxModel, name: str, batcher: Batcher, max_texts: int, max_characters: int) -> None:
        self.model, self.name, self.batcher = model, name, batcher
        self.max_texts, self.max_characters = max_texts, max_characters
        self.inputs = {name: DATATYPES[put.type] for name, put in model.inputs.items()}
        self.outputs = list(model.outputs)
        self.vocabulary = len(model.description.vocabulary)
        self.ready = True
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "minilm_requests", "Requests, by endpoint and HTTP status.", ["endpoint", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "minilm_request_seconds",
            "Time from a request's arrival to its answer.",
            ["endpoint"],
            buckets=(0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10),
            registry=self.registry,
        )
        batches = Histogram(
            "minilm_batch_texts",
            "Texts that were computed together.",
            buckets=(1, 2, 4, 8, 16, 32, 64, 128),
            registry=self.registry,
        )
        batcher.watch = batches.observe
        waiting = Gauge("minilm_queue_texts", "Texts that wait.", registry=self.registry)
        waiting.set_function(lambda: batcher.waiting)
        self.routes: dict[str, tuple[str, str, Callable[[Request], Awaitable[Answer]]]] = {
            "/v2/health/live": ("GET", "live", self._live),
            "/v2/health/ready": ("GET", "ready", self._ready),
            "/v2/models/{name}/ready": ("GET", "ready", self._model_ready),
            "/v2/models/{name}/infer": ("POST", "infer", self._infer),
            "/v2/models/{name}": ("GET", "model", self._model),
            "/v2": ("GET", "metadata", self._metadata),
            "/metrics": ("GET", "metrics", self._metrics),
            "/predict": ("POST", "predict", self._predict),
        }

    async def answer(self, request: Request) -> Answer:
        """Answers a request. Refusals become answers of one form, and all are counted."""
        start = time.perf_counter()
        endpoint = "other"
        try:
            endpoint, handle = self._route(request)
            answer = await handle(request)
        except Refused as error:
            answer = _json({"error": str(error)}, error.status, error.headers)
        except Stopped:
            answer = _json({"error": "the server is being stopped, and did not come to this in time"}, 503)
        except QueueFull:
            message = f"{self.batcher.queue} texts wait already; come back later"
            answer = _json({"error": message}, 503, {"retry-after": "1"})
        except Exception:
            traceback.print_exc()
            answer = _json({"error": "the server failed; its log says why"}, 500)
        self.requests.labels(endpoint, str(answer.status)).inc()
        self.seconds.labels(endpoint).observe(time.perf_counter() - start)
        return answer

    def refuse(self, status: int, message: str) -> Answer:
        """Answers what is no request."""
        self.requests.labels("other", str(status)).inc()
        return _json({"error": message}, status)

    def _route(self, request: Request) -> tuple[str, Callable[[Request], Awaitable[Answer]]]:
        """Returns the name of a request's endpoint, and the function that answers it."""
        path, name, version = request.path, self.name, VERSION
        if match := re.fullmatch(r"/v2/models/([^/]+)(?:/versions/([^/]+))?(|/ready|/infer)", path):
            name, version, path = match[1], match[2] or VERSION, f"/v2/models/{{name}}{match[3]}"
        if path not in self.routes:
            raise Refused(404, f"{request.path[:200]}: Not Found")
        method, endpoint, handle = self.routes[path]
        if request.method not in (method, "HEAD" if method == "GET" else method):
            raise Refused(405, f"{request.path[:200]}: Method Not Allowed; there is {method}", allow=method)
        if name != self.name:
            raise Refused(404, f"{name[:60]}: no such model; there is {self.name}")
        if version != VERSION:
            raise Refused(404, f"{self.name}: no version {version[:60]}; there is {VERSION}")
        return endpoint, handle

    # About the server

    async def _live(self, request: Request) -> Answer:
        return _json({"live": True})

    async def _ready(self, request: Request) -> Answer:
        return _json({"ready": self.ready}, 200 if self.ready else 503)

    async def _model_ready(self, request: Request) -> Answer:
        return _json({"name": self.name, "ready": self.ready}, 200 if self.ready else 503)

    async def _metadata(self, request: Request) -> Answer:
        return _json({"name": "minilm-duet", "version": VERSION, "extensions": ["binary_tensor_data"]})

    async def _model(self, request: Request) -> Answer:
        return _json(model_metadata(self.model, self.name))

    async def _metrics(self, request: Request) -> Answer:
        return Answer(200, generate_latest(self.registry), {"content-type": CONTENT_TYPE_LATEST})

    # By the model

    async def _predict(self, request: Request) -> Answer:
        """Answers an object, or a list of them, by an answer, or a list of them."""
        if self.model.description.head is None:
            raise Refused(404, f"/predict: {self.name} is an encoder without a head; ask /v2/models/{self.name}/infer")
        content = parse_json(_body(request))
        objects = content if isinstance(content, list) else [content]
        self._check_count(len(objects), "body")
        single, kind = objects is not content, self.model.task.kind
        try:
            counts = [_top_k(value, kind) for value in objects]
            examples = [from_object(self.model, value, number) for number, value in enumerate(objects)]
        except ValueError as error:
            raise Refused(422, str(error)) from error
        for value in objects:
            self._check_length(filter(None, value.values()))
        windows = [1] * len(examples)
        if kind == "reading":
            windows = [self.model.windows(len(question.context)) for question in examples]
            self._check_count(sum(windows), "contexts, in windows of the model's length")
        rows = [ExampleRow(*row) for row in zip(examples, counts)]
        answers = await self.batcher.submit(rows, windows, (request.address, request.connection))
        return _json(answers[0] if single else answers)

    async def _infer(self, request: Request) -> Answer:
        header = request.headers.get("inference-header-content-length")
        inference = parse_inference(_body(request), header, self.inputs, self.outputs)
        rows = self._string_rows(inference) if self.model.in_graph else self._token_rows(inference)
        results = await self.batcher.submit(rows, client=(request.address, request.connection))
        outputs = {name: np.array([result[i] for result in results]) for i, name in enumerate(self.outputs)}
        first = next(iter(inference.inputs.values()))
        for name, put in self.model.outputs.items():
            if not rows:
                outputs[name] = _no_rows(put, first.shape[-1])
            if self.model.in_graph and first.ndim == 2 and outputs[name].ndim == 1:
                outputs[name] = outputs[name][:, None]
        listed = sum(outputs[name].size for name, binary in inference.outputs.items() if not binary)
        if listed > MAX_LISTED:
            raise Refused(413, f"outputs: {listed} values, more than {MAX_LISTED} go out as binary data only")
        body, header_length = format_inference(self.name, VERSION, inference, outputs)
        if header_length is None:
            return Answer(200, body, {"content-type": "application/json"})
        return Answer(
            200,
            body,
            {"content-type": "application/octet-stream", "inference-header-content-length": str(header_length)},
        )

    def _string_rows(self, inference: Inference) -> list[Any]:
        columns = [inference.inputs[name] for name in TEXT_INPUTS if name in inference.inputs]
        if any(column.shape != columns[0].shape for column in columns):
            shapes = ", ".join(str(list(column.shape)) for column in columns)
            raise Refused(422, f"{', '.join(self.inputs)}: shapes {shapes}, expected one for all")
        self._check_count(len(columns[0]), TEXT_INPUTS[0])
        for column in columns:
            self._check_length(column.ravel())
        return [StringRow(*row) for row in zip(*(column.ravel() for column in columns))]

    def _token_rows(self, inference: Inference) -> list[Any]:
        ids, types, mask = (inference.inputs[name] for name in self.inputs)
        if not ids.shape == types.shape == mask.shape:
            shapes = ", ".join(str(list(array.shape)) for array in (ids, types, mask))
            raise Refused(422, f"{', '.join(self.inputs)}: shapes {shapes}, expected [texts, tokens] for all")
        self._check_count(len(ids), "input_ids")
        limit = self.model.description.max_seq_length
        if not min(1, len(ids)) <= ids.shape[1] <= limit:
            raise Refused(422, f"input_ids: {ids.shape[1]} tokens, the model takes from 1 to {limit}")
        for name, array, end in (
            ("input_ids", ids, self.vocabulary),
            ("token_type_ids", types, self.model.token_types),
            ("attention_mask", mask, 2),
        ):
            if array.size and (array.min() < 0 or array.max() >= end):
                raise Refused(422, f"{name}: values from 0 to {end - 1} are expected")
        return list(np.stack([ids, types, mask], axis=1))

    def _check_count(self, count: int, name: str) -> None:
        if count > self.max_texts:
            raise Refused(413, f"{name}: {count} texts, at most {self.max_texts} may come together")

    def _check_length(self, texts: Iterable[str | Sequence[str]]) -> None:
        limit = self.max_characters
        if any(len(text) > limit or len("".join(text)) > limit for text in texts):
            raise Refused(413, f"a text has more than {limit} characters")


def model_metadata(model: OnnxModel, name: str) -> dict[str, Any]:
    """Returns the protocol's metadata of a model. Shapes are those of the repository for Triton, which gives a column
    to what has the batch's axis alone."""

    def described(puts: Mapping[str, Put]) -> list[dict[str, Any]]:
        return [
            {"name": name, "datatype": DATATYPES[put.type], "shape": [-1, *(put.shape[1:] or [1])]}
            for name, put in puts.items()
        ]

    return {
        "name": name,
        "versions": [VERSION],
        "platform": f"{model.runtime.name}_onnx",
        "inputs": described(model.inputs),
        "outputs": described(model.outputs),
    }


def _top_k(value: Any, kind: str) -> int:
    """Takes ``top_k`` out of an object; returns 0 if it holds none.

    Raises:
        ValueError: it is no number, or the task has no best answers.
    """
    if not isinstance(value, dict) or "top_k" not in value:
        return 0
    count = value.pop("top_k")
    if kind == "labelling":
        raise ValueError("top_k: unknown; each token has one tag")
    if type(count) is not int or count < 1:
        raise ValueError("top_k: expected a whole number from 1")
    return count


def _no_rows(put: Put, length: int) -> np.ndarray:
    """Returns an output of the graph for no texts, of `length` tokens each."""
    sizes = [length if size < 0 else size for size in put.shape[1:]]
    return np.zeros((0, *sizes), object if DATATYPES[put.type] == "BYTES" else np.float32)


def _body(request: Request) -> bytes:
    if request.headers.get("content-encoding", "identity") != "identity":
        raise Refused(415, "content-encoding: send the body as it is")
    return request.take_body()


def _json(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Answer:
    return Answer(status, to_json(content), {"content-type": "application/json", **(headers or {})})
