"""What stands, while a model runs, for what it takes from and what cannot be wound back."""

from __future__ import annotations

import copy
import io
import itertools
import sys
import types
import warnings
from typing import Any

from stabkit.errors import TraceError
from stabkit.tracing.recording.reachable import Path, Reached

_HOLDERS: tuple[Any, ...] = ([], (), {}, "", b"", range(0), set(), {}.values(), {}.items())
#: iterators that hold no other iterator, so that a copy of one takes nothing from the original
_COPIED = (
    *map(type, map(iter, _HOLDERS)),
    itertools.count,
    itertools.repeat,
)


def _copied(item: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of copies of itertools, which end in Python 3.14
        try:
            if isinstance(item, itertools.cycle):
                told: Any = item.__reduce__()
                _, (inner,), (seen, first) = told
                fresh = _copied(inner)
                if fresh is None:
                    return None
                made: Any = itertools.cycle(fresh)
                made.__setstate__((list(seen), first))
                return made
            return copy.copy(item) if isinstance(item, _COPIED) else None
        except TypeError:
            return None


class _Refusing:
    """Stands for something from which nothing may be taken, since it could not be put back."""

    def __init__(self, name: str, kind: str) -> None:
        object.__setattr__(self, "_said", (name, kind))

    def _refuse(self, *_: Any) -> Any:
        name, kind = object.__getattribute__(self, "_said")
        raise TraceError(
            f"the model takes from {name or 'what it holds'}, a {kind}, which cannot be put back as it was: let it "
            "hold a list and a counter instead, or analyse it with that replaced"
        )

    __next__ = __iter__ = __enter__ = __exit__ = __setattr__ = _refuse

    def __getattr__(self, name: str) -> Any:
        return self._refuse()


def _stand_in(item: Any, path: Path) -> Any:
    """A copy of an iterator where it has one, else what refuses to be taken from."""
    if isinstance(item, io.IOBase | types.GeneratorType):
        return _Refusing(_named_path(path), type(item).__name__)
    found = _copied(item)
    return _Refusing(_named_path(path), type(item).__name__) if found is None else found


def _named_path(path: Path | None) -> str:
    """A path in words."""
    parts: list[str] = []
    while path is not None:
        if path[1] and path[1] not in ("_modules", "closure"):
            parts.append(path[1])
        path = path[0]
    return ".".join(reversed(parts))


def put_stand_ins(reached: Reached) -> None:
    """For the time of a pass, what is taken from is taken from copies, or refuses."""
    for place, key, path in reached.with_iterators:
        item = dict(place.items(place.contents))[key]
        if item not in (sys.stdout, sys.stderr, sys.stdin):
            place.put(place.holder, key, _stand_in(item, path))
