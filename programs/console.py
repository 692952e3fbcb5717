"""What programs say to the user, on standard error."""

from __future__ import annotations

from rich.console import Console

console = Console(stderr=True, highlight=False)


def say(message: str) -> None:
    """One line for the user."""
    console.print(message, soft_wrap=True, markup=False)
