"""HTTP/1.1, parsed by h11: a connection's time and memory are bounded, and a stop loses no request that came in."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import re
import socket
import struct
import traceback
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from email.utils import formatdate
from functools import partial
from http import HTTPStatus
from typing import Any
from urllib.parse import unquote

import h11

CONNECTIONS = 1024
"""Connections that may be open; where more come, the one is closed that has been silent for longest."""
MAX_HEAD = 1 << 15
"""Bytes of a request's first line and headers, of the header of a chunk, or of trailers."""
MAX_HEADERS = 100
MAX_CHUNKS = 10_000
PIECE = 1 << 14
"""Bytes that are read at once."""
KERNEL = 1 << 17
"""Bytes that the kernel may hold of a connection, each way."""
LONG_BODIES = 16
"""Bodies of the greatest length that may be arriving together; the first `PIECE` of each is not counted."""
ANSWERS = 1 << 26
"""Bytes of answers that may wait for their clients to take them, unless one alone has more."""
HANDSHAKE = 1.0
"""Seconds from a stop until the listener closes, for connections that are being made: TCP's first timeout."""
SILENCE = 5.0
"""Seconds after a stop in which a connection must send something, or it is closed."""
LINGER = 2.0
"""Seconds of silence after which a connection is closed whose client was told of the end."""
ACCEPTED = 64
"""Connections that are taken before others get their turn."""


@dataclass
class Request:
    """A request that came in whole."""

    method: str
    path: str
    """The path without what follows a question mark, and without escapes."""
    headers: Mapping[str, str]
    """Headers, their names in lower case."""
    body: bytes
    address: str
    """The client's."""
    connection: int

    def take_body(self) -> bytes:
        """Returns the body, and keeps it no longer."""
        body, self.body = self.body, b""
        return body


@dataclass(frozen=True)
class Answer:
    status: int
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)


