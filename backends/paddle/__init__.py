"""PaddlePaddle, with the models of paddlenlp."""

import contextlib
import io
import os
import warnings

# What must be said before Paddle is imported. It computes on one thread unless told otherwise.
os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
# Its matrix products are MKL's of 2019, which does not look at what other makers' processors
# can do, and takes its slowest code there. 7 is the code for AVX-512, 5 the one for AVX2.
if os.path.exists("/proc/cpuinfo"):
    with open("/proc/cpuinfo", encoding="utf-8") as cpuinfo:
        processor = cpuinfo.read()
    if "AuthenticAMD" in processor:
        kind = "7" if " avx512bw " in processor else "5" if " avx2 " in processor else None
        if kind:
            os.environ.setdefault("MKL_DEBUG_CPU_TYPE", kind)

# What Paddle says on import of threads, ccache and distutils is not for this program's users.
with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
    warnings.simplefilter("ignore")
    from backends.paddle.core import PaddleBackend

BACKEND = PaddleBackend
