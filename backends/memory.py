"""A process' memory: how much it is, and the C library's allocator as training on a CPU wants it."""

from __future__ import annotations

import contextlib
import ctypes
from pathlib import Path

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h


def keep_freed_memory() -> None:
    """Lets malloc keep what is freed for what is allocated next.

    glibc gives blocks over 128 KiB back to the system as soon as they are free.
    A training step allocates the same blocks as the step before, and taking them
    from the system again, page by page, costs more than computing on them. Other
    C libraries are left as they are.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def resident() -> tuple[int, int]:
    """Bytes of this process that lie in memory now, and at most so far, its libraries included."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    now, most = (int(status.partition(f"{name}:")[2].split()[0]) << 10 for name in ("VmRSS", "VmHWM"))
    return now, most
