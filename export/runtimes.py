"""Runtimes that compute an ONNX file: ONNX Runtime, and OpenVINO where its package is installed."""

from __future__ import annotations

import io
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, cached_property, partial
from importlib.util import find_spec
from queue import SimpleQueue
from typing import Any, Literal, get_args

import numpy as np
import onnxruntime

from backends.files import InputError
from backends.interface import Precision
from backends.threads import crowded
from export.int8 import with_signed_factors

RuntimeName = Literal["onnxruntime", "openvino"]
NAMES: Mapping[RuntimeName, str] = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
SHAPES = 64
"""Sizes of batches for which OpenVINO's preparations are kept. It gives none of them back, some MiB each: at one more
the model is compiled anew."""
Feed = Mapping[str, np.ndarray]
Run = Callable[[Sequence[str], Feed], list[np.ndarray]]
"""Names of outputs, inputs -> the outputs."""


def installed() -> list[RuntimeName]:
    """Returns the runtimes whose packages are there."""
    return [name for name in get_args(RuntimeName) if find_spec(name) is not None]


class Runtime(ABC):
    """A file, opened for computation.

    Args:
        content: bytes of an ONNX file that `export.admission` let pass.
        threads: that compute.
    """

    name: RuntimeName
    refused: Collection[str] = ()
    """Operators that it does not run, or not within bounds."""
    on_cpu = True

    def __init__(self, content: bytes, threads: int) -> None:
        self.threads = threads
        self._whole = self._open(content, threads, 1)
        self._content = content if threads > 1 and self.on_cpu else b""

    @abstractmethod
    def _open(self, content: bytes, threads: int, runs: int) -> Run:
        """Returns a function that computes by so many threads each time, and may be called so many times at once."""

    def compute(self, outputs: Sequence[str], feeds: Sequence[Feed]) -> list[list[np.ndarray]]:
        """Computes the outputs of each of some parts. Where there are several, a CPU's threads compute a part each, and
        do not wait for each other within every operator; a part that is alone gets all threads, unless other programs
        want their processors."""
        if self.threads == 1 or not self.on_cpu or (len(feeds) == 1 and not crowded.is_set()):
            return [self._whole(outputs, feed) for feed in feeds]
        return list(self._pool.map(partial(self._single, outputs), feeds))

    @cached_property
    def _single(self) -> Run:
        content, self._content = self._content, b""
        return self._open(content, 1, self.threads)

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self.threads)


class OnnxRuntime(Runtime):
    """ONNX Runtime.

    Args:
        provider: the execution provider.
    """

    name = "onnxruntime"

    def __init__(self, content: bytes, threads: int, provider: str = "CPUExecutionProvider") -> None:
        self._provider, self.on_cpu = provider, provider == "CPUExecutionProvider"
        super().__init__(content, threads)

    def _open(self, content: bytes, threads: int, runs: int) -> Run:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        # What was checked is ONNX; the same bytes could be a file of ONNX Runtime's own format too.
        options.add_session_config_entry("session.load_model_format", "ONNX")
        session = onnxruntime.InferenceSession(content, options, providers=[self._provider], enable_fallback=0)
        session._model_bytes = None  # which it would keep for good

        def run(outputs: Sequence[str], feed: Feed) -> list[np.ndarray]:
            values: Any = session.run(list(outputs), feed)
            return values

        return run


class OpenVino(Runtime):
    """OpenVINO.

    Args:
        precision: of what the file has in float32. In INT8 files bfloat16 for the rest saves a few per cent of the
            time; but some answers then depend on how long the texts are that are computed with them.
    """

    name = "openvino"
    # Indices beyond a tensor are an error on ONNX Runtime; here most of these write or read what lies there.
    refused = (
        "Compress",
        "GatherND",
        "LabelEncoder",
        "Loop",
        "NonZero",
        "RegexFullMatch",
        "ScatterElements",
        "ScatterND",
    )

    def __init__(self, content: bytes, threads: int, precision: Precision = "float32") -> None:
        self._precision = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}[precision]
        super().__init__(content, threads)

    def _open(self, content: bytes, threads: int, runs: int) -> Run:
        core = _openvino()
        settings = {
            "INFERENCE_NUM_THREADS": threads * runs,
            "NUM_STREAMS": runs,
            "INFERENCE_PRECISION_HINT": self._precision,
            # Pinning starts at the first processor, so two programs with few threads would share it.
            "ENABLE_CPU_PINNING": threads * runs >= len(os.sched_getaffinity(0)),
        }
        model, lock = self._read(core, content), threading.Lock()

        def opened() -> SimpleQueue[Any]:
            compiled = core.compile_model(model, "CPU", settings)
            requests: SimpleQueue[Any] = SimpleQueue()
            for _ in range(runs):
                requests.put(compiled.create_infer_request())
            return requests

        requests = opened()
        shapes: set[tuple[int, ...]] = set()

        def run(outputs: Sequence[str], feed: Feed) -> list[np.ndarray]:
            nonlocal requests
            with lock:
                shape = next(iter(feed.values())).shape
                if len(shapes) == SHAPES and shape not in shapes:
                    requests = opened()
                    shapes.clear()
                shapes.add(shape)
                mine = requests
            request = mine.get()
            try:
                values = request.infer(dict(feed), share_inputs=True)
                return [values[name] for name in outputs]
            finally:
                mine.put(request)

        return run

    def _read(self, core: Any, content: bytes) -> Any:
        from openvino.frontend import FrontEndManager

        # What was checked is ONNX; `read_model` would guess, and the same bytes could be another format too.
        onnx = FrontEndManager().load_by_framework("onnx")
        return onnx.convert(onnx.load(io.BytesIO(with_signed_factors(content))))


@cache
def _openvino() -> Any:
    try:
        import openvino
    except ModuleNotFoundError as error:
        raise InputError("--runtime openvino: not installed; pip install openvino") from error
    return openvino.Core()


RUNTIMES: Mapping[RuntimeName, type[Runtime]] = {"onnxruntime": OnnxRuntime, "openvino": OpenVino}
