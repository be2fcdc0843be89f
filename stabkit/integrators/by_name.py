"""Methods by name."""

from __future__ import annotations

import difflib
import re
from fractions import Fraction
from functools import cache, lru_cache
from typing import Any

from stabkit.arguments import accepts
from stabkit.errors import ArgumentTypeError, StabkitError
from stabkit.integrators import (
    chebyshev,
    explicit_runge_kutta,
    implicit_runge_kutta,
    multistep,
    networks,
    optimizers,
    splitting,
)
from stabkit.integrators.catalogue_entry import Entry
from stabkit.integrators.linear_stability import LinearStability

_CALL = re.compile(r"^(?P<name>[^()]+?)\s*(?:\((?P<arguments>.*)\))?$")
#: Families that exist for any number of stages or steps; the catalogue lists the usual sizes.
_SIZED = {
    **dict.fromkeys(("gauss", "radau_ia", "radau_iia"), implicit_runge_kutta.collocation_family),
    **{f"lobatto_iii{x}": implicit_runge_kutta.collocation_family for x in "abc"},
    "ab": multistep.adams_bashforth,
    "am": multistep.adams_moulton,
    "bdf": multistep.bdf,
    "nystrom": multistep.nystrom,
    "milne_simpson": multistep.milne_simpson,
    "rkc1_": chebyshev.rkc1,
    "rkc2_": chebyshev.rkc2,
}


class UnknownMethodError(StabkitError, KeyError):
    """No method of the catalogue has this name."""

    def __str__(self) -> str:
        return str(self.args[0])  # KeyError would show the repr


def entries() -> tuple[Entry, ...]:
    """Every entry of the catalogue, in the order of its families."""
    return (
        *explicit_runge_kutta.ENTRIES,
        *chebyshev.ENTRIES,
        *implicit_runge_kutta.ENTRIES,
        *multistep.ENTRIES,
        *splitting.ENTRIES,
        *networks.ENTRIES,
        *optimizers.ENTRIES,
    )


def names() -> tuple[str, ...]:
    """The names of all methods; aliases are not repeated.

    Example:
        >>> "rk4" in names()
        True
    """
    return tuple(entry.name for entry in entries())


def entry(name: str) -> Entry:
    """The catalogue entry of a name or an alias, without building the method.

    Raises:
        UnknownMethodError: there is none; the message suggests near names.
    """
    found = _index().get(_normal(name))
    if found is None:
        raise UnknownMethodError(_unknown(name))
    return found


@accepts
def named(name: str, **parameters: Any) -> Any:
    """The method of this name.

    Args:
        name: a name, an alias, or either with parameters in parentheses: ``"rk4"``, ``"Dormand-Prince"``,
            ``"rkc1(10)"``, ``"theta(theta=1)"``. Case, spaces, hyphens and underscores do not matter. Families with a
            size take it at the end: ``"bdf3"``, ``"gauss6"``.
        **parameters: of a family, such as ``s`` and ``damping`` of ``rkc1`` or ``lam`` of ``damped_euler``.

    Returns:
        A ``GeneralLinearMethod``, or another :class:`LinearStability` for exponential and random steps.

    Raises:
        UnknownMethodError: no method has this name; the message suggests near ones.
        ArgumentTypeError: the method does not take these parameters.

    Example:
        >>> named("Runge-Kutta 4").order
        4
        >>> float(named("rkc1", s=10).real_interval())
        200.0
    """
    match = _CALL.match(name.strip())
    if match is None:
        raise UnknownMethodError(_unknown(name))
    base = match["name"]
    positional, inline = _arguments(match["arguments"] or "")
    key = _normal(base)
    found = _index().get(key)
    if found is None:
        sized = _sized(key)
        if sized is None:
            raise UnknownMethodError(_unknown(base))
        build, *positional = sized
        accepted: dict[str, Any] = {}
    else:
        build, accepted = found.build, dict(found.defaults)
    if not parameters and not inline and not positional:
        return _built(found.name) if found else build()
    wrong = sorted(set(parameters | inline) - set(accepted))
    if wrong or len(positional) > max(len(accepted), 2):
        takes = ", ".join(f"{k}={v}" for k, v in accepted.items()) or "no parameters"
        raise ArgumentTypeError(f"{base} does not take {', '.join(wrong) or positional}; it takes {takes}")
    return build(*positional, **inline, **parameters)


def near_names(name: str) -> list[str]:
    """Names and aliases that look like this one, nearest first.

    Example:
        >>> near_names("rk5")[0] in ("rk4", "rk45", "rk3", "rk1", "rk2")
        True
    """
    keys = _index()
    close = difflib.get_close_matches(_normal(name), keys, n=5, cutoff=0.5)
    return list(dict.fromkeys(keys[k].name if _normal(keys[k].name) == k else _spelling(k) for k in close))


@cache
def _built(name: str) -> LinearStability:
    found = entry(name)
    method = found.build()
    if not found.defaults:  # families say their parameters in the name
        method.name = found.name
    return method


@lru_cache(maxsize=1)
def _index() -> dict[str, Entry]:
    return {_normal(name): e for e in entries() for name in (*e.aliases, e.name)}


def _spelling(key: str) -> str:
    return next(a for e in entries() for a in e.aliases if _normal(a) == key)


def _normal(name: str) -> str:
    return re.sub(r"[\s_\-–]+", "", name).lower()


def _unknown(name: str) -> str:
    near = near_names(name)
    hint = f"did you mean {', '.join(near)}?" if near else "integrators.names() lists them all"
    return f"no method is called {name!r}; {hint}"


def _sized(key: str) -> tuple[Any, ...] | None:
    """(builder, arguments...) of a family name that ends in a number."""
    match = re.fullmatch(r"(.*?)(\d+)", key)
    if match is None:
        return None
    for prefix, build in _SIZED.items():
        if _normal(prefix) == match[1] or (prefix.endswith("_") and key.startswith(_normal(prefix))):
            size = key[len(_normal(prefix)) :]
            if not size.isdigit():
                continue
            family = build is implicit_runge_kutta.collocation_family
            return (build, prefix, int(size)) if family else (build, int(size))
    return None


def _arguments(text: str) -> tuple[list[Any], dict[str, Any]]:
    positional: list[Any] = []
    keywords: dict[str, Any] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        key, equals, value = part.rpartition("=")
        parsed = _value(value.strip())
        if equals:
            keywords[key.strip()] = parsed
        else:
            positional.append(parsed)
    return positional, keywords


def _value(text: str) -> Any:
    """A number, exact where it can be, a truth value, or a word."""
    try:
        number = Fraction(text)
    except ValueError:
        return {"True": True, "False": False}.get(text, text.strip("'\""))
    return int(number) if number.denominator == 1 else number
