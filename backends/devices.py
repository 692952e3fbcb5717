"""What machines can do, whichever framework looks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from backends.files import InputError


class Device(NamedTuple):
    """A device as a framework sees it."""

    kind: str
    """As the option --device calls it."""
    name: str
    precisions: list[str]
    """What it has units for; the first is what `auto` takes."""
    notes: str = ""


def choose_device(device: str, present: Mapping[str, bool], framework: str, build: str) -> str:
    """The device that is asked for; for ``auto`` an accelerator if there is one.

    Args:
        present: whether there is a ``gpu``, an ``xpu``, that the framework can use.
        build: the framework's version and what else says why it might see none.

    Raises:
        InputError: there is no such device.
    """
    if device == "auto":
        return next((name for name, usable in present.items() if usable), "cpu")
    if device not in ("cpu", *present):
        raise InputError(f"--device {device}: must be auto, cpu, gpu or xpu")
    if device != "cpu" and not present[device]:
        raise InputError(
            f"--device {device}: this machine has none that {framework} can use ({build}); use auto or cpu"
        )
    return device


def choose_precision(precision: str, gains: Sequence[str], slow: Sequence[str], framework: str, device: str) -> str:
    """The precision that is asked for; for ``auto`` the one that the device gains most from.

    Args:
        gains: precisions that the device has units for, the fastest first.
        slow: those that it computes in without a gain.

    Raises:
        InputError: the device does not compute in it.
    """
    if precision == "auto":
        return gains[0]
    if precision not in (*gains, *slow):
        raise InputError(
            f"--amp_dtype {precision}: {framework} computes in {', '.join(gains)} on this {device}; use one, or auto"
        )
    return precision


def has_kernels(capability: tuple[int, int], architectures: Iterable[str]) -> bool:
    """Whether code built for some CUDA architectures runs on a GPU.

    Binary code runs on later minor versions of its major one; intermediate code
    (``compute_90``) is compiled for anything from its version on.

    Args:
        capability: the GPU's compute capability, as (7, 0) for V100.
        architectures: ``sm_70``, ``sm_90a``, ``compute_90`` or plain ``70``.
    """
    for architecture in architectures:
        kind, _, version = architecture.rpartition("_")
        number = int("".join(filter(str.isdigit, version)))
        major, minor = divmod(number, 10)
        if version.endswith("a"):  # for this one alone
            fits = capability == (major, minor)
        elif kind == "compute":
            fits = capability >= (major, minor)
        else:
            fits = capability[0] == major and capability[1] >= minor
        if fits:
            return True
    return False


def check_kernels(
    gpu: str, capability: tuple[int, int], framework: str, architectures: Iterable[str], advice: str
) -> None:
    """Raises InputError if a framework's build holds no code for a GPU; `advice` is what to install instead."""
    architectures = list(architectures)
    if not has_kernels(capability, architectures):
        raise InputError(
            f"--device gpu: {framework} holds no code for {gpu} (sm_{capability[0]}{capability[1]}), "
            f"only for {', '.join(architectures)}; {advice}"
        )
