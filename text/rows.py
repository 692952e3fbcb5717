"""Values of rows of data, checked; a ValueError says what is wrong with one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Row = Mapping[str, Any]


def shown(value: Any) -> str:
    """Returns a value as a message shows it."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def value_of(row: Row, column: str) -> Any:
    """Returns a column's value; raises ValueError if the row has no such column."""
    if column not in row:
        raise ValueError(f"no column {column}; there are {', '.join(map(str, row))}")
    return row[column]


def text_of(row: Row, column: str) -> str:
    """Returns a column's text; raises ValueError if it is none, or blank."""
    value = value_of(row, column)
    if not isinstance(value, str):
        raise ValueError(f"{column} is {shown(value)}, expected a string")
    if not value.strip():
        raise ValueError(f"{column} is empty")
    return value


def whole_number(value: Any, name: str) -> int:
    """Returns a number of characters as an int; raises ValueError, naming the value, if it is none."""
    if isinstance(value, bool) or not (isinstance(value, int) or isinstance(value, float) and value.is_integer()):
        raise ValueError(f"{name} is {shown(value)}, expected a number of characters")
    return int(value)


def nearest(text: str, part: str, start: int) -> int | None:
    """Finds the place where a part of a text begins that is nearest to `start`; None if the part is not in the text."""
    before, after = text.rfind(part, 0, max(0, start) + len(part)), text.find(part, max(0, start))
    places = [place for place in (before, after) if place >= 0]
    return min(places, key=lambda place: abs(place - start), default=None)
