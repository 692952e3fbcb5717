"""``python -m backends``: what is installed, what its devices can do, and what `auto` would choose.

``python -m backends summary MODEL`` says what a model is made of.
"""

from __future__ import annotations

import minilm_duet

if __name__ == "__main__":
    minilm_duet.begin()

import argparse
import importlib
import sys
from collections.abc import Sequence

from backends import PACKAGES, choose, missing_packages
from backends.files import InputError
from backends.pretrained import find_model
from backends.summary import summary


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


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("python -m backends", description=minilm_duet.PROGRAMS["backends"])
    parser.add_argument("--version", action="version", version=f"MiniLM Duet {minilm_duet.VERSION}")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND")
    of_model = commands.add_parser(
        "summary", help="a model's parameters by module, the memory they take, its operations"
    )
    of_model.add_argument("model", metavar="MODEL", help="the model's folder or its name on the model hub")
    of_model.add_argument("--max_seq_length", metavar="N", type=int, default=128, help="tokens of the sequence")
    arguments = parser.parse_args(argv)
    try:
        if arguments.command == "summary":
            print(summary(find_model(arguments.model, "model"), arguments.max_seq_length))
        else:
            print(report())
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
