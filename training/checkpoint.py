"""Checkpoints: all that training needs to go on exactly where it was.

A checkpoint is a folder ``checkpoint-<step>`` with the model's weights, the
optimizer's state and ``trainer_state.json`` (step, counters, files' sizes and hashes, and its own hash). It is
written beside its place and moved there when whole, so a kill or a full disk
leaves the one before as it was. There is no random state in it: every batch
and its dropout follow from the seed and the batch's number.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backends.files import InputError, digest, read_sealed, write_sealed
from backends.interface import Weights
from backends.pretrained import read_safetensors, write_safetensors
from programs.console import say

NAME = re.compile(r"checkpoint-(0|[1-9][0-9]*)")
MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "trainer_state.json"


@dataclass(frozen=True)
class Checkpoint:
    path: Path
    step: int
    state: Mapping[str, Any]
    """What the loop keeps: counters and running sums."""

    def weights(self) -> Weights:
        return read_safetensors(self.path / MODEL)

    def optimizer(self) -> Weights:
        return read_safetensors(self.path / OPTIMIZER)


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, whole or not, the newest last. What has such a name and holds anything else is none."""
    folders = [path for path in folder.glob("checkpoint-*") if NAME.fullmatch(path.name) and path.is_dir()]
    return sorted((path for path in folders if {*os.listdir(path)} <= {MODEL, OPTIMIZER, STATE}), key=_step)


def remove(path: Path) -> None:
    """Deletes a checkpoint, but none that lies elsewhere and is only linked to."""
    if not path.is_symlink():
        shutil.rmtree(path)


def folder_of(folder: Path, step: int) -> Path:
    return folder / f"checkpoint-{step}"


def _step(path: Path) -> int:
    return int(path.name.removeprefix("checkpoint-"))


def save(
    folder: Path, step: int, model: Weights, optimizer: Weights, state: Mapping[str, Any], keep: int, keep_every: int
) -> Path:
    """Writes ``checkpoint-<step>`` and removes older ones.

    Args:
        keep: newest ones that stay.
        keep_every: those of steps that are multiples of it stay too, if it is not 0.

    Raises:
        OSError: the disk is full or not writable, or what has the checkpoint's name is none; earlier checkpoints
            are as they were.
    """
    target = folder_of(folder, step)
    if os.path.lexists(target) and (target.is_symlink() or target not in checkpoints(folder)):
        raise FileExistsError(f"{target}: is in the way, and not a checkpoint of this run; move it away")
    temporary = folder / f".{target.name}.partial"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        write_safetensors(temporary / MODEL, model)
        write_safetensors(temporary / OPTIMIZER, optimizer)
        files = {path.name: _digest(path) for path in temporary.iterdir()}
        write_sealed(temporary / STATE, {"step": step, "files": files, **state})
        shutil.rmtree(target, ignore_errors=True)
        os.rename(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    earlier = [path for path in checkpoints(folder) if _step(path) <= step]
    broken = [path for path in checkpoints(folder) if _step(path) > step]  # passed over, or the run would be further
    for old in earlier[:-keep]:
        if not keep_every or _step(old) % keep_every:
            remove(old)
    for path in broken:
        remove(path)
    return target


def newest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that is whole, or None if there is none yet; says which were not, and why.

    Raises:
        InputError: there are some, but none is whole.
    """
    broken = []
    for path in reversed(checkpoints(folder)):
        try:
            return _read(path)
        except (OSError, ValueError) as error:
            broken.append(f"{path} is passed over: {error}")
            say(broken[-1])
    if broken:
        raise InputError(f"--resume: no checkpoint in {folder} is whole ({broken[0]}); start anew with --overwrite")
    return None


def _read(path: Path) -> Checkpoint:
    """A checkpoint; raises OSError or ValueError if it is not whole."""
    if not (path / STATE).is_file():
        raise ValueError(f"{STATE} is missing")
    state = read_sealed(path / STATE)
    step = state.pop("step")
    for name, written in state.pop("files").items():
        _check(path / name, written)
    return Checkpoint(path, step, state)


def _check(path: Path, written: Mapping[str, Any]) -> None:
    """Raises ValueError if a file is not what was written."""
    size = path.stat().st_size if path.exists() else 0
    if size != written["size"]:
        raise ValueError(f"{path.name} is truncated, {size} bytes where {written['size']} were written")
    if _digest(path) != written:
        raise ValueError(f"{path.name} is not what was written (its hash is another)")


def _digest(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"size": path.stat().st_size, "sha256": digest(file)}
