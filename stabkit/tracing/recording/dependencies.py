"""A key of everything that a call depends on: code, settings, tensors, and what functions close over or name.

Code of the user's counts by what it says, with all that it names; code of installed packages by its own text and by
the version of the package. Where something cannot be told from another of its kind there is no key: what was kept
under one would be told of both.
"""

from __future__ import annotations

import array
import dis
import enum
import functools
import hashlib
import importlib.util
import inspect
import platform
import random
import sys
import types
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stabkit._version import __version__
from stabkit.hashing import has_entries, raw
from stabkit.tracing.recording.places import NOTHING, in_cell, in_slot, slots_of
from stabkit.tracing.recording.users_code import HEAP, is_users, is_users_class

_PLAIN = (
    *(int, float, complex, str, bytes, bool, type(None), type(...), slice, range, np.generic, np.dtype),
    *(torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format),
)
#: objects that decide no number: locks, loggers, and what other objects are known by
_ASIDE = ("_thread", "threading", "logging", "weakref", "typing", "abc", "torch.utils.hooks")
_NO_CODE = frozenset({"__dict__", "__weakref__", "__doc__", "__module__", "__annotations__", "__firstlineno__"})
_NO_SETTING = frozenset({"__abstractmethods__", "_abc_impl", "__static_attributes__", "__annotate__"})
_HOOKS = ("_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks", "_global_backward_pre_hooks")


class _UnknownError(Exception):
    """Something cannot be told from another of its kind."""


def dependency_key(*things: Any, weights: bool = True, size: int = 16) -> str | None:
    """A hash of some things and all that a call of them depends on; None where part of it cannot be known.

    The settings of torch that change numbers, and the versions of stabkit, torch and whatever package is met, are part
    of it. Whether a module is in training mode is not.

    Args:
        *things: modules, functions, settings, inputs.
        weights: whether parameters and stored buffers of modules count by their entries; else by dtype and shape.
        size: bytes of the hash.

    Example:
        >>> def power(exponent):
        ...     return lambda y: y**exponent
        >>> dependency_key(power(2)) == dependency_key(power(2)), dependency_key(power(2)) == dependency_key(power(3))
        (True, False)
        >>> print(dependency_key(n for n in [1]))
        None
    """
    digest = _Dependencies(weights, size)
    try:
        digest.add(_surroundings())
        digest.add(things)
        digest.add_versions()
    except (_UnknownError, RecursionError):
        return None
    return digest.value


def _surroundings() -> list[Any]:
    kinds = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    autocast = [(kind, torch.get_autocast_dtype(kind)) for kind in kinds if torch.is_autocast_enabled(kind)]
    modes = torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision(), autocast
    hooks = [getattr(nn.modules.module, name) for name in _HOOKS]
    return [__version__, torch.__version__, platform.python_version(), torch.get_default_dtype(), modes, hooks]


