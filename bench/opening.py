"""A file that a runtime opens, in a process that has imported nothing yet."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # imports are among what is measured
    from export.model import OnnxModel
    from export.runtimes import RuntimeName

PARTS = ("process", "imports", "opening", "first answer")
"""What happens from the start of a process to the first answer."""
PROFILED = 10
"""Runs that operators are timed in."""


def opened(file: Path, runtime: RuntimeName, threads: int = 0) -> OnnxModel:
    """An ONNX file on a runtime; or one that NNCF wrote, an .xml beside the ``float32.onnx`` that it was made of."""
    from export.model import OnnxModel
    from export.runtimes import RUNTIMES

    if file.suffix != ".xml":
        return OnnxModel(file, threads, RUNTIMES[runtime])
    from export.benchmark.peers import NncfModel

    return OnnxModel(file.with_name("float32.onnx"), threads, NncfModel, file=file, precision="float32")


def runtimes_of(file: Path) -> list[RuntimeName]:
    """The installed runtimes that compute a file."""
    from export.runtimes import installed

    return [name for name in installed() if file.suffix != ".xml" or name == "openvino"]


class Opening:
    """A file, opened and asked once; a worker has one in its process.

    Args:
        begun: when the process was started, by `time.perf_counter`.
    """

    def __init__(self, file: Path, runtime: RuntimeName, threads: int, begun: float) -> None:
        times = [begun, time.perf_counter()]
        import_module(runtime)
        from backends.memory import resident
        from export.examples import from_object, sample

        times.append(time.perf_counter())
        before = resident()[0]
        self.model = opened(file, runtime, threads)
        times.append(time.perf_counter())
        self.model.answers([from_object(self.model, sample(self.model), 0)])
        times.append(time.perf_counter())
        self._seconds = dict(zip(PARTS, (after - start for start, after in pairwise(times))))
        self._bytes = {"imports": before, "first answer": resident()[0] - before}

    def measure(self, shapes: Sequence[tuple[int, int]], seconds: float) -> dict[str, Any]:
        """Seconds and bytes to the first answer, then milliseconds of batches of random tokens, of each for so many
        seconds, and the bytes that lie in memory after them."""
        from backends.memory import resident
        from export.runtime_choice import random_batch

        milliseconds = []
        for shape in shapes:
            batch = random_batch(self.model, *shape)
            self.model.run(batch)
            taken: list[float] = []
            while len(taken) < 3 or sum(taken) < seconds:
                start = time.perf_counter()
                self.model.run(batch)
                taken.append(time.perf_counter() - start)
            milliseconds.append(1000 * statistics.median(taken))
        memory = {**self._bytes, "after batches": resident()[0]}
        return {"seconds": self._seconds, "bytes": memory, "milliseconds": milliseconds}

    def operators(self, texts: int, tokens: int) -> dict[str, tuple[float, int]]:
        """Milliseconds that all operators of a kind take of a batch, which one thread computes whole, and how many
        operators they are."""
        from backends.interface import ONNX_INPUTS
        from export.runtime_choice import random_batch

        feed = dict(zip(ONNX_INPUTS, random_batch(self.model, texts, tokens)[:3]))
        profile = {"onnxruntime": _onnxruntime_profile, "openvino": _openvino_profile}[self.model.runtime.name]
        taken: dict[tuple[str, str], list[float]] = defaultdict(list)
        for kind, name, milliseconds in profile(self.model, feed):
            taken[kind, name].append(milliseconds)
        medians: dict[str, list[float]] = defaultdict(list)
        for (kind, _), values in taken.items():
            medians[kind].append(statistics.median(values))
        return {kind: (sum(values), len(values)) for kind, values in medians.items()}


def _onnxruntime_profile(model: OnnxModel, feed: Mapping[str, Any]) -> Iterator[tuple[str, str, float]]:
    """Kind, name and milliseconds of each operator in each run."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level, options.enable_profiling = 1, 3, True
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = onnxruntime.InferenceSession(str(model.path), options, providers=["CPUExecutionProvider"])
        for _ in range(PROFILED):
            session.run(None, feed)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    for event in events:
        if event["cat"] == "Node" and event["name"].endswith("_kernel_time"):
            yield event["args"]["op_name"], event["name"], event["dur"] / 1e3


def _openvino_profile(model: OnnxModel, feed: Mapping[str, Any]) -> Iterator[tuple[str, str, float]]:
    """Kind, name and milliseconds of each operator in each run."""
    import openvino

    core, runtime = openvino.Core(), model.runtime
    settings = {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32", "PERF_COUNT": True}
    compiled = core.compile_model(runtime._read(core, model.path.read_bytes()), "CPU", settings)  # type: ignore[attr-defined]
    request = compiled.create_infer_request()
    for _ in range(PROFILED):
        request.infer(dict(feed))
        for operator in request.profiling_info:
            if operator.status == openvino.ProfilingInfo.Status.EXECUTED:
                yield operator.node_type, operator.node_name, operator.real_time.total_seconds() * 1e3
