"""Threads sleep while other programs want the processors, and spin while none does."""

import os
import subprocess
import sys
import threading

import numpy as np
import pytest
from conftest import ROOT

from backends import threads

WORK = """
import time
while time.process_time() < 0.6: pass
"""
CHANGING = """
import ctypes, os, re, sys, time
import backends
from backends import threads

threads.INTERVAL, others = 0.02, [0.0]
threads.Taken.by_others = lambda self: others[0]
backend = backends.load(sys.argv[1], "cpu")
x = backend.tensor(__import__("numpy").ones((512, 512), "float32"))

def waste():
    "CPU time of threads that wait"
    spent = 0.0
    for _ in range(20):
        (x @ x).sum().item()
        start = time.process_time()
        time.sleep(0.02)
        spent += time.process_time() - start
    return spent

def after(crowd):
    others[0] = crowd
    time.sleep(0.5)
    return eval(sys.argv[2])

product = backend.numpy(x @ x)
quiet, crowded, again = after(0.0), after(9.0), after(0.0)
assert (backend.numpy(x @ x) == product).all()
print(quiet, crowded, again)
"""


def test_what_others_take_is_counted_and_not_what_this_process_does():
    taken = threads.Taken()
    start = taken._last[0]
    process = subprocess.Popen([sys.executable, "-c", WORK])
    sum(i for i in range(3_000_000))
    process.wait()
    others = taken.by_others() * (taken._last[0] - start)
    assert others > 0.5
    everything = (taken._last[0] - start) * len(os.sched_getaffinity(0))
    assert others < everything


@pytest.mark.parametrize(
    ("processors", "team", "others", "expected"),
    [(2, "", 0.1, False), (2, "", 0.9, True), (8, "4", 3.9, False), (8, "4", 4.5, True), (2, "1,1", 1.0, False)],
)
def test_processors_are_too_few_where_threads_and_others_need_more(monkeypatch, processors, team, others, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(processors)))
    monkeypatch.setenv("OMP_NUM_THREADS", team)
    assert threads.are_too_few(others) == expected


def run(framework, measured, **settings):
    environment = {key: value for key, value in os.environ.items() if key not in threads.SETTINGS}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2", **settings}
    done = subprocess.run(
        [sys.executable, "-c", CHANGING, framework, measured],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return tuple(map(float, done.stdout.split()[-3:]))


@pytest.mark.slow
def test_threads_that_wait_take_no_time_in_company(torch_backend):
    """Counted in the processor's time, not the clock's: another job on the machine makes no difference."""
    quiet, crowded, again = run("torch", "waste()")
    assert crowded < 0.5 * min(quiet, again)


@pytest.mark.slow
def test_intel_s_threads_sleep_at_once_in_company(paddle_backend):
    blocktime = "ctypes.CDLL(re.search(r'/\\S*/libiomp5[.]so', open('/proc/self/maps').read())[0]).kmp_get_blocktime()"
    quiet, crowded, again = run("paddle", blocktime)
    assert crowded == 0 < quiet == again == threads.BLOCKTIME


@pytest.mark.slow
def test_users_say_how_threads_wait(torch_backend):
    quiet, crowded, _ = run("torch", "waste()", GOMP_SPINCOUNT="300000")
    assert crowded > 0.5 * quiet


def test_a_lone_part_is_computed_by_one_thread_in_company(monkeypatch):
    """All threads for one part, one for each of several, one where others want processors."""
    from export import runtimes

    class Counted(runtimes.Runtime):
        def _open(self, content, threads, runs):
            return lambda outputs, feed: [np.array([threads, runs])]

    crowded = threading.Event()
    monkeypatch.setattr(runtimes, "crowded", crowded)
    runtime = Counted(b"", 2)
    assert np.array(runtime.compute(["logits"], [{}])).tolist() == [[[2, 1]]]
    assert np.array(runtime.compute(["logits"], [{}, {}])).tolist() == [[[1, 2]], [[1, 2]]]
    crowded.set()
    assert np.array(runtime.compute(["logits"], [{}])).tolist() == [[[1, 2]]]