class _Dependencies:
    def __init__(self, weights: bool, size: int) -> None:
        self._digest = hashlib.blake2b(digest_size=size)
        self._weights = weights
        self._met: dict[int, int] = {}
        self._alive: list[Any] = []  # an address is that of one object while that is alive
        self._packages: set[str] = set()
        self._stored: set[int] = set()

    @property
    def value(self) -> str:
        return self._digest.hexdigest()

    def add(self, item: Any) -> None:
        """Take a thing in, once."""
        kind = type(item)
        if isinstance(item, _PLAIN):
            self._say(f"{kind.__qualname__} {item!r}")
            return
        if id(item) in self._met:
            self._say(f"met {self._met[id(item)]}")
            return
        self._met[id(item)] = len(self._met)
        self._alive.append(item)
        for types_, handler in _HANDLERS:
            if isinstance(item, types_):
                handler(self, item)
                return
        if kind.__module__.startswith(_ASIDE):
            self._say(f"{kind.__module__}.{kind.__qualname__}")
        else:
            self._object(item)

    def add_versions(self) -> None:
        """Take in the versions of the packages that were met."""
        for name in sorted(self._packages):
            self._say(f"{name} {getattr(sys.modules.get(name), '__version__', '')}")

    def _say(self, text: str) -> None:
        self._digest.update(f"{len(text)} {text}\0".encode(errors="surrogatepass"))

    def _package(self, name: str | None) -> None:
        self._packages.add((name or "").partition(".")[0])

    def _items(self, mark: str, items: Iterable[Any]) -> None:
        self._say(mark)
        for item in items:
            self.add(item)
        self._say(f"end of {mark}")

    # ---------------------------------------------------------------- data

    def _tensor(self, item: Tensor) -> None:
        if nn.parameter.is_lazy(item) or item.is_nested:
            raise _UnknownError
        self._say(f"{type(item).__qualname__} {item.dtype} {tuple(item.shape)} {item.layout} {item.device}")
        if id(item) in self._stored or item.is_meta:
            return
        if has_entries(item):
            self._digest.update(raw(item))
        elif item.is_quantized or type(item).__torch_dispatch__ is not Tensor.__torch_dispatch__:
            raise _UnknownError
        elif item.layout == torch.sparse_coo:
            self._items("sparse", (item.coalesce().indices(), item.coalesce().values()))
        else:
            raise _UnknownError

    def _array(self, item: np.ndarray[Any, Any]) -> None:
        self._say(f"array {item.dtype} {item.shape}")
        if item.dtype.hasobject:
            self.add(item.tolist())
        else:
            self._digest.update(np.ascontiguousarray(item).tobytes())

    def _mapping(self, item: Any) -> None:
        self._items("mapping", (each for pair in dict.items(dict(item)) for each in pair))
        if type(item) not in (dict, types.MappingProxyType):
            self._object(item)

    def _sequence(self, item: Any) -> None:
        self._items(type(item).__qualname__, item)
        if type(item) not in (list, tuple):
            self._object(item)

    def _set(self, item: Any) -> None:
        keys = [dependency_key(each, weights=self._weights) for each in item]
        if None in keys:
            raise _UnknownError
        self._items("set", sorted(str(key) for key in keys))

    def _bytes(self, item: Any) -> None:
        self._say(type(item).__qualname__)
        self._digest.update(bytes(item))

    def _random(self, item: Any) -> None:
        self._say(type(item).__qualname__)
        if isinstance(item, torch.Generator):
            self.add(item.get_state())
        elif isinstance(item, random.Random):
            self.add(random.Random.getstate(item))
        elif isinstance(item, np.random.Generator):
            self.add(item.bit_generator.state)
        elif isinstance(item, np.random.RandomState):
            self.add(item.get_state(legacy=False))
        else:
            self.add(item.state)

    # ---------------------------------------------------------------- objects

    def _module(self, item: nn.Module) -> None:
        if isinstance(item, torch.jit.ScriptModule):
            raise _UnknownError
        if not self._weights:
            kept = [value for name, value in item._buffers.items() if name not in item._non_persistent_buffers_set]
            self._stored.update(id(value) for value in (*item._parameters.values(), *kept) if value is not None)
        self.add(type(item))
        ids: dict[int, int] = {}  # of hooks, which count through the whole process
        for name, value in vars(item).items():
            if name.startswith("_") and "_hooks" in name and isinstance(value, dict):
                value = {ids.setdefault(key, len(ids)): hook for key, hook in value.items()}
            if name != "training":
                self._say(name)
                self.add(value)

    def _object(self, item: Any) -> None:
        """Attributes and slots; of what is written in C, what it says of itself to be copied."""
        kind = type(item)
        self.add(kind)
        try:
            own = object.__getattribute__(item, "__dict__")
        except AttributeError:
            own = {}
        slots = {name: in_slot(item, slot) for name, slot in slots_of(item).items()}
        filled = (each for pair in slots.items() if pair[1] is not NOTHING for each in pair)
        self._items("object", (*(each for pair in own.items() for each in pair), *filled))
        if not kind.__flags__ & HEAP or not (own or slots or _made_of_python(kind)):
            self._said_of_itself(item)

    def _said_of_itself(self, item: Any) -> None:
        try:
            said = item.__reduce_ex__(4)
        except Exception as error:
            raise _UnknownError from error
        if isinstance(said, str):
            self._say(said)
            return
        held = [None if part is None else list(part) for part in said[3:5]]  # items of lists, items of mappings
        self._items("said", [*(said[:1] if said[0].__module__ != "copyreg" else ()), *said[1:3], *held])

    def _enumerated(self, item: enum.Enum) -> None:
        self._say(f"{type(item).__module__}.{type(item).__qualname__}.{item.name}")
        self.add(item.value)

    # ---------------------------------------------------------------- code

    def _function(self, item: types.FunctionType) -> None:
        self._code(item.__code__)
        self._items("bound", (item.__defaults__, item.__kwdefaults__, *map(in_cell, item.__closure__ or ())))
        wrapped = item.__dict__.get("__wrapped__")
        if is_users(item.__code__.co_filename):
            self._named(item)
            self.add(item.__dict__)
        else:
            self._say(f"{item.__module__}.{item.__qualname__}")
            self._package(item.__module__)
            self.add(wrapped)

    def _code(self, code: types.CodeType) -> None:
        self._say(f"{code.co_name} {code.co_names} {code.co_varnames} {code.co_freevars} {code.co_flags}")
        self._say(f"{code.co_argcount} {code.co_posonlyargcount} {code.co_kwonlyargcount} {code.co_exceptiontable!r}")
        self._digest.update(code.co_code)
        self._items("constants", code.co_consts)

    def _named(self, item: types.FunctionType) -> None:
        """The globals that a function names, and the modules that it imports as it runs."""
        named, imported, every = _names(item.__code__)
        space = item.__globals__
        for name in named:
            value = space.get(name, NOTHING)
            if value is not NOTHING:
                self._say(name)
                self._with_parts(value, every)
        for level, name in imported:
            package = str(space.get("__package__") or "")
            whole = importlib.util.resolve_name("." * level + name, package) if level and package else name
            module = sys.modules.get(whole)
            self._say(whole)
            if module is not None:
                self._with_parts(module, every)
            elif _is_users_module(whole):
                raise _UnknownError  # what it will say when it is imported

    def _with_parts(self, value: Any, names: Iterable[str]) -> None:
        """A value; of a module of the user's its file, and those of its parts that the code may be asking for."""
        if not isinstance(value, types.ModuleType):
            self.add(value)
            return
        self._package(value.__name__)
        self._say(value.__name__)
        file = getattr(value, "__file__", None)
        if file is None or not is_users(file):
            return
        if id(value) not in self._met:
            self._met[id(value)] = len(self._met)
            self._alive.append(value)
            try:
                self._digest.update(hashlib.blake2b(Path(file).read_bytes()).digest())
            except OSError as error:
                raise _UnknownError from error
        for name in names:
            part = vars(value).get(name, NOTHING)
            if part is not NOTHING and part is not value:
                self._say(name)
                self.add(part) if not isinstance(part, types.ModuleType) else self._with_parts(part, ())

    def _class(self, item: type) -> None:
        users = is_users_class(item)
        self._say(f"class {item.__qualname__}")
        if not users:  # what a script is called, and whether it was run or imported, changes no number
            self._say(item.__module__)
            self._package(item.__module__)
        self._items("bases", item.__bases__)
        for name, value in vars(item).items():
            if name in _NO_CODE or name in _NO_SETTING:
                continue
            if users or _is_users_function(value):  # a method of a package that the user replaced
                self._say(name)
                self.add(value)

    def _loose_module(self, item: types.ModuleType) -> None:
        self._with_parts(item, ())

    def _descriptor(self, item: Any) -> None:
        parts = ("fget", "fset", "__func__", "func", "__wrapped__")
        self._items("descriptor", [getattr(item, name, None) for name in parts])

    def _in_c(self, item: Any) -> None:
        self._say(f"{getattr(item, '__module__', '')}.{getattr(item, '__qualname__', '')}")
        holder = getattr(item, "__self__", None)
        if holder is not None and not isinstance(holder, types.ModuleType):
            self.add(holder)

    def _partial(self, item: functools.partial[Any]) -> None:
        self._items("partial", (item.func, item.args, item.keywords))

    def _method(self, item: types.MethodType) -> None:
        self._items("method", (item.__func__, item.__self__))

    def _unknown(self, _item: Any) -> None:
        raise _UnknownError


