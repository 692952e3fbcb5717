"""Several processes of one program, under the launcher of its framework: torchrun, or paddle.distributed.launch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import backends
from backends.files import InputError
from programs.ends import ENDS, rank

HEADSTART = 10
"""Seconds: others may say that a process has left them before the launcher sees that a signal ended it."""


@dataclass(kw_only=True)
class Processes:
    """How many processes train together."""

    nproc: int = 0
    """processes on this machine; 0 starts one for each GPU that is visible"""
    nnodes: int = 1
    """machines"""
    node_rank: int = 0
    """which of them this is, from 0"""
    master: str | None = None
    """HOST:PORT of the first machine, where all meet"""

    def without_effect(self, on_command_line: Collection[str]) -> dict[str, str]:
        """Options that others keep from having an effect, each with the reason.

        Args:
            on_command_line: names of the options that the user gave there.
        """
        if rank() is not None and ENDS not in os.environ:
            started = "where a launcher started the processes; it says how many there are"
            return dict.fromkeys(("nproc", "nnodes", "node_rank", "master"), started)
        return {} if self.nnodes > 1 else {"master": "without --nnodes"}


def launch(processes: Processes, backend: str, device: str, script: Path, argv: Sequence[str]) -> int | None:
    """Runs a program in several processes and waits for them; returns its exit code, or None if one is enough,
    or if this is one of them.

    SIGTERM and SIGINT are passed on. When a process fails the launcher ends the others, and what the first said
    of it is printed.

    Args:
        script: the program's ``__main__.py``.

    Raises:
        InputError: counts, ranks or the address make no sense.
        KeyboardInterrupt: SIGINT came, and all have ended.
    """
    if rank() is not None:
        return None
    _check(processes)
    count = processes.nproc or _gpus(backend, device)
    if count * processes.nnodes == 1:
        return None
    with tempfile.TemporaryDirectory() as folder:
        launcher = str(Path(__file__).with_name("launcher.py"))
        command = [sys.executable, launcher, *_launcher(backend, processes, count, folder), "--", str(script), *argv]
        root = str(script.parents[1])
        paths = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, ENDS: folder, "PYTHONPATH": paths}
        environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // count)))
        process = subprocess.Popen(command, env=environment)
        interrupted: list[int] = []

        def interrupt(number: int, _: object) -> None:
            interrupted.append(number)
            process.send_signal(number)

        signal.signal(signal.SIGINT, interrupt)
        signal.signal(signal.SIGTERM, lambda number, _: _pass_on(number, process, Path(folder)))
        code = process.wait()
        if interrupted:
            raise KeyboardInterrupt
        return _report(Path(folder), code)


def _pass_on(number: int, process: subprocess.Popen[bytes], folder: Path) -> None:
    """Sends a signal to the launched processes, past the launcher: it would give them no more than 30 seconds."""
    pids = [int(path.read_text()) for path in folder.glob("*.pid")]
    for pid in pids or [process.pid]:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def _report(folder: Path, code: int) -> int:
    """Prints how processes ended, the first that failed before others; returns the exit code that says so."""

    def when(path: Path) -> tuple[bool, float]:
        by_signal = 128 < int(path.suffix[1:]) != 128 + signal.SIGTERM  # which is what launchers end the others by
        return path.suffix == ".0", path.stat().st_mtime - HEADSTART * by_signal

    ends = sorted(folder.glob("*.[0-9]*"), key=when)
    if not ends:
        if code:
            print(f"error: a process was ended (exit code {code}); the launcher says which, above", file=sys.stderr)
        return code
    message = ends[0].read_text(encoding="utf-8")
    own = int(ends[0].suffix[1:])
    print(message if own == 0 else f"rank {ends[0].stem}: {message}", file=sys.stderr)
    return own


def _gpus(backend: str, device: str) -> int:
    if device == "cpu":
        return 1
    loaded = backends.load(backend, "cpu")
    return max(1, sum(each.kind == "gpu" for each in loaded.devices()))


def _check(processes: Processes) -> None:
    if processes.nproc < 0 or processes.nnodes < 1 or not 0 <= processes.node_rank < processes.nnodes:
        raise InputError(
            f"--nproc {processes.nproc} --nnodes {processes.nnodes} --node_rank {processes.node_rank}: nproc must be "
            "at least 0, nnodes at least 1, node_rank from 0 to nnodes - 1"
        )
    host, _, port = (processes.master or "").rpartition(":")
    if processes.nnodes > 1 and not (host and port.isdigit()):
        raise InputError(f"--master {processes.master}: {processes.nnodes} machines need the first one's HOST:PORT")


def _launcher(backend: str, processes: Processes, count: int, folder: str) -> list[str]:
    host, _, port = (processes.master or "").rpartition(":")
    several = processes.nnodes > 1
    if backend == "torch":
        alone = ["--standalone", "--local_addr=127.0.0.1"]  # whatever the machine's name resolves to
        meeting = [f"--master_addr={host}", f"--master_port={port}"] if several else alone
        nodes = [f"--nnodes={processes.nnodes}", f"--node_rank={processes.node_rank}"] if several else []
        return ["torch.distributed.run", f"--nproc_per_node={count}", *nodes, *meeting]
    nodes = [f"--nnodes={processes.nnodes}", f"--rank={processes.node_rank}", f"--master={host}:{port}"]
    logs = ["--log_dir", f"{folder}/logs"]
    return ["paddle.distributed.launch", "--nproc_per_node", str(count), *(nodes if several else []), *logs]
