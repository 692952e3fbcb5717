"""``python training/launcher.py MODULE``: a framework's launcher, which leaves how signals ended what it started.

A process that is killed can leave no word itself, and only the one that started it learns for sure by what it was.
"""

from __future__ import annotations

import minilm_duet

if __name__ == "__main__":
    minilm_duet.begin()

import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from programs.ends import ENDS, leave, rank


class Process(subprocess.Popen[Any]):
    """A process; if it is one of several that train together, its number and its end are left in the folder `ENDS`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._folder = Path(os.environ[ENDS])
        self._rank = rank(kwargs.get("env") or {})
        if self._rank is not None:
            leave(self._folder, f"{self._rank}.pid", str(self.pid))

    def poll(self) -> int | None:
        code = super().poll()
        self._leave_end()
        return code

    def wait(self, timeout: float | None = None) -> int:
        code = super().wait(timeout)
        self._leave_end()
        return code

    def _leave_end(self) -> None:
        if self.returncode is None or self._rank is None:
            return
        (self._folder / f"{self._rank}.pid").unlink(missing_ok=True)
        number = -self.returncode
        if number > 0 and not any(self._folder.glob(f"{self._rank}.[0-9]*")):
            hint = "; the system does that when memory runs out" if number == signal.SIGKILL else ""
            leave(self._folder, f"{self._rank}.{128 + number}", f"error: ended by {signal.Signals(number).name}{hint}")


if __name__ == "__main__":
    subprocess.Popen = Process  # type: ignore[misc]
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
