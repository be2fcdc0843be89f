"""Values of a report read back from JSON data as `stabkit.results` writes them, and the text of the file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, TypeVar

T = TypeVar("T")

_CALLED: dict[Any, str] = {int: "an integer", str: "a string", bool: "true or false", list: "a list", dict: "an object"}
_NOT_FINITE = {"NaN", "Infinity", "-Infinity"}


def number(value: Any) -> float:
    """A float read back from JSON.

    Raises:
        TypeError: ``value`` is neither a number nor one of the three names of a float that is not finite.

    Example:
        >>> number(3), number("-Infinity")
        (3.0, -inf)
    """
    named = isinstance(value, str) and value in _NOT_FINITE
    if isinstance(value, bool) or not (named or isinstance(value, int | float)):
        raise TypeError(f"expected a number, found {shorten(value)}")
    return float(value)


def typed(kind: type[T], value: Any) -> T:
    """A value read back from JSON that is an int, str, bool, list or dict.

    Raises:
        TypeError: it is of another type; true and false are no integers.
    """
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise TypeError(f"expected {_CALLED[kind]}, found {shorten(value)}")
    return value


def complex_number(value: Any) -> complex:
    """A complex number read back from ``[re, im]``; raises TypeError for anything else."""
    real, imaginary = interval(value)
    return complex(real, imaginary)


def interval(value: Any) -> tuple[float, float]:
    """Two floats read back from a list of two; raises TypeError for anything else."""
    if not isinstance(value, list) or len(value) != 2:
        raise TypeError(f"expected a list of two numbers, found {shorten(value)}")
    return number(value[0]), number(value[1])


def shorten(value: Any, width: int = 60) -> str:
    """The representation of a value, cut to ``width`` characters."""
    shown = repr(value)
    return shown if len(shown) <= width else shown[: width - 3] + "..."


def lines(data: Mapping[str, Any]) -> str:
    """JSON text with one line per key, and one line per entry of a list of objects.

    Plain indentation would spend a line on every part of every eigenvalue; this stays short, and two reports
    can be compared line by line.

    Example:
        >>> print(lines({"a": 1, "steps": [{"z": [1.0, 2.0]}]}), end="")
        {
        "a": 1,
        "steps": [
          {"z": [1.0, 2.0]}
        ]
        }
    """
    return "{\n" + ",\n".join(f"{json.dumps(key)}: {_entry(item)}" for key, item in data.items()) + "\n}\n"


def _entry(item: Any) -> str:
    if isinstance(item, list) and item and all(isinstance(part, dict) for part in item):
        return "[\n" + ",\n".join("  " + json.dumps(part, allow_nan=False) for part in item) + "\n]"
    return json.dumps(item, allow_nan=False)
