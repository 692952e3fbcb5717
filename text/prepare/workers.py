"""Workers that do the tasks: this machine's processes, or a Ray cluster."""

from __future__ import annotations

import logging
import multiprocessing
import os
import select
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from typing import Any

import minilm_duet
from backends.files import InputError
from text.prepare.pipeline import R, RunTasks, T


def on_this_machine(processes: int) -> RunTasks:
    """Makes a `RunTasks` of so many processes; 0 is one for each core."""
    count = processes or len(os.sched_getaffinity(0))
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a core has its process already
    context = multiprocessing.get_context("forkserver")
    if hasattr(sys.flags, "safe_path"):  # before Python 3.11 it would take a text/ of the user's for ours
        context.set_forkserver_preload(["text.prepare.pipeline"])

    def run_tasks(task: Any, items: Sequence[T]) -> Iterator[R]:
        if count == 1:
            yield from map(task, items)
            return
        with ProcessPoolExecutor(count, context, _end_with, (os.getpid(),)) as pool:
            try:
                for future in as_completed([pool.submit(task, item) for item in items]):
                    yield future.result()
            except BrokenProcessPool as error:
                raise ChildProcessError("a process was killed, perhaps for want of memory") from error
            finally:
                pool.shutdown(cancel_futures=True)

    return run_tasks


def _end_with(pid: int) -> None:
    """Ends this process when process `pid` has ended, for whatever reason."""

    def wait() -> None:
        with suppress(ProcessLookupError):
            select.select([os.pidfd_open(pid)], [], [])
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _reach(address: str) -> None:
    """Raises InputError unless HOST:PORT can be reached; Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, ValueError) as error:
        raise InputError(f"--ray {address}: no cluster there ({error}); 'ray start --head' starts one") from error


def on_ray(address: str, processes: int) -> RunTasks:
    """Makes an `RunTasks` of a Ray cluster, one task a core; a task whose worker dies is done again by another.

    All machines must have the project installed and see input and output under the same paths.

    Args:
        address: ``local`` starts a cluster on this machine, bound to loopback; ``auto`` or HOST:PORT joins one.
        processes: how many a local cluster has; 0 is one for each core.

    Raises:
        InputError: Ray is not installed, or there is no cluster at the address.
    """
    try:
        import ray
    except ImportError as error:
        install = "pip install -c constraints.txt -e '.[ray]'"
        raise InputError(f"--ray: Ray is not installed; install with: {install}, in the project's folder") from error
    if address not in ("local", "auto"):
        _reach(address)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    environment = {"env_vars": {"TOKENIZERS_PARALLELISM": "false"}}
    settings = {"_node_ip_address": "127.0.0.1", "include_dashboard": False, "num_cpus": processes or None}
    here = os.getcwd()
    try:
        os.chdir(minilm_duet.ROOT)  # where Ray is started its workers look for modules first
        ray.init(
            None if address == "local" else address,
            runtime_env=environment,
            log_to_driver=False,
            logging_level=logging.ERROR,
            **(settings if address == "local" else {}),
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise InputError(f"--ray {address}: no cluster there ({error}); 'ray start --head' starts one") from error
    finally:
        os.chdir(here)

    def run_tasks(task: Any, items: Sequence[T]) -> Iterator[R]:
        remote = ray.remote(max_retries=3)(task)
        waiting = [remote.remote(item) for item in items]
        while waiting:
            done, waiting = ray.wait(waiting)
            try:
                yield from ray.get(done)
            except ray.exceptions.RayTaskError as error:
                raise error.cause from None
            except ray.exceptions.RayError as error:
                raise ChildProcessError(f"Ray gave a task up: {' '.join(str(error).split())}") from error

    return run_tasks
