"""The folder of a run: whose it is, and with what arguments it was begun."""

from __future__ import annotations

import dataclasses
import fcntl
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from backends.interface import InputError
from backends.pretrained import atomically

RECORD = "arguments.yaml"
LOCK = ".lock"


def check_output(output: Path, arguments: Any, free_to_change: Collection[str], kept: Collection[str] = ()) -> None:
    """Refuses a folder that a run must not write to.

    Args:
        arguments: a dataclass with ``resume`` and ``overwrite``.
        free_to_change: arguments that may differ when a run is resumed.
        kept: names of files that belong to no run.

    Raises:
        InputError: it is a file; or holds what is not a run's; or holds a run, and neither --resume nor
            --overwrite was given, or the run had other arguments.
    """
    record = output / RECORD
    if output.exists() and not output.is_dir():
        raise InputError(f"--output_dir {output}: is a file; give a folder")
    if not record.exists():
        # A run that was killed at its start may have left its record half written.
        others = [path for path in output.glob("*") if path.name != LOCK and not path.name.startswith(f".{RECORD}.")]
        if any(path.name not in kept for path in others):
            raise InputError(f"--output_dir {output}: holds files that are not a run's; give a new or empty folder")
    elif not (arguments.resume or arguments.overwrite):
        raise InputError(
            f"--output_dir {output}: holds another run; --resume goes on with it, "
            "--overwrite deletes it and starts anew"
        )
    elif arguments.resume:
        before = yaml.safe_load(record.read_text(encoding="utf-8"))
        changed = [
            f"{key} was {before.get(key)!r}, now {value!r}"
            for key, value in dataclasses.asdict(arguments).items()
            if key not in free_to_change and before.get(key) != value
        ]
        if changed:
            raise InputError(
                f"--resume: the run in {output} had other arguments ({'; '.join(changed)}); "
                "give the same, or --overwrite"
            )


class Occupied(InputError):
    """Another run works in the folder."""


@contextmanager
def claim(output: Path, arguments: Any, kept: Collection[str] = ()) -> Iterator[None]:
    """Makes a folder this run's, and with --overwrite deletes what another left there: all that
    could be wrong with the arguments has been checked. Meanwhile other runs are kept out, where the file system
    has locks; a process that dies lets go.

    Raises:
        Occupied: another run has the folder.
    """
    output.mkdir(parents=True, exist_ok=True)
    with (output / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Occupied(
                f"--output_dir {output}: another run works there; let it end, or give another folder"
            ) from error
        except OSError:  # no locks
            pass
        for path in output.iterdir() if arguments.overwrite and not arguments.resume else ():
            if path.is_dir() and path.name not in kept:
                shutil.rmtree(path)
            elif path.is_file() and path.name != LOCK:
                path.unlink()
        settings = dataclasses.asdict(dataclasses.replace(arguments, resume=False, overwrite=False))
        with atomically(output / RECORD) as temporary:
            temporary.write_text(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True), encoding="utf-8")
        yield
