"""Everything that a model can reach and change, as it is now, and how to make it so again.

A forward pass is Python: it may append to a list in a dictionary of an object that an attribute holds, count in a
closure or in its class, draw from a generator of its own. The walk below goes from the roots (a model, the function
that is called, what it is called with) through attributes, containers, slots, closures, and the globals and class
attributes that code outside of installed packages names. It runs no code of the user: no property, no ``__getattr__``,
no method that a subclass overrides.

Not followed are what other threads may be working on (objects that hold locks, queues or threads), data loaders, and
globals of installed packages. What cannot be wound back, as a Python generator or an open file, is replaced for the
time of a pass by something that says so as soon as the pass takes from it.
"""

from __future__ import annotations

import array
import copy
import dis
import enum
import functools
import io
import itertools
import operator
import pathlib
import random
import sys
import sysconfig
import types
import warnings
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stabkit.errors import TraceError

Path = tuple[Any, str]  # the path of what holds it, and the last part of its own; joined only where something is named

_ATOMS = (
    *(int, float, complex, str, bytes, bool, type(None), type(...), slice, range, np.generic, np.dtype, enum.Enum),
    *(torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format, types.ModuleType, types.CodeType),
    *(property, staticmethod, classmethod, types.MemberDescriptorType, types.GetSetDescriptorType),
    *(weakref.ref, weakref.WeakKeyDictionary, weakref.WeakValueDictionary, torch.utils.hooks.RemovableHandle),
)
#: packages whose objects belong to the process, to other threads, or describe code
_LEFT = (
    *("threading", "queue", "multiprocessing", "asyncio", "concurrent", "logging", "socket", "subprocess", "_thread"),
    *("torch.distributed", "torch.utils.data", "torch.fx", "torch._", "torch.cuda", "sympy", "inspect", "typing", "abc"),
)
_SHARED = ("_thread", "threading", "queue", "multiprocessing")
_HERE = str(pathlib.Path(__file__).parents[2])  # this package
_LIBRARIES = (*{sysconfig.get_path(name) for name in ("purelib", "platlib", "stdlib", "platstdlib")}, _HERE)
_GENERATORS = (torch.Generator, random.Random, np.random.Generator, np.random.RandomState, np.random.BitGenerator)
_MANY = 64


@dataclass(slots=True)
class Place:
    """Something that holds others: how it was, and how to compare and fill it."""

    holder: Any
    contents: Any
    same: Callable[[Any, Any], bool]
    fill: Callable[[Any, Any], None]
    items: Callable[[Any], Iterable[tuple[Any, Any]]]
    put: Callable[[Any, Any, Any], None]


class Reached:
    """What was reached from some roots.

    Args:
        roots: the model, and functions that run with it.
        given: what it is called with.

    Attributes:
        places: containers, attributes, slots, closures and the like.
        tensors: every tensor by its id.
        modules: the modules.
        generators: random generators.
        arrays: arrays of numpy with a copy of each.
        scripted: modules of TorchScript, with what they hold.
        with_tensors: places that hold a tensor of their own.
        with_iterators: places that hold what can be taken from, key and path.
        spared: ids of tensors for which no copies stand: those that were given, and those of optimizers.
    """

    def __init__(self, roots: Iterable[Any], given: Any = ()) -> None:
        self.places: list[Place] = []
        self.tensors: dict[int, Tensor] = {}
        self.modules: list[nn.Module] = []
        self.generators: dict[int, Any] = {}
        self.arrays: list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]] = []
        self.scripted: list[tuple[Any, dict[str, Any]]] = []
        self.with_tensors: list[Place] = []
        self.with_iterators: list[tuple[Place, Any, Path]] = []
        self._seen: set[int] = set()
        self._waiting: list[tuple[Any, Path]] = [(given, (None, ""))]
        self._walk()
        self.spared = set(self.tensors)
        self._waiting = [(root, (None, "")) for root in roots]
        self._walk()

    def _walk(self) -> None:
        while self._waiting:
            item, path = self._waiting.pop()
            if id(item) not in self._seen:
                self._seen.add(id(item))
                _kind(type(item))(self, item, path)

    def restore(self) -> None:
        """Make everything what it was."""
        for place in self.places:
            if not place.same(place.holder, place.contents):
                place.fill(place.holder, place.contents)
        for now, before in self.arrays:
            if now.shape != before.shape:
                now.shape = before.shape
            if now.tobytes() != before.tobytes() if now.dtype != object else True:
                now[...] = before
        for module, before_ in self.scripted:
            for name, value in before_.items():
                now_ = module.getattr(name)
                if isinstance(value, Tensor) and now_ is value:
                    continue
                module.setattr(name, value)

    # ---------------------------------------------------------------- kinds of holders

    def _add(self, place: Place, path: Path) -> None:
        self.places.append(place)
        self._follow(place, place.items(place.contents), path)

    def _follow(self, place: Place, items: Iterable[tuple[Any, Any]], path: Path) -> None:
        tensors = False
        for key, value in items:
            kind = _kind(type(value))
            if kind is _atom:
                continue
            if kind is _tensor:
                tensors = True
            elif kind is _iterator:
                self.with_iterators.append((place, key, (path, str(key))))
                continue
            self._waiting.append((value, (path, str(key))))
        if tensors:
            self.with_tensors.append(place)

    def wait_for(self, values: Iterable[Any], path: Path) -> None:
        """Look at these as well."""
        self._waiting.extend((value, path) for value in values if _kind(type(value)) is not _atom)


