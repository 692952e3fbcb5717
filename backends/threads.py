"""Threads that compute, on processors that other programs want too."""

from __future__ import annotations

import ctypes
import os
import re
import threading
import time
from functools import cache
from pathlib import Path

crowded = threading.Event()
"""Set while other programs take processors that this process' threads need; see `share_processors`."""

INTERVAL = 0.5
"""Seconds between two looks at the processors."""
TAKEN = 0.3
"""Processors' worth of time that others must take; less is what any system does beside."""
SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""Environment variables by which users say themselves how OpenMP's threads wait."""
BLOCKTIME = 200
"""Milliseconds that a thread of Intel's runtime spins where nothing is said."""


@cache
def share_processors() -> None:
    """From now on `crowded` is kept, and as long as it is set OpenMP's threads sleep while they wait for each other.

    They spin otherwise, for milliseconds, since an operation often takes less time than waking a thread. Beside another
    program the thread that is waited for may be without a processor, which spinning then keeps from it.
    The number of threads stays, and so does every bit of the results. It makes no difference when OpenMP was
    loaded. How threads wait is left alone where the user has said it (`SETTINGS`); nothing at all is done on
    systems without /proc.
    """
    if Path("/proc/stat").exists():
        threading.Thread(target=_watch, name="processors", daemon=True).start()


def _watch() -> None:
    taken, end = Taken(), threading.Event()
    while True:
        time.sleep(INTERVAL)
        if are_too_few(taken.by_others()) == crowded.is_set():
            continue
        if crowded.is_set():
            crowded.clear()
            end.set()
        else:
            crowded.set()
            end = threading.Event()
            if not any(name in os.environ for name in SETTINGS):
                threading.Thread(target=_sleep_at_once, args=(end,), name="idle", daemon=True).start()


def are_too_few(others: float) -> bool:
    """Whether processors are too few for a team of threads where others take so many of them."""
    processors = len(os.sched_getaffinity(0))
    team = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    return others > max(0, processors - (int(team) if team.isdigit() else processors)) + TAKEN


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
        """Seconds of the clock, and of processors that worked for others, a virtual machine's neighbours among them."""
        ticks = 0
        for line in Path("/proc/stat").read_text(encoding="ascii").splitlines():
            if (match := re.match(r"cpu(\d+) ", line)) and int(match[1]) in os.sched_getaffinity(0):
                user, nice, system, _, _, irq, softirq, steal, *_ = map(int, line.split()[1:])
                ticks += user + nice + system + irq + softirq + steal
        return time.perf_counter(), ticks / os.sysconf("SC_CLK_TCK") - time.process_time()


def _sleep_at_once(end: threading.Event) -> None:
    """Has threads that wait in OpenMP's runtimes sleep without spinning, until the end.

    GNU's spins next to never where it has more threads than there are processors (its manual, under GOMP_SPINCOUNT): a
    team of this thread's own makes it so, sleeps, and goes with this thread. Intel's has a setting for the team of
    the thread that calls: Python's main thread does, as soon as it is between two instructions.
    """
    maps = Path("/proc/self/maps").read_text(encoding="utf-8")
    for path in set(re.findall(r"/\S*/lib(?:gomp|iomp5)[.-]\S*", maps)):
        runtime = ctypes.CDLL(path)
        if hasattr(runtime, "kmp_set_blocktime"):
            _set_blocktime(runtime, 0)
        else:
            nothing = ctypes.cast(runtime.omp_get_thread_num, ctypes.c_void_p)
            runtime.GOMP_parallel(nothing, None, len(os.sched_getaffinity(0)), 0)
    end.wait()
    for path in set(re.findall(r"/\S*/libiomp5[.-]\S*", maps)):
        _set_blocktime(ctypes.CDLL(path), BLOCKTIME)


def _set_blocktime(runtime: ctypes.CDLL, milliseconds: int) -> None:
    done = threading.Event()

    @ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p)
    def call(_: int | None) -> int:
        runtime.kmp_set_blocktime(milliseconds)
        done.set()
        return 0

    ctypes.pythonapi.Py_AddPendingCall(call, None)
    done.wait()  # the function must live until then
