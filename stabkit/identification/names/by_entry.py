"""Numbers in names where every entry of a state has its own: the range that they have, and not those of one entry."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from stabkit.identification.form.coefficients import Coefficient
from stabkit.identification.names.single import Name

_NUMBER = re.compile(r"= (-?\d+(?:\.\d+)?(?:e[+-]\d+)?)")
_FEW = 5e-4  # relative: names tell three digits
OWN_SIZES = "none for all: every entry has its own"


def told_by_entry(first: Name, mean: Name, entries: Sequence[Coefficient]) -> Name:
    """A name with the range of every number that differs from entry to entry, and no step size where that does.

    Args:
        first: the name that the numbers of the first entry give.
        mean: the one that the means give.
        entries: the coefficients that have a number for each entry.

    Example:
        >>> beta = Coefficient("diagonal", 0.7, 0.5, 0.9, 0.0, 0.6)
        >>> first, mean = (Name(f"momentum (gamma = {b})", "x' = f", 1 - b, "h: 1 - gamma") for b in (0.6, 0.7))
        >>> told_by_entry(first, mean, [beta]).name
        'momentum (gamma from 0.5 to 0.9 by entry)'
    """
    told = [_told(getattr(first, part), getattr(mean, part), entries) for part in ("name", "system", "convention")]
    if first.h is not None and mean.h is not None and abs(first.h - mean.h) > _FEW * abs(first.h):
        which = f" ({told[2].removeprefix('h: ')})" if "by entry" in told[2] else ""
        return replace(first, name=told[0], system=told[1], convention=OWN_SIZES + which)
    return replace(first, name=told[0], system=told[1], convention=told[2])


def _told(text: str, other: str, entries: Sequence[Coefficient]) -> str:
    numbers = iter(_NUMBER.findall(other) if _NUMBER.sub("", text) == _NUMBER.sub("", other) else ())

    def told(found: re.Match[str]) -> str:
        if next(numbers, None) == found[1]:
            return found[0]
        number = float(found[1])
        fits = [c for c in entries if c.sample is not None and abs(c.sample - number) <= 10 * _FEW * abs(number)]
        ranges = dict.fromkeys(f"from {c.low:.3g} to {c.high:.3g} " for c in fits)
        return f"{next(iter(ranges)) if len(ranges) == 1 else ''}by entry"

    return _NUMBER.sub(told, text)
