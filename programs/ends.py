"""How programs end: what stops one, and how one of several processes tells the launcher of its end."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

ENDS = "MINILM_ENDS"
"""Environment variable: the folder where each process leaves how it ended, for the one that launched it to tell."""
RANKS = ("RANK", "PADDLE_TRAINER_ID")
"""Environment variables that launchers set."""


class TrainingFailed(RuntimeError):
    """Training cannot go on; the message says where it was and what is left."""


class Preempted(Exception):
    """SIGTERM ended training in good order; the message says where it was."""


def rank(environment: Mapping[str, str] = os.environ) -> int | None:
    """Which of several processes this is, or one in another environment; None if it is alone."""
    ranks = [int(environment[name]) for name in RANKS if environment.get(name, "").isdigit()]
    return ranks[0] if ranks else None


def end(code: int, message: str) -> None:
    """Leaves how this process ended, or, if it is alone, tells."""
    if ENDS not in os.environ or rank() is None:
        if code or rank() in (None, 0):
            print(message, file=sys.stderr)
        return
    leave(Path(os.environ[ENDS]), f"{rank()}.{code}", message)


def leave_process(code: int) -> NoReturn:
    """Ends this process. One of several ends at once after what is registered for its end: while an interpreter is torn
    down, threads of the frameworks' communication can abort it, and the launcher would call a finished run failed."""
    if rank() is None:
        sys.exit(code)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def leave(folder: Path, name: str, content: str) -> None:
    """Writes a file of the folder that `ENDS` names."""
    new = folder / f"new-{name.replace('.', '-')}"
    new.write_text(content, encoding="utf-8")
    new.replace(folder / name)
