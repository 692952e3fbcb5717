"""What teachers answer to a training set, computed once and kept on disk.

A folder holds the answers of certain teachers to certain sequences: ``cache.json``, sealed, which says whose they are
and has the hash of each part, and parts of `SEQUENCES` sequences each, NumPy arrays of rows of logits, float32. A part
is listed once it is written, so what a kill leaves is whole. Parts are mapped into memory, not read.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from backends.files import InputError, atomically, digest, read_sealed, write_sealed
from backends.interface import Backend, Batch, Captured, Wanted
from backends.shape import Shape
from objectives.distillation import Teacher
from programs.console import say
from text.features import Features
from training.folder import alone_in
from training.prediction import predict

SEQUENCES = 4096
RECORD = "cache.json"


@dataclass
class TeacherCache:
    """Answers to a training set; a `Teacher` of logits alone.

    Args:
        folder: holds them, or will.
        key: whose answers they are, and to what.
        classes: logits in a row.
        shape: the teacher's.

    Raises:
        InputError: the folder holds something else, or is damaged.
    """

    backend: Backend
    folder: Path
    key: Mapping[str, str]
    features: Features
    classes: int
    shape: Shape
    _digests: dict[str, str] = field(init=False, default_factory=dict)
    _rows: dict[str, np.ndarray] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        sizes = np.ones(len(self.features), np.int64) if self.features.a_row_each else self.features.lengths
        self._ends = sizes.cumsum()
        self._starts = self._ends - sizes
        record = self.folder / RECORD
        if not record.exists():
            if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.glob("[!.]*"))):
                raise InputError(f"--cache_teacher {self.folder}: is no such cache; give a new or empty folder")
            return
        try:
            there = read_sealed(record)
            self._digests = there["parts"]
            for name, written in self._digests.items():
                with (self.folder / name).open("rb") as file:
                    if digest(file) != written:
                        raise ValueError(f"{name} is not what was written (its hash is another)")
                self._map(name)
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"--cache_teacher {self.folder}: {error}; delete the folder, or give another") from error
        for what, value in self.key.items():
            if there["key"].get(what) != value:
                was = there["key"].get(what)
                raise InputError(f"--cache_teacher {self.folder}: {what} was {was}, now {value}; give another folder")

    @property
    def _missing(self) -> list[int]:
        """Where parts begin that are not there."""
        return [start for start in range(0, len(self.features), SEQUENCES) if _name(start) not in self._rows]

    @property
    def whole(self) -> bool:
        return not self._missing

    def fill(self, teacher: Teacher) -> None:
        """Asks the teacher for what is missing; several processes share the work, and the first one writes.

        Raises:
            InputError: there is no room on the disk.
        """
        first = self.backend.rank == 0
        with alone_in(self.folder, "cache_teacher") if first else nullcontext():
            if first:
                rows = sum(last - begin for begin, last in map(self._span, self._missing))
                needed, free = 4 * self.classes * rows, shutil.disk_usage(self.folder).free
                if needed > free:
                    raise InputError(f"--cache_teacher {self.folder}: needs {needed} bytes, {free} are free there")
                self._record()
            for start in self._missing:
                numbers = range(start, min(start + SEQUENCES, len(self.features)))
                answers = predict(self.backend, teacher, self.features, numbers)
                if first:
                    self._write(_name(start), np.concatenate([np.atleast_2d(rows) for rows in answers]))
                    say(f"the teacher's answers: {numbers.stop} of {len(self.features)}")
                self.backend.barrier()  # the others find it written
                self._map(_name(start))

    def run(self, batch: Batch, wanted: Wanted) -> Captured:
        """The logits of a batch's sequences, by their numbers; raises ValueError unless they alone are wanted."""
        if wanted.states or wanted.qkv or not wanted.logits or batch.numbers is None:
            raise ValueError("only logits of the training set are kept")
        rows = []
        for number in batch.numbers.tolist():
            start = number - number % SEQUENCES
            base = self._starts[start]
            rows.append(self._rows[_name(start)][self._starts[number] - base : self._ends[number] - base])
        return Captured({}, {}, self.backend.tensor(np.concatenate(rows)))

    def _span(self, start: int) -> tuple[int, int]:
        """The rows of a part, among all."""
        return int(self._starts[start]), int(self._ends[min(start + SEQUENCES, len(self.features)) - 1])

    def _write(self, name: str, rows: np.ndarray) -> None:
        with atomically(self.folder / name) as temporary, temporary.open("wb") as file:
            np.save(file, rows, allow_pickle=False)
        with (self.folder / name).open("rb") as file:
            self._digests[name] = digest(file)
        self._record()

    def _record(self) -> None:
        write_sealed(self.folder / RECORD, {"key": dict(self.key), "parts": self._digests})

    def _map(self, name: str) -> None:
        """Maps a part; raises ValueError unless it has the right number of rows."""
        rows = np.load(self.folder / name, mmap_mode="r", allow_pickle=False)
        first, last = self._span(int(name.removeprefix("logits-").removesuffix(".npy")))
        if rows.shape != (last - first, self.classes) or rows.dtype != np.float32:
            raise ValueError(f"{name}: is {rows.dtype} {list(rows.shape)}, not float32 {[last - first, self.classes]}")
        self._rows[name] = rows


def _name(start: int) -> str:
    return f"logits-{start:09}.npy"
