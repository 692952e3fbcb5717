"""``python -m backends``: what is installed, what its devices can do, and what `auto` would choose."""

from __future__ import annotations

import minilm_duet

if __name__ == "__main__":
    minilm_duet.begin()

import argparse
import importlib

from backends import PACKAGES, choose, missing_packages
from backends.files import InputError


def report() -> str:
    """A paragraph a backend."""
    lines = []
    for name in PACKAGES:
        if missing := missing_packages(name):
            lines.append(f"{name}: {' and '.join(missing)} not installed")
            continue
        room = importlib.import_module(f"backends.{name}").BACKEND
        versions = ", ".join(f"{package} {version}" for package, version in room.versions().items())
        lines.append(f"{name}: {versions}")
        try:
            chosen = room.find_device("auto")
        except InputError as error:
            chosen = None
            lines.append(f"  error: {error}")
        for device in room.devices():
            precisions = f"computes in {', '.join(device.precisions)}; --use_amp takes {device.precisions[0]}"
            auto = ", --device auto takes this" if device.kind == chosen else ""
            notes = f"; {device.notes}" if device.notes else ""
            lines.append(f"  {device.kind}: {device.name}{auto}; {precisions}{notes}")
    try:
        lines.append(f"--backend auto takes {choose('auto')}")
    except InputError as error:
        lines.append(str(error))
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser("python -m backends", description=minilm_duet.PROGRAMS["backends"])
    parser.add_argument("--version", action="version", version=f"MiniLM Duet {minilm_duet.VERSION}")
    parser.parse_args()
    print(report())
