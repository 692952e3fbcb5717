"""PaddlePaddle, with the models of paddlenlp."""

import logging
import os
import warnings

# Paddle computes on one thread unless told otherwise before it is imported.
os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))

with warnings.catch_warnings():
    # What Paddle's dependencies say about ccache and distutils is not for this program's users.
    warnings.simplefilter("ignore")
    from backends.paddle.core import PaddleBackend

logging.getLogger("paddlenlp").setLevel(logging.ERROR)

BACKEND = PaddleBackend
