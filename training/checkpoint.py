"""Checkpoints: all that training needs to go on exactly where it was.

A checkpoint is a folder ``checkpoint-<step>`` with the model's weights, the
optimizer's state and ``trainer_state.json`` (step, counters, file sizes). It is
written beside its place and moved there when whole, so a kill or a full disk
leaves the one before as it was. There is no random state in it: every batch
and its dropout follow from the seed and the batch's number.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backends.interface import InputError, Weights
from backends.pretrained import read_safetensors, write_json, write_safetensors

NAME = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class Checkpoint:
    path: Path
    step: int
    state: Mapping[str, Any]
    """What the loop keeps: counters and running sums."""

    def weights(self) -> Weights:
        return read_safetensors(self.path / "model.safetensors")

    def optimizer(self) -> Weights:
        return read_safetensors(self.path / "optimizer.safetensors")


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, the newest last."""
    found = [path for path in folder.glob("checkpoint-*") if NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def save(folder: Path, step: int, model: Weights, optimizer: Weights, state: Mapping[str, Any], keep: int) -> Path:
    """Writes ``checkpoint-<step>`` and removes all but the newest `keep`.

    Raises:
        OSError: the disk is full or not writable; earlier checkpoints are as they were.
    """
    temporary = folder / f".checkpoint-{step}.partial"
    target = folder / f"checkpoint-{step}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        write_safetensors(temporary / "model.safetensors", model)
        write_safetensors(temporary / "optimizer.safetensors", optimizer)
        sizes = {path.name: path.stat().st_size for path in temporary.iterdir()}
        write_json(temporary / "trainer_state.json", {"step": step, "files": sizes, **state})
        shutil.rmtree(target, ignore_errors=True)
        os.rename(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def newest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint, or None if there is none yet.

    Raises:
        InputError: it is damaged.
    """
    found = checkpoints(folder)
    if not found:
        return None
    path = found[-1]
    before = (
        f"; remove that folder to resume from {found[-2].name}" if len(found) > 1 else "; start anew with --overwrite"
    )
    try:
        state = json.loads((path / "trainer_state.json").read_text())
        step, files = int(state.pop("step")), dict(state.pop("files"))
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{path / 'trainer_state.json'}: damaged or missing ({error!r}){before}") from error
    for name, size in files.items():
        there = (path / name).stat().st_size if (path / name).exists() else 0
        if there != size:
            raise InputError(f"{path / name}: truncated, {there} bytes where {size} were written{before}")
    return Checkpoint(path, step, state)
