"""Other programs on the machine: loops that take all the time they get, and what they leave."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from backends.threads import INTERVAL

LOOP = """
import os
parent = os.getppid()
while os.getppid() == parent:
    for _ in range(1_000_000): pass
"""
COUNT = """
import time
start, worked = time.perf_counter(), time.process_time()
while time.perf_counter() < start + 1: pass
print(time.process_time() - worked)
"""
NOTICED = 2 * INTERVAL + 0.1
"""Seconds after which ours has noticed that others came or went."""


@contextmanager
def beside(loops: int) -> Iterator[float]:
    """So many busy loops for as long as it lasts; the share of the processors that they leave.

    It is what a program of independent threads of pure arithmetic, one for each processor, gets of the processors'
    time beside them.
    """
    processes = [subprocess.Popen([sys.executable, "-c", LOOP]) for _ in range(loops)]
    try:
        processors = len(os.sched_getaffinity(0))
        counts = [subprocess.Popen([sys.executable, "-c", COUNT], stdout=subprocess.PIPE) for _ in range(processors)]
        share = sum(float(count.communicate()[0]) for count in counts) / processors
        time.sleep(NOTICED)
        yield share if loops else 1.0
    finally:
        for process in processes:
            process.kill()
            process.wait()


def company(loops: int) -> str:
    return f"beside {loops} busy loop{'s' * (loops > 1)}" if loops else "alone"
