"""The rooms that hold a framework each, behind one contract (`backends.interface`)."""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from types import ModuleType
from typing import Literal, cast

from backends.files import InputError
from backends.interface import Backend, Precision

PACKAGES = {"torch": ("torch", "transformers"), "paddle": ("paddle", "paddlenlp")}
"""Backend -> the packages that it imports."""


def missing_packages(name: str) -> list[str]:
    return [package for package in PACKAGES[name] if find_spec(package) is None]


def choose(name: str = "auto") -> Literal["torch", "paddle"]:
    """The backend that a name means: itself, or for ``auto`` the first that is installed.

    Raises:
        InputError: no such backend, or its framework is not installed.
    """
    if name == "auto":
        name = next((room for room in PACKAGES if not missing_packages(room)), "torch")
    if name not in PACKAGES:
        raise InputError(f"--backend {name}: no such backend; choose from {', '.join(PACKAGES)}, auto")
    if missing := missing_packages(name):
        raise InputError(
            f"--backend {name}: {' and '.join(missing)} not installed; "
            f"install with: pip install -c constraints.txt -e '.[{name}]', in the project's folder"
        )
    return cast(Literal["torch", "paddle"], name)


def load(name: str = "auto", device: str = "auto", precision: Precision = "float32") -> Backend:
    """A backend, its framework imported now.

    Args:
        name: ``torch``, ``paddle`` or ``auto``.
        device, precision: see `Backend`.

    Raises:
        InputError: see `choose`; or the device cannot do what is asked.
    """
    room = importlib.import_module(f"backends.{choose(name)}")
    return cast(Backend, room.BACKEND(device=device, precision=precision))


def engine_room(name: str) -> ModuleType:
    """What a framework itself offers for answering texts, ``backends/<name>/engine.py``."""
    return importlib.import_module(f"backends.{choose(name)}.engine")
