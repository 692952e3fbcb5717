"""OpenMP's threads, which both frameworks compute with, on processors that other programs want too."""

from __future__ import annotations

import ctypes
import os
import re
import threading
import time
from functools import cache
from pathlib import Path

SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""Environment variables by which users say themselves how threads wait."""
INTERVAL = 0.5
"""Seconds between two looks at the processors."""
TAKEN = 0.3
"""Processors' worth of time that others must take; less is what any system does beside."""


@cache
def share_processors() -> None:
    """From now on threads that wait sleep while other programs want this process' processors, and spin while none does.

    A thread that waits for its team spins for milliseconds, since waking a sleeping one takes longer than many an
    operation. Beside another program the thread that is waited for may have no processor, and spinning
    takes it. Runtimes spin next to never where there are more of OpenMP's threads than processors (GNU's
    manual of libgomp, under GOMP_SPINCOUNT). So as long as others take processors, idle threads are held that make
    it so; neither the number of threads that compute nor any result changes.

    Nothing is done where users set how threads wait (`SETTINGS`), or where the system does not tell (/proc).
    """
    if Path("/proc/stat").exists() and not any(name in os.environ for name in SETTINGS):
        threading.Thread(target=_watch, name="processors", daemon=True).start()


def _watch() -> None:
    taken, end = Taken(), None
    while True:
        time.sleep(INTERVAL)
        if crowded(taken.by_others()) == (end is not None):
            continue
        if end:
            end.set()
            end = None
        else:
            end = threading.Event()
            threading.Thread(target=_hold_idle_threads, args=(end,), name="idle", daemon=True).start()


def crowded(others: float) -> bool:
    """Whether others take so many processors that there are too few for all threads of a team."""
    processors = len(os.sched_getaffinity(0))
    team = int(os.environ.get("OMP_NUM_THREADS", "").partition(",")[0] or processors)
    return team > 1 and others > max(0, processors - team) + TAKEN


class Taken:
    """Processors' worth of time that other programs take, of the processors that this process may use."""

    def __init__(self) -> None:
        self._last = self._now()

    def by_others(self) -> float:
        """Since it was last asked."""
        last, self._last = self._last, self._now()
        seconds, others = (now - before for now, before in zip(self._last, last))
        return others / seconds

    def _now(self) -> tuple[float, float]:
        """Seconds of the clock, and of processors that worked for others; on a virtual machine, its neighbours too."""
        ticks = 0
        for line in Path("/proc/stat").read_text(encoding="ascii").splitlines():
            if (match := re.match(r"cpu(\d+) ", line)) and int(match[1]) in os.sched_getaffinity(0):
                user, nice, system, _, _, irq, softirq, steal, *_ = map(int, line.split()[1:])
                ticks += user + nice + system + irq + softirq + steal
        return time.perf_counter(), ticks / os.sysconf("SC_CLK_TCK") - time.process_time()


def _hold_idle_threads(end: threading.Event) -> None:
    """Keeps a team of this thread's own, as many as there are processors, in each of OpenMP's runtimes; it goes when
    this thread ends."""
    maps = Path("/proc/self/maps").read_text(encoding="utf-8")
    for path in sorted(set(re.findall(r"/\S*/lib(?:gomp|iomp5)[.-]\S*", maps))):
        runtime = ctypes.CDLL(path)
        nothing = ctypes.cast(runtime.omp_get_thread_num, ctypes.c_void_p)
        runtime.GOMP_parallel(nothing, None, len(os.sched_getaffinity(0)), 0)
    end.wait()