class RequestFault(Exception):
    """A request cannot be read, or breaks a rule; with the HTTP status that says so."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Listener:
    """A socket's connections, and their requests, one at a time of each.

    Args:
        listening: a socket that listens.
        answer: answers a request; called with nothing awaited since its body was complete.
        refuse: answers what is no request, with an HTTP status and a reason.
        max_body: bytes of a body.
        seconds: in which a request must arrive, and in which its answer must be taken.
    """

    def __init__(
        self,
        listening: socket.socket,
        answer: Callable[[Request], Awaitable[Answer]],
        refuse: Callable[[int, str], Answer],
        max_body: int,
        seconds: float,
    ) -> None:
        self.answer, self.refuse, self.max_body, self.seconds = answer, refuse, max_body, seconds
        self.stopping = False
        self.arriving = 0
        """Bytes of long bodies that are not complete."""
        self.leaving = 0
        """Bytes of answers that are not sent."""
        self.loop = asyncio.get_running_loop()
        self._connections: dict[_Connection, asyncio.Task[None]] = {}
        self._number = 0
        self._socket = listening
        listening.setblocking(False)
        for side in (socket.SO_SNDBUF, socket.SO_RCVBUF):  # of the connections, which would else grow to megabytes
            listening.setsockopt(socket.SOL_SOCKET, side, KERNEL)
        self._resume()

    async def stop(self) -> None:
        """Answers all that came in, also by connections that only the kernel has made, then closes all connections."""
        self.stopping = True
        _refuse_handshakes(self._socket)
        self.loop.call_later(SILENCE, self._close_silent)
        await asyncio.sleep(HANDSHAKE)
        while not self._accept():
            await asyncio.sleep(0.01)
        self.loop.remove_reader(self._socket)
        self._socket.close()
        while self._connections:
            await asyncio.wait(self._connections.values())

    def abort(self) -> None:
        """Closes all connections."""
        for connection in self._connections:
            connection.abort()

    def _resume(self) -> None:
        if not self.stopping:
            self.loop.add_reader(self._socket, self._accept)

    def _accept(self) -> bool:
        """Takes connections; returns whether none waits any more."""
        for _ in range(ACCEPTED):
            try:
                full = len(self._connections) >= CONNECTIONS and not self.stopping
                if full and not any(connection.waits for connection in self._connections):
                    raise OSError("all are being answered")
                client, address = self._socket.accept()
            except BlockingIOError:
                return True
            except ConnectionAbortedError:
                continue
            except OSError:  # no descriptor is left, or no place: the others wait
                if not self.stopping:
                    self.loop.remove_reader(self._socket)
                    self.loop.call_later(0.1, self._resume)
                return False
            if full:
                waiting = (connection for connection in self._connections if connection.waits)
                min(waiting, key=lambda connection: connection.since).abort()
            self._number += 1
            connection = _Connection(self, client, address[0], self._number)
            task = self.loop.create_task(connection.run())
            self._connections[connection] = task
            task.add_done_callback(partial(self._ended, connection))
        return False

    def _ended(self, connection: _Connection, task: asyncio.Task[None]) -> None:
        del self._connections[connection]

    def _close_silent(self) -> None:
        for connection in self._connections:
            if connection.silent:
                connection.end_wait()


class _Connection:
    def __init__(self, listener: Listener, client: socket.socket, address: str, number: int) -> None:
        self.listener, self.socket, self.address, self.number = listener, client, address, number
        self.silent = True
        """Whether nothing of the next request is here."""
        self.waits = True
        """Whether nothing is computed for it, nor sent."""
        self.since = listener.loop.time()
        """When it last began to wait for something."""
        self._late = self._aborted = False
        self._ready: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD)
        client.setblocking(False)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    async def run(self) -> None:
        try:
            while await self._exchange():
                self._http.start_next_cycle()
            await self._linger()
        except (OSError, TimeoutError):
            pass  # the client has gone, or has had its time
        except Exception:
            traceback.print_exc()
        finally:
            if self._timer is not None:
                self._timer.cancel()
            self.socket.close()

    def end_wait(self) -> None:
        """Ends the time of a wait: what the socket does not give at once is waited for no more."""
        self._late = True
        self._wake()

    def _wake(self) -> None:
        if self._ready is not None and not self._ready.done():
            self._ready.set_result(None)

    def abort(self) -> None:
        self._aborted, self.waits = True, False
        self.end_wait()

    async def _exchange(self) -> bool:
        """Answers a request; returns whether another may follow."""
        method = ""
        try:
            request = await self._request()
            if request is None:
                return False
            method, self.waits = request.method, False
            answer, whole = await self.listener.answer(request), True
        except RequestFault as error:
            answer, whole = self.listener.refuse(error.status, str(error)), False
        except h11.RemoteProtocolError as error:
            status, why = error.error_status_hint, f"no HTTP: {str(error)[:200]}"
            if status == 431:
                why = f"headers, or what stands about a chunk, are longer than {MAX_HEAD} bytes"
            answer, whole = self.listener.refuse(status, why), False
        await self._send(answer, method == "HEAD", whole and not (self.listener.stopping and self._nothing_follows()))
        self.waits = True
        return self._http.our_state is h11.DONE and self._http.their_state is h11.DONE

    async def _request(self) -> Request | None:
        """Returns the next request; None if the client is done, or silent for too long.

        Raises:
            RequestFault: it breaks a rule, or has not come in time.
            h11.RemoteProtocolError: it is no HTTP.
        """
        self.silent, self.since = not self._http.trailing_data[0], self.listener.loop.time()
        self._limit(SILENCE if self.listener.stopping else self.listener.seconds)
        if not self.silent:
            await asyncio.sleep(0)  # others have their turn between the requests of one
        try:
            event = await self._event()
            if not isinstance(event, h11.Request):
                return None
            headers = _check(event, self.listener.max_body)
            body = await self._body()
        except TimeoutError:
            if self.silent or self._aborted:
                return None
            raise RequestFault(408, f"the request is not here after {self.listener.seconds:g} s") from None
        target = re.sub("^[A-Za-z]+://[^/?]*", "", event.target.decode("latin-1"))
        path = unquote(target.partition("?")[0])
        return Request(event.method.decode("latin-1"), path, headers, body, self.address, self.number)

    async def _body(self) -> bytes:
        """Returns what comes until the request's end."""
        listener, body, counted, chunks = self.listener, bytearray(), 0, 0
        try:
            while not isinstance(event := await self._event(), h11.EndOfMessage):
                body += event.data
                chunks += event.chunk_start
                if len(body) > listener.max_body:
                    raise RequestFault(413, f"body: longer than {listener.max_body} bytes")
                if chunks > MAX_CHUNKS:
                    raise RequestFault(413, f"body: in more than {MAX_CHUNKS} chunks")
                more = max(0, len(body) - PIECE) - counted
                if more and listener.arriving + more > LONG_BODIES * listener.max_body:
                    raise RequestFault(503, "too many long bodies are arriving; come back later")
                counted += more
                listener.arriving += more
            return bytes(body)
        finally:
            listener.arriving -= counted

    async def _event(self) -> Any:
        """Returns h11's next event."""
        while (event := self._http.next_event()) is h11.NEED_DATA:
            if self._http.they_are_waiting_for_100_continue:
                await self._write([self._http.send(h11.InformationalResponse(status_code=100, headers=[]))])
            self._http.receive_data(await self._receive())
        return event

    def _nothing_follows(self) -> bool:
        """Returns whether no byte of another request is here; if one is, it is taken from the socket."""
        if not self._http.trailing_data[0]:
            with contextlib.suppress(OSError):
                self._http.receive_data(self.socket.recv(PIECE))
        return not self._http.trailing_data[0]

    async def _send(self, answer: Answer, only_head: bool, may_stay: bool) -> None:
        if self.listener.leaving and self.listener.leaving + len(answer.body) > ANSWERS:
            answer = self.listener.refuse(503, "too many long answers are being taken; come back later")
        headers = [
            ("date", formatdate(usegmt=True)),
            ("content-length", str(len(answer.body))),
            *answer.headers.items(),
        ]
        if not may_stay:
            headers.append(("connection", "close"))
        reason = HTTPStatus(answer.status).phrase
        parts = [self._http.send(h11.Response(status_code=answer.status, headers=headers, reason=reason))]
        if answer.body and not only_head:
            parts += self._http.send_with_data_passthrough(h11.Data(data=answer.body)) or []
        self._http.send(h11.EndOfMessage())
        self._limit(self.listener.seconds)
        self.listener.leaving += len(answer.body)
        try:
            await self._write(parts)
        finally:
            self.listener.leaving -= len(answer.body)

    async def _linger(self) -> None:
        """Closes our side, and reads until the client closes its own: what it sends late would else make the kernel
        take back the answer."""
        self.socket.shutdown(socket.SHUT_WR)
        self.silent, self.since = False, self.listener.loop.time()
        while self.listener.loop.time() < self.since + self.listener.seconds:
            self._limit(LINGER)
            if not await self._receive():
                break

    # The socket

    async def _receive(self) -> bytes:
        """Returns bytes of the client; none at the end.

        Raises:
            TimeoutError: the time is over.
        """
        while True:
            if self._aborted or (self._late and not self.silent):
                raise TimeoutError
            try:
                piece = self.socket.recv(PIECE)
            except BlockingIOError:
                if self._late:
                    raise TimeoutError from None
                await self._wait(self.listener.loop.add_reader, self.listener.loop.remove_reader)
                continue
            if self.silent and piece:
                self.silent, self.since = False, self.listener.loop.time()
                self._limit(self.listener.seconds)
            else:
                await asyncio.sleep(0)  # a client that sends much must leave others their turn
            return piece

    async def _write(self, parts: list[bytes]) -> None:
        left = [memoryview(part) for part in parts]
        while left:
            if self._late:
                # What the kernel still holds for a client that does not read is given back at once
                self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                raise TimeoutError
            try:
                sent = self.socket.sendmsg(left)
            except BlockingIOError:
                await self._wait(self.listener.loop.add_writer, self.listener.loop.remove_writer)
                continue
            while left and sent >= len(left[0]):
                sent -= len(left.pop(0))
            if left:
                left[0] = left[0][sent:]

    def _limit(self, seconds: float) -> None:
        """Limits the time of all waiting from now on."""
        if self._timer is not None:
            self._timer.cancel()
        self._late = self._aborted
        self._timer = self.listener.loop.call_later(seconds, self.end_wait)

    async def _wait(self, add: Callable[..., Any], remove: Callable[..., Any]) -> None:
        """Returns when the socket is ready, or time is up."""
        self._ready = self.listener.loop.create_future()
        add(self.socket, self._wake)
        try:
            await self._ready
        finally:
            remove(self.socket)
            self._ready = None


