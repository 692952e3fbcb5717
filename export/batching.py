"""Requests that arrive together are computed together, and no more of them wait than there is room for."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any


class QueueFull(Exception):
    """There is no room for a request now."""


@dataclass
class _Job:
    rows: Sequence[Any]
    done: asyncio.Future[list[Any]] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Batcher:
    """A queue of rows before a function that computes many of them at once, in a thread of its own.

    A batch is what waits when the one before is finished; the first after a pause waits `delay` for
    company. A request's rows stay together.

    Args:
        compute: a list of rows -> a list of as many results.
        batch: rows that are computed together, unless one request has more.
        queue: rows that may wait.
        delay: seconds.
        watch: told the rows of each batch before it is computed.
    """

    def __init__(
        self,
        compute: Callable[[list[Any]], list[Any]],
        batch: int,
        queue: int,
        delay: float,
        watch: Callable[[int], None] = lambda rows: None,
    ) -> None:
        self.compute, self.batch, self.queue, self.delay, self.watch = compute, batch, queue, delay, watch
        self.waiting = 0
        """Rows in the queue."""
        self._jobs: deque[_Job] = deque()
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, "model")
        self._task = asyncio.get_running_loop().create_task(self._work())

    async def submit(self, rows: Sequence[Any]) -> list[Any]:
        """The results of some rows.

        Raises:
            QueueFull: more would wait than may.
            Exception: what `compute` raised, if these rows alone make it raise.
        """
        if self.waiting + len(rows) > self.queue:
            raise QueueFull
        job = _Job(rows)
        self._jobs.append(job)
        self.waiting += len(rows)
        self._arrived.set()
        return await job.done

    async def close(self) -> None:
        """Returns when all that was submitted is answered."""
        while self._jobs:
            await asyncio.sleep(0.01)
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._thread.shutdown()

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            if not self._jobs:
                self._arrived.clear()
                await self._arrived.wait()
                await asyncio.sleep(self.delay)
            jobs = self._take()
            rows = [row for job in jobs for row in job.rows]
            self.watch(len(rows))
            try:
                results = await loop.run_in_executor(self._thread, self.compute, rows)
            except Exception as error:
                await self._one_by_one(jobs, error)
                continue
            start = 0
            for job in jobs:
                if not job.done.done():  # its client may have gone
                    job.done.set_result(results[start : start + len(job.rows)])
                start += len(job.rows)

    async def _one_by_one(self, jobs: list[_Job], error: Exception) -> None:
        """One request's rows are no other's fault."""
        loop = asyncio.get_running_loop()
        for job in jobs:
            try:
                if len(jobs) == 1:
                    raise error
                results = await loop.run_in_executor(self._thread, self.compute, list(job.rows))
                if not job.done.done():
                    job.done.set_result(results)
            except Exception as own:
                if not job.done.done():
                    job.done.set_exception(own)

    def _take(self) -> list[_Job]:
        jobs = [self._jobs.popleft()]
        total = len(jobs[0].rows)
        while self._jobs and total + len(self._jobs[0].rows) <= self.batch:
            jobs.append(self._jobs.popleft())
            total += len(jobs[-1].rows)
        self.waiting -= total
        return [job for job in jobs if not job.done.cancelled()]
