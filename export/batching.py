"""Batches of requests: those that come together are computed together, in fair shares; the queue is bounded."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, NamedTuple


class QueueFull(Exception):
    """The queue has no room for a request."""


class Stopped(Exception):
    """The queue was given up before a request was answered."""


class _Row(NamedTuple):
    job: _Job
    number: int
    weight: int


@dataclass(eq=False)
class _Job:
    client: tuple[Hashable, Hashable]
    rows: Sequence[Any]
    waiting: list[_Row]
    done: asyncio.Future[list[Any]]
    results: dict[int, Any]

    @property
    def weight(self) -> int:
        """Weight of the rows that wait."""
        return sum(row.weight for row in self.waiting)


class Batcher:
    """A queue of rows before a function that computes many of them at once, in a thread of its own.

    A batch is made when the one before is finished; the first after a pause waits `delay` for company. Half of it
    is for the rows that came first. For the rest each address has its turn to put a row in, and in its turn each of
    its connections, so that a request of few rows goes into the next batch whatever others wait for. Where there is
    no room for a request, the address that has most rows waiting loses the longest of its requests.

    Args:
        compute: a list of rows -> a list of as many results.
        batch: weight of the rows that are computed together, unless one row has more.
        queue: weight of the rows that may wait.
        delay: seconds.
    """

    def __init__(self, compute: Callable[[list[Any]], list[Any]], batch: int, queue: int, delay: float) -> None:
        self.compute, self.batch, self.queue, self.delay = compute, batch, queue, delay
        self.watch: Callable[[int], None] = lambda weight: None
        """Called with the weight of each batch before it is computed."""
        self.waiting = 0
        """Weight of the rows in the queue."""
        self._jobs: list[_Job] = []
        """Jobs with rows in the queue, in the order in which they came."""
        self._computing: list[_Job] = []
        self._arrived = asyncio.Event()
        self.loop = asyncio.get_running_loop()
        self._work: SimpleQueue[tuple[list[Any], asyncio.Future[list[Any]]]] = SimpleQueue()
        # A daemon: the process need not wait for what nobody waits for any more.
        threading.Thread(target=self._compute_batches, name="model", daemon=True).start()
        self._task = self.loop.create_task(self._answer_batches())

    async def submit(
        self,
        rows: Sequence[Any],
        weights: Sequence[int] | None = None,
        client: tuple[Hashable, Hashable] = ("", ""),
    ) -> list[Any]:
        """Returns the results of rows, which weigh 1 each if nothing is said.

        Args:
            client: an address, and a connection from there.

        Raises:
            QueueFull: more would wait than may.
            Stopped: `give_up` was called.
            Exception: what `compute` raised, if these rows alone make it raise.
        """
        if not rows:
            return []
        job = _Job(client, rows, [], self.loop.create_future(), {})
        job.waiting = [_Row(job, i, weight) for i, weight in enumerate(weights or [1] * len(rows))]
        self._make_room(job)
        self._jobs.append(job)
        self.waiting += job.weight
        self._arrived.set()
        return await job.done

    def give_up(self) -> int:
        """Ends all requests that are not answered yet; returns how many."""
        jobs = [job for job in dict.fromkeys([*self._computing, *self._jobs]) if not job.done.done()]
        for job in jobs:
            self._end(job, Stopped())
        return len(jobs)

    def close(self) -> None:
        self._task.cancel()

    def _make_room(self, job: _Job) -> None:
        """Makes room for a job, or raises QueueFull if the job is the one that must go."""
        if job.weight > self.queue:
            raise QueueFull
        while self.waiting + job.weight > self.queue:
            held: Counter[Hashable] = Counter()
            for other in (job, *self._jobs):
                held[other.client[0]] += other.weight
            longest = max((job, *reversed(self._jobs)), key=lambda other: (held[other.client[0]], other.weight))
            if longest is job:
                raise QueueFull
            self._end(longest, QueueFull())

    def _end(self, job: _Job, error: Exception) -> None:
        """Takes a job out of the queue, and answers it with an error."""
        if job in self._jobs:
            self._jobs.remove(job)
            self.waiting -= job.weight
            job.waiting = []
        if not job.done.done():
            job.done.set_exception(error)

    async def _answer_batches(self) -> None:
        while True:
            if not self._jobs:
                self._arrived.clear()
                await self._arrived.wait()
                await asyncio.sleep(self.delay)
            rows = self._take()
            self._computing = list(dict.fromkeys(row.job for row in rows))
            await self._answer(rows)
            self._computing = []

    async def _answer(self, rows: Sequence[_Row]) -> None:
        if not rows:
            return
        self.watch(sum(row.weight for row in rows))
        try:
            results = await self._in_thread([row.job.rows[row.number] for row in rows])
        except Exception as error:
            jobs = dict.fromkeys(row.job for row in rows)
            if len(jobs) == 1:
                self._end(rows[0].job, error)
            else:  # one request's rows are no other's fault
                for job in jobs:
                    await self._answer([row for row in rows if row.job is job])
            return
        for row, result in zip(rows, results):
            job = row.job
            job.results[row.number] = result
            if len(job.results) == len(job.rows) and not job.done.done():
                job.done.set_result([job.results[i] for i in range(len(job.rows))])

    def _take(self) -> list[_Row]:
        """Takes the rows of the next batch out of the queue."""
        if not self._jobs:
            return []
        queued = [row for job in self._jobs for row in job.waiting]
        by_address: dict[Hashable, dict[Hashable, list[_Row]]] = {}
        for row in queued:
            address, connection = row.job.client
            by_address.setdefault(address, {}).setdefault(connection, []).append(row)
        fair = _in_turn(_in_turn(connections.values()) for connections in by_address.values())
        half = max(1, self.batch // 2)
        taken = {queued[0]: None}
        total = min(queued[0].weight, half)  # what weighs more than all that may be taken must not keep others out
        for rows, limit in ((queued, half), (fair, self.batch)):
            for row in rows:
                if row not in taken and total + row.weight <= limit:
                    taken[row] = None
                    total += row.weight
        for job in {row.job for row in taken}:
            self.waiting -= job.weight
            job.waiting = [row for row in job.waiting if row not in taken]
            self.waiting += job.weight
        self._jobs = [job for job in self._jobs if job.waiting]
        return list(taken)

    def _in_thread(self, rows: list[Any]) -> asyncio.Future[list[Any]]:
        done: asyncio.Future[list[Any]] = self.loop.create_future()
        self._work.put((rows, done))
        return done

    def _compute_batches(self) -> None:
        def finish(done: asyncio.Future[list[Any]], results: list[Any], error: Exception | None) -> None:
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
                self.loop.call_soon_threadsafe(finish, done, results, failed)


def _in_turn(queues: Iterable[Sequence[_Row]]) -> list[_Row]:
    """Returns a row of each queue, then the next of each; in a turn the lighter rows come first."""
    turns = [(turn, row.weight, row) for queue in queues for turn, row in enumerate(queue)]
    return [row for *_, row in sorted(turns, key=lambda entry: entry[:2])]
