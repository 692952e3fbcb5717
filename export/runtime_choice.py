"""Choice of a runtime: the fastest of those that are installed, for a file on this machine."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Literal, cast

import numpy as np

from backends.files import InputError, digest, write_json
from backends.interface import Batch
from export.model import OnnxModel
from export.runtimes import NAMES, RUNTIMES, RuntimeName, installed
from programs.console import say
from training.report import processor

RuntimeChoice = Literal["auto", "onnxruntime", "openvino"]
BATCHES = ((1, 32), (16, 64))
"""Texts and tokens of the batches that runtimes are compared with: a request alone, and many texts."""
ROUNDS = 5
KEPT = 100
"""Measurements that are kept."""


def open_model(path: Path, threads: int, choice: RuntimeChoice) -> OnnxModel:
    """Opens a file on the runtime of the user's choice.

    ``auto`` takes the fastest of those that are installed; what was measured is kept for the next time.

    Raises:
        InputError: as `OnnxModel`; or the runtime is not installed, or does not run files of this kind.
    """
    if choice != "auto":
        model = OnnxModel(path, threads, RUNTIMES[choice])
        if choice == "openvino" and model.description.quantized.startswith("dynamic"):
            say(f"{path}: is quantized dynamically, which is slow on {NAMES[choice]}; static files are fast there")
        return model
    model = OnnxModel(path, threads)
    if installed() == [model.runtime.name]:
        return model
    with path.open("rb") as content:
        versions = [f"{name} {import_module(name).__version__}" for name in installed()]
        key = ", ".join([digest(content), processor(), f"{model.threads} threads", *versions])
    known = _kept().get(key)
    models = {model.runtime.name: model}
    for name in installed() if known != model.runtime.name else ():
        if name != model.runtime.name:
            try:
                models[name] = OnnxModel(path, threads, RUNTIMES[name])
            except InputError as error:
                say(f"--runtime auto: {NAMES[model.runtime.name]} ({error})")
                return model
    if known is not None:
        say(f"--runtime auto: {NAMES[known]}, the fastest for {path} when it was measured")
        return models[known]
    seconds = compare({name: model_runs(opened) for name, opened in models.items()})
    best = min(seconds, key=seconds.__getitem__)
    measured = ", ".join(f"{NAMES[name]} {1000 * taken:.1f} ms" for name, taken in seconds.items())
    shapes = " and ".join(f"{texts} x {tokens}" for texts, tokens in BATCHES)
    say(f"--runtime auto: {NAMES[best]} for {path} ({measured}; geometric mean of batches of {shapes} tokens)")
    with suppress(OSError, RuntimeError):  # no folder: measured again the next time
        _cache().parent.mkdir(parents=True, exist_ok=True)
        kept = [entry for entry in _kept().items() if entry[0] != key]
        write_json(_cache(), dict([*kept[1 - KEPT :], (key, best)]))
    return models[best]


def model_runs(model: OnnxModel) -> list[Callable[[], object]]:
    """Returns functions that compute `BATCHES` of random tokens."""
    return [partial(model.run, random_batch(model, texts, tokens)) for texts, tokens in BATCHES]


def random_batch(model: OnnxModel, texts: int, tokens: int) -> Batch:
    """Returns so many rows of random tokens, of as many as the model takes at most."""
    shape = (texts, min(tokens, model.description.max_seq_length))
    ids = np.random.default_rng(0).integers(0, len(model.description.vocabulary), shape)
    return Batch(ids, np.zeros_like(ids), np.ones_like(ids))


def compare(contenders: Mapping[RuntimeName, list[Callable[[], object]]]) -> dict[RuntimeName, float]:
    """Returns the geometric means, over several functions, of the median seconds of `ROUNDS` rounds, in which
    contenders take turns; a round before them is not counted."""
    seconds: dict[RuntimeName, list[list[float]]] = {name: [] for name in contenders}
    for _ in range(1 + ROUNDS):
        for name, runs in contenders.items():
            taken = []
            for run in runs:
                start = time.perf_counter()
                run()
                taken.append(time.perf_counter() - start)
            seconds[name].append(taken)
    return {
        name: statistics.geometric_mean(map(statistics.median, zip(*rounds[1:]))) for name, rounds in seconds.items()
    }


def _cache() -> Path:
    """The file of what was measured on this machine."""
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(folder) / "minilm-duet" / "runtimes.json"


def _kept() -> dict[str, RuntimeName]:
    """Returns the fastest runtime of each file that was measured; nothing of what is no such record."""
    try:
        content = json.loads(_cache().read_text(encoding="utf-8"))
    except (OSError, RuntimeError, ValueError):
        return {}
    if not isinstance(content, dict):
        return {}
    return {key: cast(RuntimeName, name) for key, name in content.items() if isinstance(name, str) and name in RUNTIMES}
