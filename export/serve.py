"""``python -m export serve``: an ONNX file behind HTTP.

It speaks the Open Inference Protocol, version 2 (`export.protocol`), and ``POST /predict``, JSON objects as
`export.examples` says; requests that come together are computed together (`export.batching`).
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import signal
import socket
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from backends.interface import ONNX_OUTPUTS, InputError
from export.batching import Batcher, QueueFull, Stopped
from export.examples import FIELDS, from_object
from export.model import TEXT_INPUTS, TEXT_OUTPUTS, OnnxModel, check_name
from export.protocol import DATATYPES, Inference, Refused, format_inference, parse_inference, parse_json, to_json
from training.log import say

VERSION = "1"
"""Of the one version of the model that there is."""
CONNECTIONS = 1024
"""That may be open; others are answered 503."""
MAX_LISTED = 1 << 18
"""Numbers of an answer that go out as a list."""
CHARACTER = "的"
"""That the model is warmed up with."""
PLATFORM = "onnxruntime_onnx"


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
    """Answers requests until SIGTERM or SIGINT, then what has come in.

    Raises:
        InputError: the file is not one of ours, or the address is not free.
    """
    model = OnnxModel(Path(arguments.model), arguments.threads)
    try:
        family = socket.AF_INET6 if ":" in arguments.host else socket.AF_INET
        listener = socket.create_server((arguments.host, arguments.port), family=family, backlog=CONNECTIONS)
    except OSError as error:
        raise InputError(
            f"--host {arguments.host} --port {arguments.port}: cannot listen there ({error.strerror}); give another"
        ) from error
    address = f"http://{f'[{arguments.host}]' if ':' in arguments.host else arguments.host}:{listener.getsockname()[1]}"
    if not _is_loopback(listener.getsockname()[0]):
        say(f"--host {arguments.host}: whoever can reach this machine can ask; there are no passwords")

    server = Server(model, arguments)
    server.warm_up()
    started = f"{model.path} is served as {server.name} at {address}"
    running = Stopping(configuration(server, lambda: say(started)), server)
    running.run(sockets=[listener])
    if not running.started:
        raise RuntimeError("the server did not start; uvicorn's words above say why")
    given_up = f"{server.given_up} requests were given up after {arguments.max_seconds:g} s"
    say(f"stopped; {given_up if server.given_up else 'all that had come in is answered'}")


def configuration(server: Server, started: Callable[[], None]) -> uvicorn.Config:
    """How uvicorn runs a server; `started` is called when it does."""
    return uvicorn.Config(
        server.app(started),
        http=_protocol(server.limits.max_seconds),
        lifespan="on",
        log_level="error",
        access_log=False,
        server_header=False,
        backlog=CONNECTIONS,
        limit_concurrency=CONNECTIONS,
    )


class Stopping(uvicorn.Server):
    """Ends in good order on SIGTERM and SIGINT, and gives up what takes too long then."""

    def __init__(self, config: uvicorn.Config, server: Server) -> None:
        super().__init__(config)
        self.server = server

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.handle_exit)
        yield

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        self.server.stop_soon()


def _protocol(seconds: float) -> type[HttpToolsProtocol]:
    """uvicorn's protocol; a connection that has not sent a whole request so long after it opened, or began one,
    is closed."""

    class Timed(HttpToolsProtocol):
        _deadline: asyncio.TimerHandle

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._expect()

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self._expect()

        def on_message_complete(self) -> None:
            self._deadline.cancel()
            super().on_message_complete()

        def connection_lost(self, exc: Exception | None) -> None:
            self._deadline.cancel()
            super().connection_lost(exc)

        def _expect(self) -> None:
            if hasattr(self, "_deadline"):
                self._deadline.cancel()
            # Later than the answer 408, which a body that is too slow gets
            self._deadline = self.loop.call_later(seconds + 1, self.transport.abort)

    return Timed


def _is_loopback(host: str) -> bool:
    return ipaddress.ip_address(host).is_loopback


class Server:
    """A model, its queue, and the answers to requests."""

    def __init__(self, model: OnnxModel, arguments: ServeArguments) -> None:
        self.model, self.limits = model, arguments
        self.name = arguments.name or model.path.stem
        check_name(self.name)
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
        waiting = Gauge("minilm_queue_texts", "Texts that wait.", registry=self.registry)
        waiting.set_function(lambda: self.batcher.waiting)

    @contextlib.asynccontextmanager
    async def _running(self) -> AsyncIterator[None]:
        """Makes the model's queue in the event loop that will use it; at the end the queue is emptied."""
        limits = self.limits
        self.batcher = Batcher(
            self._compute,
            limits.max_batch_size,
            limits.max_queue_size,
            limits.max_delay_ms / 1000,
            self.batches.observe,
        )
        self.ready = True
        yield
        await self.batcher.close()

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
            self._compute([from_object(model, texts, number) for number in range(2)])

    def stop_soon(self) -> None:
        """No more requests come; what is not answered in time is given up."""
        self.ready = False

        def give_up() -> None:
            self.given_up += self.batcher.give_up()

        self.batcher.loop.call_soon_threadsafe(self.batcher.loop.call_later, self.limits.max_seconds, give_up)

    def app(self, started: Callable[[], None]) -> Starlette:
        """The application, which tells when it has started."""

        @contextlib.asynccontextmanager
        async def lifespan(app: Starlette) -> AsyncIterator[None]:
            async with self._running():
                started()
                yield

        at = "/v2/models/{name}"
        routes = [
            self._route("/v2/health/live", "live", self._live),
            self._route("/v2/health/ready", "ready", self._ready),
            self._route("/v2", "metadata", self._metadata),
            self._route("/metrics", "metrics", self._metrics),
            self._route("/predict", "predict", self._predict, "POST"),
        ]
        for prefix in (at, at + "/versions/{version}"):
            routes += [
                self._route(prefix + "/ready", "ready", self._ready),
                self._route(prefix, "model", self._model),
                self._route(prefix + "/infer", "infer", self._infer, "POST"),
            ]

        async def refuse(request: Request, error: Exception) -> Response:
            assert isinstance(error, HTTPException)
            self.requests.labels("other", str(error.status_code)).inc()
            return _json({"error": f"{request.url.path[:200]}: {error.detail}"}, error.status_code)

        made = Starlette(routes=routes, lifespan=lifespan, exception_handlers={HTTPException: refuse})
        made.router.redirect_slashes = False
        return made

    def _route(
        self, path: str, endpoint: str, answer: Callable[[Request], Awaitable[Response]], method: str = "GET"
    ) -> Route:
        """A route whose refusals become answers of one form, and which is counted."""

        async def handle(request: Request) -> Response:
            start = time.perf_counter()
            try:
                self._check_name(request)
                response = await answer(request)
            except Refused as error:
                response = _json({"error": str(error)}, error.status)
                if error.status in (408, 413):  # the rest of the body is not wanted
                    response.headers["connection"] = "close"
            except Stopped:
                response = _json({"error": "the server is being stopped, and did not come to this in time"}, 503)
            except QueueFull:
                response = _json({"error": f"{self.limits.max_queue_size} texts wait already; come back later"}, 503)
                response.headers["retry-after"] = "1"
            except ClientDisconnect:
                response = Response(status_code=400)
            except Exception:
                traceback.print_exc()
                response = _json({"error": "the server failed; its log says why"}, 500)
            self.requests.labels(endpoint, str(response.status_code)).inc()
            self.seconds.labels(endpoint).observe(time.perf_counter() - start)
            return response

        return Route(path, handle, methods=[method])

    def _check_name(self, request: Request) -> None:
        name, version = request.path_params.get("name", self.name), request.path_params.get("version", VERSION)
        if name != self.name:
            raise Refused(404, f"{name[:60]}: no such model; there is {self.name}")
        if version != VERSION:
            raise Refused(404, f"{self.name}: no version {version[:60]}; there is {VERSION}")

    # What tells about the server

    async def _live(self, request: Request) -> Response:
        return _json({"live": True})

    async def _ready(self, request: Request) -> Response:
        named = {"name": self.name} if "name" in request.path_params else {}
        return _json({**named, "ready": self.ready}, 200 if self.ready else 503)

    async def _metadata(self, request: Request) -> Response:
        return _json({"name": "minilm-duet", "version": VERSION, "extensions": ["binary_tensor_data"]})

    async def _model(self, request: Request) -> Response:
        def told(puts: Sequence[Any]) -> list[dict[str, Any]]:
            return [
                {
                    "name": put.name,
                    "datatype": DATATYPES[put.type],
                    "shape": [size if isinstance(size, int) else -1 for size in put.shape],
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

    async def _metrics(self, request: Request) -> Response:
        return Response(generate_latest(self.registry), headers={"content-type": CONTENT_TYPE_LATEST})

    # What is asked of the model

    async def _predict(self, request: Request) -> Response:
        """An object, or a list of them, becomes an answer, or a list of them."""
        if not self.answers:
            raise Refused(404, f"/predict: {self.name} is an encoder without a head; ask /v2/models/{self.name}/infer")
        asked = parse_json(await self._body(request))
        objects = asked if isinstance(asked, list) else [asked]
        self._check_count(len(objects), "body")
        try:
            examples = [from_object(self.model, value, number) for number, value in enumerate(objects)]
        except ValueError as error:
            raise Refused(422, str(error)) from error
        for value in objects:
            self._check_length(["".join(part) for part in value.values() if part])
        windows = len(examples)
        if self.model.task.kind == "reading":
            windows = sum(self.model.windows(len(question.context)) for question in examples)
            self._check_count(windows, "contexts, in windows of the model's length")
        found = await self.batcher.submit(examples, windows)
        answers = [{key: value for key, value in answer.items() if key != "id"} for answer in found]
        return _json(answers if isinstance(asked, list) else answers[0])

    async def _infer(self, request: Request) -> Response:
        header = request.headers.get("inference-header-content-length")
        asked = parse_inference(await self._body(request), header, self.inputs, self.outputs)
        rows = self._string_rows(asked) if self.model.in_graph else self._token_rows(asked)
        found = await self.batcher.submit(rows)
        outputs = {name: np.array([row[i] for row in found]) for i, name in enumerate(self.outputs)}
        listed = sum(outputs[name].size for name, binary in asked.outputs.items() if not binary)
        if listed > MAX_LISTED:
            raise Refused(413, f"outputs: {listed} values, more than {MAX_LISTED} go out as binary data only")
        body, header_length = format_inference(self.name, VERSION, asked, outputs)
        if header_length is None:
            return Response(body, media_type="application/json")
        headers = {"inference-header-content-length": str(header_length)}
        return Response(body, media_type="application/octet-stream", headers=headers)

    def _string_rows(self, asked: Inference) -> list[Any]:
        columns = [asked.inputs[name] for name in TEXT_INPUTS if name in asked.inputs]
        if any(column.ndim != 1 or column.shape != columns[0].shape for column in columns):
            shapes = ", ".join(str(list(column.shape)) for column in columns)
            raise Refused(422, f"{', '.join(self.inputs)}: shapes {shapes}, expected [texts]")
        self._check_count(len(columns[0]), TEXT_INPUTS[0])
        for column in columns:
            self._check_length(column)
        return [Strings(*row) for row in zip(*columns)]

    def _token_rows(self, asked: Inference) -> list[Any]:
        ids, types, mask = (asked.inputs[name] for name in self.inputs)
        if ids.ndim != 2 or not ids.shape == types.shape == mask.shape:
            shapes = ", ".join(str(list(array.shape)) for array in (ids, types, mask))
            raise Refused(422, f"{', '.join(self.inputs)}: shapes {shapes}, expected [texts, tokens] for all")
        self._check_count(len(ids), "input_ids")
        limit = self.model.description.max_seq_length
        if not 1 <= ids.shape[1] <= limit:
            raise Refused(422, f"input_ids: {ids.shape[1]} tokens, the model takes from 1 to {limit}")
        for name, array, end in (
            ("input_ids", ids, self.vocabulary),
            ("token_type_ids", types, 2),
            ("attention_mask", mask, 2),
        ):
            if array.min() < 0 or array.max() >= end:
                raise Refused(422, f"{name}: values from 0 to {end - 1} are expected")
        return list(np.stack([ids, types, mask], axis=1))

    async def _body(self, request: Request) -> bytes:
        if request.headers.get("content-encoding", "identity") != "identity":
            raise Refused(415, "content-encoding: send the body as it is")
        limit = self.limits.max_body_bytes

        async def read() -> bytes:
            parts, size = [], 0
            async for part in request.stream():
                size += len(part)
                if size > limit:
                    raise Refused(413, f"body: longer than {limit} bytes")
                parts.append(part)
            return b"".join(parts)

        try:
            return await asyncio.wait_for(read(), self.limits.max_seconds)
        except asyncio.TimeoutError as error:
            raise Refused(408, f"body: not here after {self.limits.max_seconds:g} s") from error

    def _check_count(self, count: int, name: str) -> None:
        if not count:
            raise Refused(422, f"{name}: no text in it")
        if count > self.limits.max_texts:
            raise Refused(413, f"{name}: {count} texts, at most {self.limits.max_texts} may come together")

    def _check_length(self, texts: Iterable[str]) -> None:
        if any(len(text) > self.limits.max_characters for text in texts):
            raise Refused(413, f"a text has more than {self.limits.max_characters} characters")

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
                results = self.model.answers(some)
            for i, result in zip(which, results):
                found[i] = result
        return found


@dataclass(frozen=True)
class Strings:
    """Strings for a model that tokenizes."""

    text: str
    text_pair: str = ""


def _json(content: Any, status: int = 200) -> Response:
    return Response(to_json(content), status, media_type="application/json")
