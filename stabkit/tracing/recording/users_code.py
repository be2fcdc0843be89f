"""Which code is the user's, and which globals it names."""

from __future__ import annotations

import dis
import functools
import pathlib
import sys
import sysconfig
import types

HERE = str(pathlib.Path(__file__).parents[2])  # this package
HEAP = 1 << 9  # Py_TPFLAGS_HEAPTYPE: a class that Python code made
_LIBRARIES = (*{sysconfig.get_path(name) for name in ("purelib", "platlib", "stdlib", "platstdlib")}, HERE)


def is_users(file: str) -> bool:
    """Whether code is no installed package's and not Python's own."""
    return not file.startswith(_LIBRARIES) and not file.startswith("<frozen")


@functools.lru_cache(maxsize=4096)
def is_users_class(kind: type) -> bool:
    """Whether a class is of such code."""
    if not kind.__flags__ & HEAP:
        return False
    for value in vars(kind).values():
        inner = getattr(value, "__func__", value)
        if isinstance(inner, types.FunctionType):
            return is_users(inner.__code__.co_filename)
    module = sys.modules.get(kind.__module__)
    return is_users(getattr(module, "__file__", None) or "")


@functools.lru_cache(maxsize=4096)
def named_globals(code: types.CodeType) -> tuple[frozenset[str], frozenset[str]]:
    """The global names that code uses, and those that it binds; also of functions within it."""
    names: set[str] = set()
    bound: set[str] = set()
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            names.add(instruction.argval)
        elif instruction.opname in ("STORE_GLOBAL", "DELETE_GLOBAL"):
            bound.add(instruction.argval)
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            more, further = named_globals(inner)
            names |= more
            bound |= further
    return frozenset(names | bound), frozenset(bound)