def _check(request: h11.Request, max_body: int) -> dict[str, str]:
    """Returns the headers of a request whose body may be read."""
    if request.http_version not in (b"1.0", b"1.1"):
        raise RequestFault(505, "expected HTTP/1.1")
    if len(request.headers) > MAX_HEADERS:
        raise RequestFault(431, f"{len(request.headers)} headers, at most {MAX_HEADERS} may come")
    headers: dict[str, str] = {}
    for raw_name, raw_value in request.headers:
        name, value = raw_name.decode("latin-1"), raw_value.decode("latin-1")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    if "transfer-encoding" in headers and ("content-length" in headers or request.http_version == b"1.0"):
        raise RequestFault(400, "transfer-encoding: with content-length, or HTTP/1.0, the body's end is not certain")
    if int(headers.get("content-length", 0)) > max_body:
        raise RequestFault(413, f"body: longer than {max_body} bytes")
    return headers


def _refuse_handshakes(listening: socket.socket) -> None:
    """Makes the kernel drop requests for connections. Their clients ask again after a second, and learn then
    that the listener is closed; those it would make between our last look and the close would be reset."""
    program = ((0x30, 0, 0, 13), (0x45, 0, 1, 2), (0x06, 0, 0, 0), (0x06, 0, 0, 0xFFFFFFFF))
    """For Linux' packet filter: load TCP's flags; unless SYN is among them skip one; drop; keep."""
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in program))
    with contextlib.suppress(OSError):  # a sandbox may not have it
        listening.setsockopt(
            socket.SOL_SOCKET, getattr(socket, "SO_ATTACH_FILTER", 26), struct.pack("HP", 4, ctypes.addressof(code))
        )
