"""The folder of a run: whose it is, with what arguments it was begun, and what it reads."""

from __future__ import annotations

import dataclasses
import fcntl
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from backends.files import LONGEST, InputError, atomically, check_regular, read_sealed, write_sealed
from backends.pretrained import fingerprint
from programs.console import say

CARD = "README.md"
RECORD = "arguments.yaml"
INPUTS = "inputs.json"
LOCK = ".lock"


class _Plain(yaml.SafeLoader):
    """Without aliases, by which a small file becomes a large one."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("an alias where a value is expected")
        return super().compose_node(parent, index)


def read_record(path: Path) -> dict[str, Any]:
    """The arguments that a run was begun with; raises ValueError, in one line, if the file is no such."""
    try:
        check_regular(path, LONGEST)
        settings = yaml.load(path.read_text(encoding="utf-8"), _Plain)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(" ".join(str(error).split())) from error
    if not isinstance(settings, dict):
        raise ValueError("expected each argument under its name")
    return settings


def check_output(
    output: Path,
    arguments: Any,
    free_to_change: Collection[str],
    reads: Iterable[tuple[str, str | None]],
    kept: Collection[str] = (),
) -> dict[str, str]:
    """Refuses a folder that a run must not write to.

    Args:
        arguments: a dataclass with ``resume`` and ``overwrite``.
        free_to_change: arguments that may differ when a run is resumed; ``a.b`` is b of the group a.
        reads: options, with the files and folders that the run reads.
        kept: names of files that belong to no run.

    Returns:
        What the run that goes on has read (`check_inputs`); nothing if none goes on.

    Raises:
        InputError: it is a file; or holds what is not a run's; or holds a run, and neither --resume nor
            --overwrite was given, or the run had other arguments, or what is to be deleted is also to be read.
    """
    record, inputs = output / RECORD, output / INPUTS
    if output.exists() and not output.is_dir():
        raise InputError(f"--output_dir {output}: is a file; give a folder")
    if not record.exists():
        # A run that was killed at its start may have left its records half written.
        others = [path.name for path in output.glob("*") if path.name not in (LOCK, INPUTS, *kept)]
        if not all(name.startswith((f".{RECORD}.", f".{INPUTS}.")) for name in others):
            raise InputError(f"--output_dir {output}: holds files that are not a run's; give a new or empty folder")
        return {}
    if not (arguments.resume or arguments.overwrite):
        raise InputError(
            f"--output_dir {output}: holds another run; --resume goes on with it, "
            "--overwrite deletes it and starts anew"
        )
    if not arguments.resume:
        for option, path in reads:
            source = Path(path or "").resolve()
            if path and source.exists() and output.resolve() in (source, *source.parents):
                raise InputError(
                    f"--{option} {path}: lies in --output_dir {output}, which --overwrite empties; give another "
                    "--output_dir, or move what is to be read"
                )
        return {}
    known = [item for item in dataclasses.fields(arguments) if item.default is not dataclasses.MISSING]
    defaults = {item.name: item.default for item in known}  # of options that the run's version did not have
    try:
        before = _flat({**defaults, **read_record(record)})
    except ValueError as error:
        raise InputError(f"--resume: {record} is damaged ({error}); start anew with --overwrite") from error
    _refuse_changed(
        before, _flat(dataclasses.asdict(arguments)), free_to_change, f"the run in {output} had other arguments"
    )
    if not inputs.exists():
        say(f"{inputs} is gone: that text and models are those that the run began with is not checked")
        return {}
    try:
        return read_sealed(inputs)
    except (OSError, ValueError) as error:
        raise InputError(
            f"--resume: {inputs}: {error}; without it the run goes on with what is given, unchecked"
        ) from error


def check_inputs(output: Path, before: Mapping[str, str], inputs: Mapping[str, str]) -> None:
    """Refuses to go on with another text or model than a run began with.

    Args:
        before: what `check_output` gave; nothing if no run goes on.
        inputs: what the run reads, by option: descriptions that differ where it does.

    Raises:
        InputError: something differs.
    """
    if before:
        _refuse_changed(before, inputs, (), f"the run in {output} read something else")


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of groups under ``group.name``."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= {f"{key}.{inner}": item for inner, item in value.items()} if isinstance(value, dict) else {key: value}
    return flat


def _refuse_changed(before: Mapping[str, Any], now: Mapping[str, Any], free: Collection[str], what: str) -> None:
    changed = [
        f"{key} was {before.get(key)!r}, now {now.get(key)!r}"
        for key in {**now, **before}
        if key not in free and before.get(key) != now.get(key)
    ]
    if changed:
        raise InputError(f"--resume: {what} ({'; '.join(changed)}); give the same, or --overwrite")


class Occupied(InputError):
    """Another run works in the folder."""


@contextmanager
def alone_in(folder: Path, option: str) -> Iterator[None]:
    """Keeps others who call this out of a folder, which is made if it is not there; raises Occupied if one is there."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Occupied(
                f"--{option} {folder}: another run works there; let it end, or give another folder"
            ) from error
        except OSError:  # no locks
            pass
        yield


@contextmanager
def claim(output: Path, arguments: Any, inputs: Mapping[str, str], kept: Collection[str] = ()) -> Iterator[None]:
    """Makes a folder this run's, and with --overwrite deletes what another left there: all that
    could be wrong with the arguments has been checked. Meanwhile other runs are kept out, where the file system
    has locks; a process that dies lets go.

    Args:
        inputs: what the run reads (`check_inputs`).

    Raises:
        Occupied: another run has the folder.
    """
    with alone_in(output, "output_dir"):
        for path in output.iterdir() if arguments.overwrite and not arguments.resume else ():
            if path.name in (LOCK, *kept):
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        write_sealed(output / INPUTS, inputs)
        settings = dataclasses.asdict(dataclasses.replace(arguments, resume=False, overwrite=False))
        with atomically(output / RECORD) as temporary:
            temporary.write_text(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True), encoding="utf-8")
        yield


def write_card(folder: Path, card: str) -> None:
    """Writes a model's card, which names its weights (`backends.pretrained.fingerprint`): the last file of a stage."""
    with atomically(folder / CARD) as temporary:
        temporary.write_text(card, encoding="utf-8")


def finished(folder: Path) -> bool:
    """Whether a card is there, of the weights that are there."""
    try:
        return fingerprint(folder) in (folder / CARD).read_text(encoding="utf-8")
    except (InputError, OSError, ValueError):
        return False
