"""Budgets as people write them: ``10m``, ``8G``; and numbers as people read them."""

from __future__ import annotations

import math
import re

from stabkit.errors import StabkitError

_SECONDS = {"s": 1.0, "sec": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_BYTES = {"B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_NUMBER = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*")


def seconds(budget: str | float) -> float:
    """Seconds in a duration: a number of seconds, or ``"90s"``, ``"10m"``, ``"1.5h"``, ``"2d"``.

    Raises:
        StabkitError: it is no duration, or not positive.

    Example:
        >>> seconds("10m"), seconds("1.5h"), seconds(20)
        (600.0, 5400.0, 20.0)
    """
    accepted = "expected a positive number of seconds, or one such as 90s, 10m, 1.5h"
    number, unit = _split(budget, "budget", accepted)
    if unit and unit.lower() not in _SECONDS:
        raise StabkitError(f"budget={budget!r}: unknown unit {unit!r}; {accepted}")
    return number * _SECONDS[unit.lower() or "s"]


def n_bytes(memory: str | float) -> int:
    """Bytes in an amount of memory: a number of bytes, or ``"512M"``, ``"8G"``, ``"1.5GiB"``; units of 1024.

    Raises:
        StabkitError: it is no amount of memory, or not positive.

    Example:
        >>> n_bytes("8G") == 8 * 2**30, n_bytes("1.5GiB"), n_bytes(100)
        (True, 1610612736, 100)
    """
    accepted = "expected a positive number of bytes, or one such as 512M, 8G, 1.5GiB"
    number, unit = _split(memory, "memory", accepted)
    letter = re.sub(r"i?[bB]?$", "", unit).upper() or "B"
    if letter not in _BYTES:
        raise StabkitError(f"memory={memory!r}: unknown unit {unit!r}; {accepted}")
    return int(number * _BYTES[letter])


def _split(given: str | float, name: str, accepted: str) -> tuple[float, str]:
    found = _NUMBER.fullmatch(given) if isinstance(given, str) else None
    if isinstance(given, bool) or not (found or isinstance(given, int | float)):
        raise StabkitError(f"{name}={given!r}; {accepted}")
    number = float(found.group(1)) if found else float(given)
    if not (math.isfinite(number) and number > 0):
        raise StabkitError(f"{name}={given!r}; {accepted}")
    return number, found.group(2) if found else ""


def duration(time: float) -> str:
    """A duration that a person can read.

    Example:
        >>> duration(0.25), duration(42), duration(600), duration(9000), duration(200000)
        ('0.25 s', '42 s', '10 min', '2.5 h', '2.3 days')
    """
    for unit, size in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if time >= 2 * size:
            return f"{time / size:.2g} {unit}"
    return f"{time:.2g} s" if time < 100 else f"{time:.0f} s"


def amount(number: float, unit: str) -> str:
    """A large number with a decimal prefix.

    Example:
        >>> amount(4.1e9, "FLOP"), amount(25_600_000, "B"), amount(12, "B")
        ('4.1 GFLOP', '25.6 MB', '12 B')
    """
    for prefix, size in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {prefix}{unit}"
    return f"{number:.3g} {unit}"