Kind = Callable[[Reached, Any, Path], None]


def _atom(_reached: Reached, _item: Any, _path: Path) -> None:
    """Nothing hangs on it."""


def _tensor(reached: Reached, item: Tensor, path: Path) -> None:
    reached.tensors[id(item)] = item
    if type(item) is not Tensor and (own := item.__dict__):
        _mapping(reached, own, path)


def _module(reached: Reached, item: nn.Module, path: Path) -> None:
    reached.modules.append(item)
    if isinstance(item, torch.jit.ScriptModule):
        _scripted(reached, item)
    _instance(reached, item, path)


def _scripted(reached: Reached, item: Any) -> None:
    module = item._c
    names = item._concrete_type.get_attributes()
    held = {name: module.getattr(name) for name in names if module.hasattr(name)}
    reached.scripted.append((module, held))
    reached.wait_for(held.values(), (None, ""))


def _mapping(reached: Reached, item: dict[Any, Any], path: Path) -> None:
    """A dictionary or a subclass; one that is empty needs no copy."""
    if isinstance(item, OrderedDict):
        contents = dict(OrderedDict.items(item)) if item else _EMPTY
        reached._add(Place(item, contents, _same_ordered, _fill_ordered, dict.items, _set_item), path)
    else:
        contents = dict.copy(item) if item else _EMPTY
        reached._add(Place(item, contents, _same_mapping, _fill_mapping, dict.items, _set_item), path)
    if type(item) not in (dict, OrderedDict):
        _instance(reached, item, path)


_EMPTY: dict[Any, Any] = {}


def _same_mapping(now: dict[Any, Any], before: dict[Any, Any]) -> bool:
    if not before:
        return not dict.__len__(now)
    return (
        dict.__len__(now) == len(before)
        and all(map(operator.is_, dict.values(now), before.values()))
        and list(dict.keys(now)) == list(before)
    )


def _same_ordered(now: OrderedDict[Any, Any], before: dict[Any, Any]) -> bool:
    if not before:
        return not dict.__len__(now)
    return (
        dict.__len__(now) == len(before)
        and all(map(operator.is_, OrderedDict.values(now), before.values()))
        and list(OrderedDict.keys(now)) == list(before)
    )


def _fill_mapping(holder: dict[Any, Any], contents: dict[Any, Any]) -> None:
    dict.clear(holder)
    dict.update(holder, contents)


def _fill_ordered(holder: OrderedDict[Any, Any], contents: dict[Any, Any]) -> None:
    OrderedDict.clear(holder)
    for key, value in contents.items():
        OrderedDict.__setitem__(holder, key, value)


def _set_item(holder: dict[Any, Any], key: Any, value: Any) -> None:
    dict.__setitem__(holder, key, value)


def _all_atoms(values: Any) -> bool:
    return len(values) > _MANY and all(_kind(kind) is _atom for kind in set(map(type, values)))


def _sequence(reached: Reached, item: list[Any], path: Path) -> None:
    contents = list.copy(item)
    items: Any = _nothing_of if _all_atoms(contents) else enumerate
    reached._add(Place(item, contents, _same_sequence, _fill_list, items, _set_entry), path)
    if type(item) is not list:
        _instance(reached, item, path)


def _nothing_of(_contents: Any) -> tuple[()]:
    return ()


def _same_sequence(now: Any, before: Any) -> bool:
    return len(now) == len(before) and all(map(operator.is_, now, before))


