"""Files: read only where they have an end, written under another name and moved into place."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, BinaryIO

LONGEST = 1 << 26
"""Bytes of a file that is read whole: of JSON, or a vocabulary. A model's has some megabytes at most."""


class InputError(ValueError):
    """Something the user gave is wrong. The message is one line that names the
    file or option, says what was wrong with it, and what would be right."""


def check_regular(path: Path, most: int | None = None) -> None:
    """Raises InputError unless `path` is a regular file or a link to one, of at most so many bytes: a device or a pipe
    may have no end."""
    try:
        status = path.stat()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    if not stat.S_ISREG(status.st_mode):
        raise InputError(f"{path}: is not a regular file; expected one, or a link to one")
    if most is not None and status.st_size > most:
        raise InputError(f"{path}: has {status.st_size} bytes; expected at most {most}")


def read_json(path: Path) -> Any:
    """What a JSON file holds, a byte order mark or not before it.

    Raises:
        InputError: the file cannot be read or is not JSON.
    """
    check_regular(path, LONGEST)
    try:
        text = path.read_text(encoding="utf-8-sig")
        content = json.loads(text)
        if "\\ud" in text.lower():
            json.dumps(content, ensure_ascii=False).encode()  # half a surrogate pair is no text
        return content
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({error})") from error


def digest(content: IO[bytes], algorithm: str = "sha256") -> str:
    """Of all that can be read from there on, in hexadecimal digits."""
    hasher = hashlib.new(algorithm)
    while block := content.read(1 << 20):
        hasher.update(block)
    return hasher.hexdigest()


@contextmanager
def atomically(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place, flushed to disk, when
    the block ends well and vanishes when it does not."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def locked(path: Path) -> BinaryIO:
    """A file, made if it is not there, to be read and appended to, that no other run writes while it is open.

    Raises:
        InputError: another run is writing it.
    """
    while True:
        file = path.open("a+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.close()
            raise InputError(f"{path}: another run is writing it; wait for that one, or give another file") from error
        except OSError:  # no locks
            pass
        if is_at(file, path):
            return file
        file.close()  # another run that ended meanwhile has moved or removed it


def is_at(file: BinaryIO, path: Path) -> bool:
    """Whether an open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


@contextmanager
def leaving_nothing(folder: Path, names: Collection[str] = ()) -> Iterator[None]:
    """If what is done inside is refused, what it made of these names in a folder is removed again, and the folder and
    those above it, if it made them and nothing else is in them."""
    made = [folder / name for name in names if not (folder / name).exists()]
    above = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    except InputError:
        for path in made:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        for path in above:
            with suppress(OSError):  # something else is in it
                path.rmdir()
        raise


def write_json(path: Path, content: Any) -> None:
    with atomically(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")


def write_sealed(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON object with a digest of itself, so that `read_sealed` knows it again."""
    with atomically(path) as temporary:
        temporary.write_text(_sealed(content), encoding="utf-8")


def read_sealed(path: Path) -> dict[str, Any]:
    """A JSON object that `write_sealed` wrote.

    Raises:
        ValueError: it is not what was written, byte for byte.
        OSError: it cannot be read.
    """
    try:
        text = path.read_bytes().decode("utf-8")
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} is damaged ({error})") from error
    if not isinstance(content, dict) or content.pop("seal", None) is None:
        raise ValueError(f"{path.name} is damaged, or of an earlier version (it has no hash of itself)")
    if text != _sealed(content):
        raise ValueError(f"{path.name} is not what was written (its hash is another)")
    return content


def _sealed(content: Mapping[str, Any]) -> str:
    bare = json.dumps(content, sort_keys=True)
    seal = hashlib.sha256(bare.encode()).hexdigest()
    return json.dumps({**content, "seal": seal}, indent=2, sort_keys=True) + "\n"
