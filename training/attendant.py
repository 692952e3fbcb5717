"""The parent of one of several processes, so that the signal that ends it is known: a launcher would not say, and who
is no parent can only guess. Runs as a script, with the program's path and arguments, and imports nothing large."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from pathlib import Path

ENDS = "MINILM_ENDS"
"""Environment variable: the folder where each process leaves how it ended, for the one that launched it to tell."""
RANKS = ("RANK", "PADDLE_TRAINER_ID")
"""Environment variables that launchers set."""
PR_SET_PDEATHSIG = 1


def rank() -> int | None:
    """Which of several processes this is; None if it is alone."""
    found = [int(os.environ[name]) for name in RANKS if os.environ.get(name, "").isdigit()]
    return found[0] if found else None


def leave(folder: Path, name: str, content: str) -> None:
    """Writes a word in the folder of `ENDS`, whole."""
    new = folder / f"new-{name.replace('.', '-')}"
    new.write_text(content, encoding="utf-8")
    new.replace(folder / name)


def main(command: list[str]) -> int:
    """Runs a program as a child, which dies with this process, and ends as it ends."""
    folder, prctl = Path(os.environ[ENDS]), ctypes.CDLL(None).prctl
    child = subprocess.Popen(
        [sys.executable, "-u", *command],
        preexec_fn=lambda: prctl(PR_SET_PDEATHSIG, signal.SIGKILL),
        start_new_session=True,  # signals to this process' group come once, from here
    )
    signals = signal.SIGINT, signal.SIGTERM
    for number in signals:
        signal.signal(number, lambda number, _: child.send_signal(number))
    leave(folder, f"{rank()}.pid", str(child.pid))
    code = child.wait()
    (folder / f"{rank()}.pid").unlink(missing_ok=True)
    if code >= 0:
        return code
    if not any(folder.glob(f"{rank()}.[0-9]*")):
        hint = "; the system does that when memory runs out" if -code == signal.SIGKILL else ""
        leave(folder, f"{rank()}.{128 - code}", f"error: ended by {signal.Signals(-code).name}{hint}")
    for number in signals:
        signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
    return 128 - code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