def _fill_list(holder: list[Any], contents: list[Any]) -> None:
    list.__setitem__(holder, slice(None), contents)


def _set_entry(holder: list[Any], key: int, value: Any) -> None:
    list.__setitem__(holder, key, value)


def _queue(reached: Reached, item: deque[Any], path: Path) -> None:
    place = Place(item, list(deque.__iter__(item)), _same_sequence, _fill_queue, enumerate, deque.__setitem__)
    reached._add(place, path)
    if type(item) is not deque:
        _instance(reached, item, path)


def _fill_queue(holder: deque[Any], contents: list[Any]) -> None:
    deque.clear(holder)
    deque.extend(holder, contents)


def _set(reached: Reached, item: set[Any], path: Path) -> None:
    place = Place(item, set.copy(item), operator.eq, _fill_set, _nothing_of, _never)
    reached.places.append(place)
    if not _all_atoms(place.contents):
        reached.wait_for(place.contents, path)
    if type(item) is not set:
        _instance(reached, item, path)


def _fill_set(holder: set[Any], contents: set[Any]) -> None:
    set.clear(holder)
    set.update(holder, contents)


def _never(_holder: Any, _key: Any, _value: Any) -> None:
    raise AssertionError("nothing is put into this")


def _fixed(reached: Reached, item: tuple[Any, ...] | frozenset[Any], path: Path) -> None:
    if not _all_atoms(item):
        reached.wait_for(item, path)
    if type(item) not in (tuple, frozenset):
        _instance(reached, item, path)


def _bytes(reached: Reached, item: Any, _path: Path) -> None:
    reached.places.append(Place(item, item[:], operator.eq, _fill_bytes, _nothing_of, _never))


def _fill_bytes(holder: Any, contents: Any) -> None:
    holder[:] = contents


def _text(reached: Reached, item: Any, _path: Path) -> None:
    """A file in memory."""
    if item.closed:
        return
    reached.places.append(Place(item, item.__getstate__(), _same_text, _fill_text, _nothing_of, _never))


def _same_text(now: Any, before: Any) -> bool:
    return bool(now.__getstate__()[:2] == before[:2] and now.tell() == before[-2])


def _fill_text(holder: Any, contents: Any) -> None:
    holder.__setstate__(contents)


def _array(reached: Reached, item: np.ndarray[Any, Any], path: Path) -> None:
    if item.flags.writeable or (isinstance(item.base, np.ndarray) and item.base.flags.writeable):
        reached.arrays.append((item, item.copy()))
    if item.dtype == object:
        reached.wait_for(item.ravel().tolist(), path)


def _generator(reached: Reached, item: Any, path: Path) -> None:
    reached.generators[id(item)] = item
    if type(item) not in _GENERATORS:
        _instance(reached, item, path)


def _iterator(reached: Reached, item: Any, path: Path) -> None:
    """Met by itself, not in a place where something could stand for it."""


def _own(reached: Reached, item: Any, path: Path) -> None:
    """Objects and functions of this package: they stay as they are, and lead to the user's."""
    if isinstance(item, types.FunctionType):
        values = [_in_cell(cell) for cell in item.__closure__ or ()]
    else:
        values = list((_own_dict(item) or {}).values())
    reached.wait_for((value for value in values if _kind(type(value)) in _LEADING), path)


def _function(reached: Reached, item: types.FunctionType, path: Path) -> None:
    if item.__code__.co_filename.startswith(_HERE):
        _own(reached, item, path)
        return
    for cell in item.__closure__ or ():
        if id(cell) not in reached._seen:
            reached._seen.add(id(cell))
            reached._add(Place(cell, _in_cell(cell), _same_cell, _fill_cell, _items_of_cell, _set_cell), path)
    reached.wait_for(item.__defaults__ or (), path)
    reached.wait_for((item.__kwdefaults__ or {}).values(), path)
    if own := item.__dict__:
        _mapping(reached, own, path)
    if is_users(item.__code__.co_filename):
        _globals(reached, item, path)


_NOTHING = object()


