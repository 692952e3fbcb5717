"""Requests that arrive together are computed together, and no more of them wait than there is room for."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any


class QueueFull(Exception):
    """There is no room for a request now."""


class Stopped(Exception):
    """The queue was given up before a request was answered."""


@dataclass
class _Job:
    rows: Sequence[Any]
    weight: int
    done: asyncio.Future[list[Any]]


class Batcher:
    """A queue of rows before a function that computes many of them at once, in a thread of its own.

    A batch is what waits when the one before is finished; the first after a pause waits `delay` for
    company. A request's rows stay together.

    Args:
        compute: a list of rows -> a list of as many results.
        batch: weight of the rows that are computed together, unless one request has more.
        queue: weight of the rows that may wait.
        delay: seconds.
        watch: told the weight of each batch before it is computed.
    """

    def __init__(
        self,
        compute: Callable[[list[Any]], list[Any]],
        batch: int,
        queue: int,
        delay: float,
        watch: Callable[[int], None] = lambda weight: None,
    ) -> None:
        self.compute, self.batch, self.queue, self.delay, self.watch = compute, batch, queue, delay, watch
        self.waiting = 0
        """Weight of the rows in the queue."""
        self._jobs: deque[_Job] = deque()
        self._computing: list[_Job] = []
        self._arrived = asyncio.Event()
        self.loop = asyncio.get_running_loop()
        self._work: SimpleQueue[tuple[list[Any], asyncio.Future[list[Any]]]] = SimpleQueue()
        # A daemon: the process need not wait for what nobody waits for any more.
        threading.Thread(target=self._compute_batches, name="model", daemon=True).start()
        self._task = self.loop.create_task(self._answer_batches())

    async def submit(self, rows: Sequence[Any], weight: int | None = None) -> list[Any]:
        """The results of some rows, which weigh as much as they are many if nothing is said.

        Raises:
            QueueFull: more would wait than may.
            Stopped: `give_up` was called.
            Exception: what `compute` raised, if these rows alone make it raise.
        """
        job = _Job(rows, len(rows) if weight is None else weight, self.loop.create_future())
        if self.waiting + job.weight > self.queue:
            raise QueueFull
        self._jobs.append(job)
        self.waiting += job.weight
        self._arrived.set()
        return await job.done

    def give_up(self) -> int:
        """Ends all requests that are not answered yet; returns how many."""
        jobs = [job for job in (*self._computing, *self._jobs) if not job.done.done()]
        self._jobs.clear()
        self.waiting = 0
        for job in jobs:
            job.done.set_exception(Stopped())
        return len(jobs)

    async def close(self) -> None:
        """Returns when all that was submitted is answered, or given up."""
        while any(not job.done.done() for job in (*self._computing, *self._jobs)):
            await asyncio.sleep(0.01)
        self._task.cancel()

    async def _answer_batches(self) -> None:
        while True:
            if not self._jobs:
                self._arrived.clear()
                await self._arrived.wait()
                await asyncio.sleep(self.delay)
            self._computing = self._take()
            await self._answer(self._computing)
            self._computing = []

    async def _answer(self, jobs: list[_Job]) -> None:
        if not jobs:
            return
        self.watch(sum(job.weight for job in jobs))
        try:
            results = await self._in_thread([row for job in jobs for row in job.rows])
        except Exception as error:
            if len(jobs) > 1:  # one request's rows are no other's fault
                for job in jobs:
                    await self._answer([job])
            elif not jobs[0].done.done():
                jobs[0].done.set_exception(error)
            return
        start = 0
        for job in jobs:
            if not job.done.done():  # its client may have gone
                job.done.set_result(results[start : start + len(job.rows)])
            start += len(job.rows)

    def _take(self) -> list[_Job]:
        jobs: list[_Job] = []
        total = 0
        while self._jobs and (not jobs or total + self._jobs[0].weight <= self.batch):
            jobs.append(self._jobs.popleft())
            total += jobs[-1].weight
        self.waiting -= total
        return [job for job in jobs if not job.done.done()]

    def _in_thread(self, rows: list[Any]) -> asyncio.Future[list[Any]]:
        done: asyncio.Future[list[Any]] = self.loop.create_future()
        self._work.put((rows, done))
        return done

    def _compute_batches(self) -> None:
        def tell(done: asyncio.Future[list[Any]], results: list[Any], error: Exception | None) -> None:
            if done.done():
                return
            if error is None:
                done.set_result(results)
            else:
                done.set_exception(error)

        while True:
            rows, done = self._work.get()
            results: list[Any] = []
            failed: Exception | None = None
            try:
                results = self.compute(rows)
            except Exception as error:
                failed = error
            with contextlib.suppress(RuntimeError):  # the loop may have ended
                self.loop.call_soon_threadsafe(tell, done, results, failed)
