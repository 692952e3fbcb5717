"""``python -m export serve``: an ONNX file behind HTTP.

It speaks the Open Inference Protocol, version 2 (`export.protocol`), and ``POST /predict``, JSON objects as
`export.examples` says; requests that come together are computed together (`export.batching`).
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import re
import resource
import shlex
import signal
import socket
import threading
import time
import traceback
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import uvloop
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from backends.files import InputError
from backends.interface import ONNX_OUTPUTS
from export.batching import Batcher, QueueFull, Stopped
from export.examples import FIELDS, from_object, sample
from export.http import CONNECTIONS, LINGER, Answer, Listener, Request
from export.model import TEXT_INPUTS, TEXT_OUTPUTS, OnnxModel, public_name
from export.protocol import DATATYPES, Inference, Refused, format_inference, parse_inference, parse_json, to_json
from programs.console import say

VERSION = "1"
"""Of the one version of the model that there is."""
MAX_LISTED = 1 << 18
"""Numbers of an answer that go out as a list."""
CHARACTER = "的"
"""That the model is warmed up with."""
PLATFORM = "onnxruntime_onnx"
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""There is nothing to read anew at SIGHUP."""


@dataclass
class ServeArguments:
    """An ONNX file behind HTTP: the Open Inference Protocol, and POST /predict."""

    model: str = field(kw_only=True)
    """the ONNX file"""
    name: str | None = None
    """the model's name in addresses; without, the file's"""
    host: str = "127.0.0.1"
    """address to listen at; others than loopback let everybody ask who can reach this machine"""
    port: int = 8000
    """port to listen at; 0 takes a free one"""
    threads: int = 0
    """that compute; 0 takes as many as there are cores"""
    max_batch_size: int = 64
    """texts that are computed together"""
    max_delay_ms: float = 1.0
    """time that a text waits for company when nothing is being computed"""
    max_queue_size: int = 1024
    """texts that may wait; requests beyond get status 503"""
    max_texts: int = 64
    """texts of a request"""
    max_characters: int = 10_000
    """of a text"""
    max_body_bytes: int = 1 << 20
    """of a request"""
    max_seconds: float = 30.0
    """for a request's body to arrive, and for answers to be finished when the server is stopped"""

    def __post_init__(self) -> None:
        for name in ("max_batch_size", "max_queue_size", "max_texts", "max_characters", "max_body_bytes"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} {getattr(self, name)}: must be at least 1")
        if not self.max_seconds > 0 or not self.max_delay_ms >= 0:
            raise InputError("--max_seconds must be greater than 0 and --max_delay_ms not negative")
        if self.max_queue_size < self.max_texts:
            raise InputError(f"--max_queue_size {self.max_queue_size}: must be at least --max_texts {self.max_texts}")
        if not 0 <= self.port < 1 << 16:
            raise InputError(f"--port {self.port}: must be from 0 to 65535")


def serve(arguments: ServeArguments) -> None:
    """Answers requests until SIGTERM, SIGINT or SIGHUP, then what has come in.

    Raises:
        InputError: the file is not one of ours, or the address is not free.
    """
    model = OnnxModel(Path(arguments.model), arguments.threads)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 3 * CONNECTIONS)), hard))
    with socket.socket(socket.AF_INET6 if ":" in arguments.host else socket.AF_INET) as listening:
        with _address_named(arguments):
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind((arguments.host, arguments.port))
        host, port = listening.getsockname()[:2]
        if not ipaddress.ip_address(host).is_loopback:
            say(f"--host {arguments.host}: whoever can reach this machine can ask; there are no passwords")
        server = Server(model, arguments)
        server.warm_up()
        address = f"http://{f'[{arguments.host}]' if ':' in arguments.host else arguments.host}:{port}"
        started = f"{model.path} is served as {server.name} at {address}"
        if server.answers:
            asked = json.dumps(sample(model), ensure_ascii=False)
            started += f"\nTo ask it, from another terminal:\n    curl -d {shlex.quote(asked)} {address}/predict"
        uvloop.run(server.run(listening, lambda: say(started)))
    given_up = f"{server.given_up} requests were given up after {arguments.max_seconds:g} s"
    say(f"stopped; {given_up if server.given_up else 'all that had come in is answered'}")


