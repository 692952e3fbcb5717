"""PaddlePaddle, with the models of paddlenlp."""

import contextlib
import io
import os
import warnings

# Paddle computes on one thread unless told otherwise before it is imported.
os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))

# What Paddle says on import of threads, ccache and distutils is not for this program's users.
with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
    warnings.simplefilter("ignore")
    from backends.paddle.core import PaddleBackend

BACKEND = PaddleBackend
