"""Workers: what they answer, how they fail, and that nothing is left of them."""

import os
import signal
import subprocess
import sys
import time
from contextlib import closing

import pytest
from conftest import environment

from programs.worker import Worker, WorkerEnded, WorkerFailed


class Counter:
    """An object whose methods a worker calls."""

    def __init__(self, start=0):
        if start < 0:
            raise ValueError(f"start {start}")
        self.count = start

    def add(self, number):
        self.count += number
        return self.count

    def divide(self, number):
        return self.count / number

    def process(self):
        return os.getpid()

    def threads(self):
        return os.environ["OMP_NUM_THREADS"]

    def kill(self):
        os.kill(os.getpid(), signal.SIGKILL)


def is_running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_calls_are_answered_by_one_object_in_a_process_of_its_own():
    with closing(Worker("counter", Counter, 3)) as worker:
        worker.wait()
        assert worker.call("add", 4) == 7
        assert worker.call("add", 1) == 8
        assert worker.call("process") != os.getpid()


def test_workers_start_at_the_same_time_and_keep_their_answers_apart():
    with closing(Worker("first", Counter, 1)) as first, closing(Worker("second", Counter, 2)) as second:
        assert [first.call("add", 1), second.call("add", 1), first.call("add", 1)] == [2, 3, 3]


def test_threads_are_those_asked_for_then_those_of_the_environment_then_all(monkeypatch):
    def threads(**options):
        with closing(Worker("counter", Counter, **options)) as worker:
            return worker.call("threads")

    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert threads(threads=3) == "3"
    assert threads() == "5"
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert threads() == str(len(os.sched_getaffinity(0)))


def test_an_exception_in_a_method_is_passed_on():
    with closing(Worker("counter", Counter)) as worker:
        with pytest.raises(WorkerFailed) as failure:
            worker.call("divide", 0)
        assert str(failure.value) == "counter: ZeroDivisionError('division by zero')"
        assert isinstance(failure.value.__cause__, ZeroDivisionError)
        with pytest.raises(WorkerEnded):
            worker.call("add", 1)


@pytest.mark.parametrize("first", [Worker.wait, lambda worker: worker.call("add", 1)])
def test_an_exception_before_the_first_call_is_passed_on(first):
    with closing(Worker("counter", Counter, -1)) as worker:
        with pytest.raises(WorkerFailed) as failure:
            first(worker)
        assert str(failure.value) == "counter: ValueError('start -1')"


def test_a_killed_worker_is_named():
    with closing(Worker("counter", Counter)) as worker:
        with pytest.raises(WorkerEnded) as failure:
            worker.call("kill")
        assert str(failure.value) == "counter: its process was ended, perhaps for want of memory"


def test_a_worker_killed_between_calls_is_named():
    with closing(Worker("counter", Counter)) as worker:
        os.kill(worker.call("process"), signal.SIGKILL)
        worker._process.join()
        with pytest.raises(WorkerEnded, match="^counter: its process was ended"):
            worker.call("add", 1)


def test_nothing_is_left_of_a_closed_worker():
    worker = Worker("counter", Counter)
    pid = worker.call("process")
    worker.close()
    assert not is_running(pid)
    assert worker._process.exitcode == 0


def test_a_worker_at_work_is_closed_at_once():
    worker = Worker("counter", time.sleep, 600)
    pid = worker._process.pid
    worker.close()
    assert not is_running(pid)


@pytest.mark.parametrize("end", ["", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_a_worker_ends_with_its_owner(end):
    """Whether its owner returns without closing it or is killed: no process keeps standard output open."""
    script = f"""
import os, signal
from programs.worker import Worker
from test_worker import Counter
if __name__ == "__main__":
    print(Worker("counter", Counter).call("add", 1), flush=True)
    {end}
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment(), stdout=subprocess.PIPE, text=True, timeout=60)
    assert done.stdout == "1\n"