@contextlib.contextmanager
def _address_named(arguments: ServeArguments) -> Iterator[None]:
    """Errors of a socket become InputError."""
    try:
        yield
    except (OSError, TypeError) as error:  # a name that is none is a TypeError
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"--host {arguments.host} --port {arguments.port}: cannot listen there ({reason}); give another"
        ) from error


class Server:
    """A model, its queue, and the answers to requests."""

    def __init__(self, model: OnnxModel, arguments: ServeArguments) -> None:
        self.model, self.limits = model, arguments
        self.name = public_name(arguments.name, model.path)
        self.given_up = 0
        self.inputs = {put.name: DATATYPES[put.type] for put in model.session.get_inputs()}
        self.outputs = list(TEXT_OUTPUTS if model.in_graph else ONNX_OUTPUTS[model.description.head])
        self.answers = model.description.head is not None
        self.vocabulary = len(model.description.vocabulary)
        self.ready = False
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
        self.batches = Histogram(
            "minilm_batch_texts",
            "Texts that were computed together.",
            buckets=(1, 2, 4, 8, 16, 32, 64, 128),
            registry=self.registry,
        )
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
        waiting = Gauge("minilm_queue_texts", "Texts that wait.", registry=self.registry)
        waiting.set_function(lambda: self.batcher.waiting)

    async def run(self, listening: socket.socket, started: Callable[[], None]) -> None:
        """Answers the requests that come by a socket until it is stopped.

        Args:
            listening: a socket with an address.
            started: called when connections are taken.

        Raises:
            InputError: another listens there.
        """
        limits = self.limits
        self.loop, self._stopped = asyncio.get_running_loop(), asyncio.Event()
        self.batcher = Batcher(
            self._compute,
            limits.max_batch_size,
            limits.max_queue_size,
            limits.max_delay_ms / 1000,
            self.batches.observe,
        )
        if threading.current_thread() is threading.main_thread():
            for number in STOPS:
                if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup leaves SIGHUP
                    self.loop.add_signal_handler(number, self._stop_by, number)
        with _address_named(limits):
            listening.listen(CONNECTIONS)
        self.listener = Listener(listening, self._answer, self._refuse, limits.max_body_bytes, limits.max_seconds)
        self.ready = True
        started()
        await self._stopped.wait()
        self.ready = False
        self.loop.call_later(limits.max_seconds, self._give_up)
        self.loop.call_later(limits.max_seconds + LINGER, self.listener.abort)
        await self.listener.stop()
        self.batcher.close()

    def stop(self) -> None:
        """Ends `run` in good order; from any thread."""
        self.loop.call_soon_threadsafe(self._stopped.set)

    def _stop_by(self, number: int) -> None:
        if self._stopped.is_set() and number == signal.SIGINT:
            self._give_up()
            self.loop.call_later(0.5, self.listener.abort)
        elif not self._stopped.is_set():
            say(f"{signal.Signals(number).name}: answers what has come in, and stops")
            self._stopped.set()

    def _give_up(self) -> None:
        self.given_up += self.batcher.give_up()

    def warm_up(self) -> None:
        """Runs all that requests will need: the model alone and in parts, the tokenizer.

        Raises:
            InputError: the file cannot answer.
        """
        model = self.model
        if model.in_graph:
            self._compute([Strings(CHARACTER * n, "") for n in (1, 200)])
        else:
            self._compute([np.ones((3, n), np.int64) for n in (2, 2)])
        if self.answers:
            texts = dict.fromkeys(FIELDS[model.task.kind], CHARACTER)
            if model.task.kind == "labelling" or model.takes_pairs is False:
                texts = {"text": CHARACTER}
            self._compute([Asked(from_object(model, texts, number)) for number in range(2)])

    # From a request to its answer

    async def _answer(self, request: Request) -> Answer:
        """Refusals become answers of one form, and all are counted."""
        start = time.perf_counter()
        endpoint = "other"
        try:
            endpoint, answer = self._route(request)
            response = await answer(request)
        except Refused as error:
            response = _json({"error": str(error)}, error.status, error.headers)
        except Stopped:
            response = _json({"error": "the server is being stopped, and did not come to this in time"}, 503)
        except QueueFull:
            told = f"{self.limits.max_queue_size} texts wait already; come back later"
            response = _json({"error": told}, 503, {"retry-after": "1"})
        except Exception:
            traceback.print_exc()
            response = _json({"error": "the server failed; its log says why"}, 500)
        self.requests.labels(endpoint, str(response.status)).inc()
        self.seconds.labels(endpoint).observe(time.perf_counter() - start)
        return response

    def _refuse(self, status: int, message: str) -> Answer:
        """The answer to what is no request."""
        self.requests.labels("other", str(status)).inc()
        return _json({"error": message}, status)

    def _route(self, request: Request) -> tuple[str, Callable[[Request], Awaitable[Answer]]]:
        """The name of what is asked, and who answers it."""
        path, name, version = request.path, self.name, VERSION
        if found := re.fullmatch(r"/v2/models/([^/]+)(?:/versions/([^/]+))?(|/ready|/infer)", path):
            name, version, path = found[1], found[2] or VERSION, f"/v2/models/{{name}}{found[3]}"
        if path not in self.routes:
            raise Refused(404, f"{request.path[:200]}: Not Found")
        method, endpoint, answer = self.routes[path]
        if request.method not in (method, "HEAD" if method == "GET" else method):
            raise Refused(405, f"{request.path[:200]}: Method Not Allowed; there is {method}", allow=method)
        if name != self.name:
            raise Refused(404, f"{name[:60]}: no such model; there is {self.name}")
        if version != VERSION:
            raise Refused(404, f"{self.name}: no version {version[:60]}; there is {VERSION}")
        return endpoint, answer

    # What tells about the server

    async def _live(self, request: Request) -> Answer:
        return _json({"live": True})

    async def _ready(self, request: Request) -> Answer:
        return _json({"ready": self.ready}, 200 if self.ready else 503)

    async def _model_ready(self, request: Request) -> Answer:
        return _json({"name": self.name, "ready": self.ready}, 200 if self.ready else 503)

    async def _metadata(self, request: Request) -> Answer:
        return _json({"name": "minilm-duet", "version": VERSION, "extensions": ["binary_tensor_data"]})

    async def _model(self, request: Request) -> Answer:
        """Shapes are those of the repository for Triton, which gives a column to what has the batch's axis alone."""

        def told(puts: Sequence[Any]) -> list[dict[str, Any]]:
            return [
                {
                    "name": put.name,
                    "datatype": DATATYPES[put.type],
                    "shape": [-1, *([size if isinstance(size, int) else -1 for size in put.shape[1:]] or [1])],
                }
                for put in puts
            ]

        session = self.model.session
        return _json(
            {
                "name": self.name,
                "versions": [VERSION],
                "platform": PLATFORM,
                "inputs": told(session.get_inputs()),
                "outputs": told(session.get_outputs()),
            }
        )

    async def _metrics(self, request: Request) -> Answer:
        return Answer(200, generate_latest(self.registry), {"content-type": CONTENT_TYPE_LATEST})

    # What is asked of the model

    async def _predict(self, request: Request) -> Answer:
        """An object, or a list of them, becomes an answer, or a list of them."""
        if not self.answers:
            raise Refused(404, f"/predict: {self.name} is an encoder without a head; ask /v2/models/{self.name}/infer")
        asked = parse_json(_body(request))
        objects = asked if isinstance(asked, list) else [asked]
        self._check_count(len(objects), "body")
        single, kind = objects is not asked, self.model.task.kind
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
        rows = [Asked(*row) for row in zip(examples, counts)]
        found = await self.batcher.submit(rows, windows, (request.address, request.connection))
        return _json(found[0] if single else found)

    async def _infer(self, request: Request) -> Answer:
        header = request.headers.get("inference-header-content-length")
        asked = parse_inference(_body(request), header, self.inputs, self.outputs)
        rows = self._string_rows(asked) if self.model.in_graph else self._token_rows(asked)
        found = await self.batcher.submit(rows, client=(request.address, request.connection))
        outputs = {name: np.array([row[i] for row in found]) for i, name in enumerate(self.outputs)}
        first = next(iter(asked.inputs.values()))
        for put in self.model.session.get_outputs():
            if not rows:
                outputs[put.name] = _no_rows(put, first.shape[-1])
            if self.model.in_graph and first.ndim == 2 and outputs[put.name].ndim == 1:
                outputs[put.name] = outputs[put.name][:, None]
        listed = sum(outputs[name].size for name, binary in asked.outputs.items() if not binary)
        if listed > MAX_LISTED:
            raise Refused(413, f"outputs: {listed} values, more than {MAX_LISTED} go out as binary data only")
        body, header_length = format_inference(self.name, VERSION, asked, outputs)
        if header_length is None:
            return Answer(200, body, {"content-type": "application/json"})
        return Answer(
            200,
            body,
            {"content-type": "application/octet-stream", "inference-header-content-length": str(header_length)},
        )

    def _string_rows(self, asked: Inference) -> list[Any]:
        columns = [asked.inputs[name] for name in TEXT_INPUTS if name in asked.inputs]
        if any(column.shape != columns[0].shape for column in columns):
            shapes = ", ".join(str(list(column.shape)) for column in columns)
            raise Refused(422, f"{', '.join(self.inputs)}: shapes {shapes}, expected one for all")
        self._check_count(len(columns[0]), TEXT_INPUTS[0])
        for column in columns:
            self._check_length(column.ravel())
        return [Strings(*row) for row in zip(*(column.ravel() for column in columns))]

    def _token_rows(self, asked: Inference) -> list[Any]:
        ids, types, mask = (asked.inputs[name] for name in self.inputs)
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
        if count > self.limits.max_texts:
            raise Refused(413, f"{name}: {count} texts, at most {self.limits.max_texts} may come together")

    def _check_length(self, texts: Iterable[str | Sequence[str]]) -> None:
        limit = self.limits.max_characters
        if any(len(text) > limit or len("".join(text)) > limit for text in texts):
            raise Refused(413, f"a text has more than {limit} characters")

    # In the model's thread

    def _compute(self, rows: list[Any]) -> list[Any]:
        """Results of rows of any sort: examples (answers), strings and tokens (outputs)."""
        found: list[Any] = [None] * len(rows)
        kinds: dict[type, list[int]] = {}
        for i, row in enumerate(rows):
            kinds.setdefault(type(row), []).append(i)
        for kind, which in kinds.items():
            some = [rows[i] for i in which]
            results: Sequence[Any]
            if kind is np.ndarray:
                results = self.model.run_rows(some)
            elif kind is Strings:
                pairs = [row.text_pair for row in some] if self.model.takes_pairs else None
                results = list(zip(*self.model.classify([row.text for row in some], pairs)))
            else:
                answers = self.model.answers([row.example for row in some], max(row.top_k for row in some))
                results = [_shortened(answer, row.top_k) for answer, row in zip(answers, some)]
            for i, result in zip(which, results):
                found[i] = result
        return found


