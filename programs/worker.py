"""An object in a process of its own, which answers calls of its methods over a pipe."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any


class WorkerFailed(RuntimeError):
    """An exception in a worker, which is the cause of this one; the message is one line that names the worker."""


class WorkerEnded(WorkerFailed):
    """The end of a worker's process before it answered."""


class Worker:
    """An object in a process of its own. The process ends when the worker is closed, and with the process that
    started it.

    Args:
        name: of the worker, in messages.
        make: called in the process; what it returns has the methods. It and all arguments are pickled.
        threads: of OpenMP; without, as many as the environment says, or else one for each processor.
    """

    def __init__(self, name: str, make: Callable[..., object], *arguments: Any, threads: int | None = None) -> None:
        self.name = name
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, threads, make, arguments), daemon=True)
        self._process.start()
        theirs.close()
        self._working = True
        """Whether an answer is to come: at first, that the object is made."""

    def wait(self) -> None:
        """Waits until the object is made.

        Raises:
            WorkerFailed: making it raised an exception, or its process ended.
        """
        if self._working:
            self._receive()

    def call(self, method: str, *arguments: Any) -> Any:
        """Calls a method of the object, when it is made, and waits for what it returns. After an exception the process
        ends.

        Raises:
            WorkerFailed: the method raised an exception, or the process ended.
        """
        self.wait()
        self._working = True
        try:
            self._pipe.send((method, arguments))
        except OSError:
            raise self._ended() from None
        return self._receive()

    def close(self) -> None:
        """Ends the process: in good order, unless it is at work."""
        self._pipe.close()
        if self._working:
            self._process.terminate()
        self._process.join()

    def _receive(self) -> Any:
        try:
            answer = self._pipe.recv()
        except (EOFError, OSError):
            raise self._ended() from None
        if isinstance(answer, Exception):
            raise WorkerFailed(f"{self.name}: {answer!r}") from answer
        self._working = False
        return answer

    def _ended(self) -> WorkerEnded:
        return WorkerEnded(f"{self.name}: its process was ended, perhaps for want of memory")


def _serve(pipe: Connection, threads: int | None, make: Callable[..., object], arguments: tuple[Any, ...]) -> None:
    """Answers calls until the pipe is closed, or until the first exception."""
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(threads)
    # Without the variable Paddle takes one thread, and PyTorch one for each core.
    os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
    try:
        instance = make(*arguments)
        pipe.send(None)
        while True:
            try:
                method, arguments = pipe.recv()
            except EOFError:
                return
            pipe.send(getattr(instance, method)(*arguments))
    except Exception as error:
        pipe.send(error)
