"""``python -m export serve``: an ONNX file behind HTTP.

A listener (`export.http`) takes requests, `export.endpoints` answers them, and those that come together are computed
together (`export.batching`).
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import resource
import shlex
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import uvloop

from backends.files import InputError
from export.batching import Batcher
from export.endpoints import Endpoints
from export.examples import sample
from export.http import CONNECTIONS, LINGER, Listener
from export.model import OnnxModel, public_name
from export.rows import compute, warm_up
from export.runtime_choice import RuntimeChoice, open_model
from programs.console import say

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""Signals that stop the server; there is nothing to read anew at SIGHUP."""


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
    runtime: RuntimeChoice = "onnxruntime"
    """what computes; auto takes the fastest that is installed"""
    threads: int = 0
    """threads that compute; 0 takes as many as there are cores"""
    max_batch_size: int = 64
    """texts that are computed together"""
    max_delay_ms: float = 1.0
    """time that a text waits for company when nothing is being computed"""
    max_queue_size: int = 1024
    """texts that may wait; requests beyond get status 503"""
    max_texts: int = 64
    """texts of a request"""
    max_characters: int = 10_000
    """characters of a text at most"""
    max_body_bytes: int = 1 << 20
    """bytes of a request at most"""
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
    model = open_model(Path(arguments.model), arguments.threads, arguments.runtime)
    if model.description.quantized.startswith("dynamic"):
        say(f"{model.path}: is quantized dynamically: an answer depends on the texts that are computed with it")
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
        warm_up(model)
        address = f"http://{f'[{arguments.host}]' if ':' in arguments.host else arguments.host}:{port}"
        started = f"{model.path} is served as {server.name} at {address}"
        if model.description.head is not None:
            request = json.dumps(sample(model), ensure_ascii=False)
            started += f"\nTo ask it, from another terminal:\n    curl -d {shlex.quote(request)} {address}/predict"
        uvloop.run(server.run(listening, lambda: say(started)))
    given_up = f"{server.given_up} requests were given up after {arguments.max_seconds:g} s"
    say(f"stopped; {given_up if server.given_up else 'all that had come in is answered'}")


@contextlib.contextmanager
def _address_named(arguments: ServeArguments) -> Iterator[None]:
    """Turns errors of a socket into InputError."""
    try:
        yield
    except (OSError, TypeError) as error:  # a name that is none is a TypeError
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"--host {arguments.host} --port {arguments.port}: cannot listen there ({reason}); give another"
        ) from error


class Server:
    """A model, its queue and its endpoints behind a socket, from start to stop."""

    def __init__(self, model: OnnxModel, arguments: ServeArguments) -> None:
        self.model, self.arguments = model, arguments
        self.name = public_name(arguments.name, model.path)
        self.given_up = 0

    async def run(self, listening: socket.socket, started: Callable[[], None]) -> None:
        """Answers the requests that come by a socket until it is stopped.

        Args:
            listening: a socket with an address.
            started: called when connections are taken.

        Raises:
            InputError: another listens there.
        """
        options = self.arguments
        self.loop, self._stopped = asyncio.get_running_loop(), asyncio.Event()
        self.batcher = Batcher(
            partial(compute, self.model),
            options.max_batch_size,
            options.max_queue_size,
            options.max_delay_ms / 1000,
        )
        self.endpoints = Endpoints(self.model, self.name, self.batcher, options.max_texts, options.max_characters)
        if threading.current_thread() is threading.main_thread():
            for number in STOPS:
                if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup leaves SIGHUP
                    self.loop.add_signal_handler(number, self._stop_by, number)
        with _address_named(options):
            listening.listen(CONNECTIONS)
        self.listener = Listener(
            listening, self.endpoints.answer, self.endpoints.refuse, options.max_body_bytes, options.max_seconds
        )
        started()
        await self._stopped.wait()
        self.endpoints.ready = False
        self.loop.call_later(options.max_seconds, self._give_up)
        self.loop.call_later(options.max_seconds + LINGER, self.listener.abort)
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