_HANDLERS: tuple[tuple[Any, Callable[[_Dependencies, Any], None]], ...] = (
    (Tensor, _Dependencies._tensor),
    (nn.Module, _Dependencies._module),
    ((dict, types.MappingProxyType), _Dependencies._mapping),
    ((list, tuple), _Dependencies._sequence),
    ((set, frozenset), _Dependencies._set),
    ((bytearray, memoryview, array.array), _Dependencies._bytes),
    (np.ndarray, _Dependencies._array),
    (enum.Enum, _Dependencies._enumerated),
    (
        (torch.Generator, random.Random, np.random.Generator, np.random.RandomState, np.random.BitGenerator),
        _Dependencies._random,
    ),
    (types.FunctionType, _Dependencies._function),
    (types.CodeType, _Dependencies._code),
    (types.MethodType, _Dependencies._method),
    (functools.partial, _Dependencies._partial),
    ((types.BuiltinFunctionType, types.MethodWrapperType, types.WrapperDescriptorType), _Dependencies._in_c),
    ((types.MethodDescriptorType, types.ClassMethodDescriptorType), _Dependencies._in_c),
    ((types.MemberDescriptorType, types.GetSetDescriptorType, weakref.ref), _Dependencies._in_c),
    ((property, staticmethod, classmethod, functools.cached_property), _Dependencies._descriptor),
    (type(functools.lru_cache(len)), _Dependencies._descriptor),
    (type, _Dependencies._class),
    (types.ModuleType, _Dependencies._loose_module),
    (types.GeneratorType, _Dependencies._unknown),
)