@dataclass(frozen=True)
class Strings:
    """Strings for a model that tokenizes."""

    text: str
    text_pair: str = ""


@dataclass(frozen=True)
class Asked:
    """An example, and how many answers are wanted; 0 if nothing is said."""

    example: Any
    top_k: int = 0


def _top_k(value: Any, kind: str) -> int:
    """Takes ``top_k`` out of what is asked; 0 if it is not there.

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


def _shortened(answer: dict[str, Any], top_k: int) -> dict[str, Any]:
    """An answer of the model as it goes out, with so many of the best."""
    answer = {key: value for key, value in answer.items() if key != "id" and (top_k or key != "top_k")}
    return {key: value[:top_k] if top_k and key in ("top_k", "n_best") else value for key, value in answer.items()}


def _no_rows(put: Any, length: int) -> np.ndarray:
    """An output of the graph for no texts, of so many tokens each."""
    sizes = [size if isinstance(size, int) else length for size in put.shape[1:]]
    return np.zeros((0, *sizes), object if DATATYPES[put.type] == "BYTES" else np.float32)


def _body(request: Request) -> bytes:
    if request.headers.get("content-encoding", "identity") != "identity":
        raise Refused(415, "content-encoding: send the body as it is")
    return request.take_body()


def _json(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Answer:
    return Answer(status, to_json(content), {"content-type": "application/json", **(headers or {})})