def _in_cell(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return _NOTHING


def _same_cell(cell: types.CellType, contents: Any) -> bool:
    return _in_cell(cell) is contents


def _fill_cell(cell: types.CellType, contents: Any) -> None:
    if contents is _NOTHING:
        del cell.cell_contents
    else:
        cell.cell_contents = contents


def _items_of_cell(contents: Any) -> tuple[tuple[Any, Any], ...]:
    return () if contents is _NOTHING else (("closure", contents),)


def _set_cell(cell: types.CellType, _key: Any, value: Any) -> None:
    cell.cell_contents = value


def _globals(reached: Reached, item: types.FunctionType, path: Path) -> None:
    """The globals that a function names: what they are bound to where it binds them itself, and what hangs on them."""
    names, bound = _named(item.__code__)
    space = item.__globals__
    for name in names:
        if name not in space:
            value = _NOTHING
        else:
            value = space[name]
        if name in bound:
            key = (id(space), name)
            if hash(key) not in reached._seen:
                reached._seen.add(hash(key))
                place = Place((space, name), value, _same_global, _fill_global, _items_of_cell, _set_global)
                reached._add(place, path)
        elif value is not _NOTHING:
            reached.wait_for((value,), (path, name))


@functools.lru_cache(maxsize=4096)
def _named(code: types.CodeType) -> tuple[frozenset[str], frozenset[str]]:
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
            more, further = _named(inner)
            names |= more
            bound |= further
    return frozenset(names | bound), frozenset(bound)


def _same_global(where: tuple[dict[str, Any], str], value: Any) -> bool:
    return where[0].get(where[1], _NOTHING) is value


def _fill_global(where: tuple[dict[str, Any], str], value: Any) -> None:
    if value is _NOTHING:
        where[0].pop(where[1], None)
    else:
        where[0][where[1]] = value


def _set_global(where: tuple[dict[str, Any], str], _key: Any, value: Any) -> None:
    where[0][where[1]] = value


def _method(reached: Reached, item: types.MethodType, path: Path) -> None:
    reached.wait_for((item.__self__, item.__func__), path)


def _builtin(reached: Reached, item: types.BuiltinMethodType, path: Path) -> None:
    if not isinstance(item.__self__, types.ModuleType):
        reached.wait_for((item.__self__,), path)


def _partial(reached: Reached, item: functools.partial[Any], path: Path) -> None:
    reached.wait_for((item.func, item.args, item.keywords), path)


def _class(reached: Reached, item: type, path: Path) -> None:
    """The attributes of a class of the user's, and what its methods name."""
    if not _is_users_class(item):
        return
    contents = {k: v for k, v in vars(item).items() if k not in ("__dict__", "__weakref__", "__doc__")}
    reached._add(Place(item, contents, _same_class, _fill_class, dict.items, setattr), path)
    for value in contents.values():
        inner = value.fget if isinstance(value, property) else getattr(value, "__func__", None)
        if isinstance(inner, types.FunctionType):
            reached.wait_for((inner,), path)


def _same_class(now: type, before: dict[str, Any]) -> bool:
    held = vars(now)
    names = [name for name in held if name not in ("__dict__", "__weakref__", "__doc__")]
    return names == list(before) and all(held[name] is before[name] for name in names)


def _fill_class(holder: type, contents: dict[str, Any]) -> None:
    for name in [name for name in vars(holder) if name not in contents]:
        if name not in ("__dict__", "__weakref__", "__doc__", "__abstractmethods__", "_abc_impl"):
            type.__delattr__(holder, name)
    for name, value in contents.items():
        if vars(holder).get(name, _NOTHING) is not value:
            type.__setattr__(holder, name, value)


def _optimizer(reached: Reached, item: torch.optim.Optimizer, path: Path) -> None:
    """Its tensors are as large as the model: no copies of them are made beforehand."""
    for state in item.state.values():
        if isinstance(state, dict):
            reached.spared.update(id(value) for value in state.values() if isinstance(value, Tensor))
    _instance(reached, item, path)


def _instance(reached: Reached, item: Any, path: Path) -> None:
    """An object: its attributes and slots, and those of its class where that is the user's."""
    own = _own_dict(item)
    if own is not None:
        if any(type(value).__module__.startswith(_SHARED) for value in own.values()):
            return  # other threads may be at work on it
        if id(own) not in reached._seen:
            reached._seen.add(id(own))
            place = Place(own, dict.copy(own), _same_mapping, _fill_mapping, dict.items, _set_item)
            reached._add(place, path)
    slots = _slots(type(item))
    if slots:
        contents = {name: _slot(item, slot) for name, slot in slots.items()}
        reached._add(Place(item, contents, _same_slots, _fill_slots, _items_of_slots, _set_slot), path)
    for kind in type(item).__mro__:
        if id(kind) not in reached._seen and _is_users_class(kind):
            reached._waiting.append((kind, (path, kind.__name__)))


def _own_dict(item: Any) -> dict[str, Any] | None:
    try:
        own = object.__getattribute__(item, "__dict__")
    except AttributeError:
        return None
    return own if isinstance(own, dict) else None


@functools.lru_cache(maxsize=4096)
def _slots(kind: type) -> dict[str, Any]:
    found = {}
    for owner in kind.__mro__:
        names = vars(owner).get("__slots__", ())
        for name in (names,) if isinstance(names, str) else tuple(names):
            slot = vars(owner).get(name)
            if isinstance(slot, types.MemberDescriptorType):
                found[name] = slot
    return found


def _slot(item: Any, slot: Any) -> Any:
    try:
        return slot.__get__(item, type(item))
    except AttributeError:
        return _NOTHING


def _items_of_slots(contents: dict[str, Any]) -> list[tuple[str, Any]]:
    return [(name, value) for name, value in contents.items() if value is not _NOTHING]


def _same_slots(item: Any, contents: dict[str, Any]) -> bool:
    slots = _slots(type(item))
    return all(_slot(item, slots[name]) is value for name, value in contents.items())


def _fill_slots(item: Any, contents: dict[str, Any]) -> None:
    for name, slot in _slots(type(item)).items():
        if _slot(item, slot) is contents[name]:
            continue
        if contents[name] is _NOTHING:
            slot.__delete__(item)
        else:
            slot.__set__(item, contents[name])


def _set_slot(item: Any, key: str, value: Any) -> None:
    _slots(type(item))[key].__set__(item, value)


# -------------------------------------------------------------------- which kind a type is

_KINDS: tuple[tuple[Any, Kind], ...] = (
    (_ATOMS, _atom),
    (Tensor, _tensor),
    (nn.Module, _module),
    (torch.optim.Optimizer, _optimizer),
    (dict, _mapping),
    (list, _sequence),
    (deque, _queue),
    (set, _set),
    ((tuple, frozenset), _fixed),
    ((bytearray, array.array), _bytes),
    (np.ndarray, _array),
    (_GENERATORS, _generator),
    (types.FunctionType, _function),
    (types.MethodType, _method),
    (types.BuiltinMethodType, _builtin),
    (functools.partial, _partial),
    ((io.StringIO, io.BytesIO), _text),
    (io.IOBase, _iterator),
    (type, _class),
)


@functools.lru_cache(maxsize=8192)
def _kind(kind: type) -> Kind:
    if kind.__module__.startswith("stabkit.") and not issubclass(kind, nn.Module):
        return _own
    for types_, handler in _KINDS:
        if issubclass(kind, types_):
            return handler
    if kind.__module__.startswith(_LEFT) or kind.__name__ in ("RLock", "lock"):
        return _atom
    if hasattr(kind, "__next__") and not kind.__flags__ & _HEAP:
        return _iterator
    if kind is types.GeneratorType:
        return _iterator
    return _instance


_LEADING = (_module, _function, _method, _partial, _own)
_HEAP = 1 << 9  # Py_TPFLAGS_HEAPTYPE: a class that Python code made


def is_users(file: str) -> bool:
    """Whether code is no installed package's and not Python's own."""
    return not file.startswith(_LIBRARIES) and not file.startswith("<frozen")


@functools.lru_cache(maxsize=4096)
def _is_users_class(kind: type) -> bool:
    if not kind.__flags__ & _HEAP:
        return False
    for value in vars(kind).values():
        inner = getattr(value, "__func__", value)
        if isinstance(inner, types.FunctionType):
            return is_users(inner.__code__.co_filename)
    module = sys.modules.get(kind.__module__)
    return is_users(getattr(module, "__file__", None) or "")


# -------------------------------------------------------------------- what cannot be wound back


#: iterators that hold no other iterator, so that a copy of one takes nothing from the original
_COPIED = (
    *(type(iter(item)) for item in ([], (), {}, "", b"", range(0), set(), {}.values(), {}.items())),  # type: ignore[call-overload]
    itertools.count,
    itertools.repeat,
)


def _copied(item: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of copies of itertools, which end in Python 3.14
        try:
            if isinstance(item, itertools.cycle):
                kind, (inner,), (seen, first) = item.__reduce__()  # type: ignore[misc]
                fresh = _copied(inner)
                if fresh is None:
                    return None
                made = kind(fresh)
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