@functools.lru_cache(maxsize=4096)
def _names(code: types.CodeType) -> tuple[tuple[str, ...], tuple[tuple[int, str], ...], tuple[str, ...]]:
    """The globals that code names, what it imports (level, name), and every name in it; also of functions within it."""
    named: set[str] = set()
    imported: set[tuple[int, str]] = set()
    every = set(code.co_names)
    level: Any = 0
    constants: list[Any] = []
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            named.add(instruction.argval)
        elif instruction.opname == "LOAD_CONST":
            constants.append(instruction.argval)
        elif instruction.opname == "IMPORT_NAME":
            level = constants[-2] if len(constants) > 1 and isinstance(constants[-2], int) else 0
            imported.add((level, instruction.argval))
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            more, further, others = _names(inner)
            named.update(more)
            imported.update(further)
            every.update(others)
    return tuple(sorted(named)), tuple(sorted(imported)), tuple(sorted(every))


def _is_users_module(name: str) -> bool:
    try:
        found = importlib.util.find_spec(name.partition(".")[0])
    except (ImportError, ValueError):
        return False
    return found is not None and bool(found.origin) and is_users(str(found.origin))


def _is_users_function(value: Any) -> bool:
    inner = inspect.unwrap(value) if isinstance(value, types.FunctionType) else getattr(value, "__func__", value)
    return isinstance(inner, types.FunctionType) and is_users(inner.__code__.co_filename)


def _made_of_python(kind: type) -> bool:
    """Whether a class and those above it hold nothing that only C can see."""
    return all(each is object or each.__flags__ & HEAP for each in kind.__mro__)
