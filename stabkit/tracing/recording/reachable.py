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
import enum
import functools
import io
import random
import types
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stabkit.tracing.recording import places
from stabkit.tracing.recording.places import (
    EMPTY,
    NOTHING,
    Place,
    in_cell,
    nothing_of,
    same_sequence,
    slots_of,
)
from stabkit.tracing.recording.users_code import HEAP, HERE, is_users, is_users_class, named_globals

Path = tuple[Any, str]  # the path of what holds it, and the last part of its own; joined only where something is named

_ATOMS = (
    *(int, float, complex, str, bytes, bool, type(None), type(...), slice, range, np.generic, np.dtype, enum.Enum),
    *(torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format, types.ModuleType, types.CodeType),
    *(property, staticmethod, classmethod, types.MemberDescriptorType, types.GetSetDescriptorType),
    *(weakref.ref, weakref.WeakKeyDictionary, weakref.WeakValueDictionary, torch.utils.hooks.RemovableHandle),
)
#: packages whose objects belong to the process, to other threads, or describe code
_LEFT = (
    *("threading", "queue", "_queue", "multiprocessing", "asyncio", "concurrent", "logging", "socket", "_thread"),
    *("subprocess", "sympy", "inspect", "typing", "abc"),
    *("torch.distributed", "torch.utils.data", "torch.fx", "torch._", "torch.cuda"),
)
_SHARED = ("_thread", "threading", "queue", "multiprocessing")
_GENERATORS = (torch.Generator, random.Random, np.random.Generator, np.random.RandomState, np.random.BitGenerator)
_MANY = 64
_PLAIN = (dict, OrderedDict)


class Reached:
    """What was reached from some roots.

    Args:
        roots: the model, and functions that run with it.
        given: what it is called with.

    Attributes:
        places: containers, attributes, slots, closures and the like.
        empty: dictionaries that hold nothing.
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
        self.empty: list[dict[Any, Any]] = []
        self.tensors: dict[int, Tensor] = {}
        self.modules: list[nn.Module] = []
        self.generators: dict[int, Any] = {}
        self.arrays: list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]] = []
        self.scripted: list[tuple[Any, dict[str, Any]]] = []
        self.with_tensors: list[Place] = []
        self.with_iterators: list[tuple[Place, Any, Path]] = []
        self._own: list[tuple[Any, list[Any]]] = []
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

    def again(self) -> Reached | None:
        """What another walk would find, where it is what it was: a copy with the numbers of arrays as they are now.

        To compare what places hold takes a fraction of the time of a walk, which asks every thing what it is.
        """
        if self.scripted or any(self.empty) or any(now.dtype == object for now, _ in self.arrays):
            return None
        if not all(place.same(place.holder, place.contents) for place in self.places):
            return None
        if not all(same_sequence(_led_to(item), values) for item, values in self._own):
            return None
        found = copy.copy(self)  # one that is in use goes back to the numbers that it began with
        found.arrays = [(now, now.copy()) for now, _ in self.arrays]
        return found

    def further(self, roots: Iterable[Any]) -> Reached:
        """The same with what hangs on more roots."""
        new = [root for root in roots if _kind(type(root)) is not _atom and id(root) not in self._seen]
        if not new:
            return self
        found = copy.copy(self)
        for name, held in vars(self).items():
            vars(found)[name] = copy.copy(held)
        found._waiting = [(root, (None, "")) for root in new]
        found._walk()
        return found

    def restore(self) -> None:
        """Make everything what it was."""
        for held in self.empty:
            if held:
                held.clear()
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
            if kind is _mapping and not value and type(value) in _PLAIN:
                self.empty.append(value)  # most tables of hooks are
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
    _attributes(reached, item, vars(item), path)


def _scripted(reached: Reached, item: Any) -> None:
    module = item._c
    names = item._concrete_type.get_attributes()
    held = {name: module.getattr(name) for name in names if module.hasattr(name)}
    reached.scripted.append((module, held))
    reached.wait_for(held.values(), (None, ""))


def _mapping(reached: Reached, item: dict[Any, Any], path: Path) -> None:
    """A dictionary or a subclass; one that is empty needs no copy."""
    if isinstance(item, OrderedDict):
        contents = dict(OrderedDict.items(item)) if item else EMPTY
        reached._add(places.of_ordered(item, contents), path)
    else:
        contents = dict.copy(item) if item else EMPTY
        reached._add(places.of_mapping(item, contents), path)
    if type(item) not in (dict, OrderedDict):
        _instance(reached, item, path)


def _all_atoms(values: Any) -> bool:
    return len(values) > _MANY and all(_kind(kind) is _atom for kind in set(map(type, values)))


def _sequence(reached: Reached, item: list[Any], path: Path) -> None:
    contents = list.copy(item)
    items: Any = nothing_of if _all_atoms(contents) else enumerate
    reached._add(places.of_list(item, contents, items), path)
    if type(item) is not list:
        _instance(reached, item, path)


def _queue(reached: Reached, item: deque[Any], path: Path) -> None:
    place = places.of_queue(item)
    reached._add(place, path)
    if type(item) is not deque:
        _instance(reached, item, path)


def _set(reached: Reached, item: set[Any], path: Path) -> None:
    place = places.of_set(item)
    reached.places.append(place)
    if not _all_atoms(place.contents):
        reached.wait_for(place.contents, path)
    if type(item) is not set:
        _instance(reached, item, path)


def _fixed(reached: Reached, item: tuple[Any, ...] | frozenset[Any], path: Path) -> None:
    if not _all_atoms(item):
        reached.wait_for(item, path)
    if type(item) not in (tuple, frozenset):
        _instance(reached, item, path)


def _bytes(reached: Reached, item: Any, _path: Path) -> None:
    reached.places.append(places.of_bytes(item))


def _text(reached: Reached, item: Any, _path: Path) -> None:
    """A file in memory."""
    if item.closed:
        return
    reached.places.append(places.of_text(item))


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
    values = _led_to(item)
    reached._own.append((item, values))
    reached.wait_for(values, path)


def _led_to(item: Any) -> list[Any]:
    """What of the user's an object or a function of this package holds."""
    if isinstance(item, types.FunctionType):
        values = [in_cell(cell) for cell in item.__closure__ or ()]
    else:
        values = list((_own_dict(item) or {}).values())
    return [value for value in values if _kind(type(value)) in _LEADING]


def _function(reached: Reached, item: types.FunctionType, path: Path) -> None:
    if item.__code__.co_filename.startswith(HERE):
        _own(reached, item, path)
        return
    for cell in item.__closure__ or ():
        if id(cell) not in reached._seen:
            reached._seen.add(id(cell))
            reached._add(places.of_cell(cell), path)
    reached.wait_for(item.__defaults__ or (), path)
    reached.wait_for((item.__kwdefaults__ or {}).values(), path)
    if own := item.__dict__:
        _mapping(reached, own, path)
    if is_users(item.__code__.co_filename):
        _globals(reached, item, path)


def _globals(reached: Reached, item: types.FunctionType, path: Path) -> None:
    """The globals that a function names: what they are bound to where it binds them itself, and what hangs on them."""
    names, bound = named_globals(item.__code__)
    space = item.__globals__
    for name in names:
        value = space.get(name, NOTHING)
        if name in bound:
            key = (id(space), name)
            if hash(key) not in reached._seen:
                reached._seen.add(hash(key))
                reached._add(places.of_global(space, name), path)
        elif value is not NOTHING:
            reached.wait_for((value,), (path, name))


def _method(reached: Reached, item: types.MethodType, path: Path) -> None:
    reached.wait_for((item.__self__, item.__func__), path)


def _builtin(reached: Reached, item: types.BuiltinMethodType, path: Path) -> None:
    if not isinstance(item.__self__, types.ModuleType):
        reached.wait_for((item.__self__,), path)


def _partial(reached: Reached, item: functools.partial[Any], path: Path) -> None:
    reached.wait_for((item.func, item.args, item.keywords), path)


def _class(reached: Reached, item: type, path: Path) -> None:
    """The attributes of a class of the user's, and what its methods name."""
    if not is_users_class(item):
        return
    contents = {k: v for k, v in vars(item).items() if k not in ("__dict__", "__weakref__", "__doc__")}
    reached._add(places.of_class(item, contents), path)
    for value in contents.values():
        inner = value.fget if isinstance(value, property) else getattr(value, "__func__", None)
        if isinstance(inner, types.FunctionType):
            reached.wait_for((inner,), path)


def _optimizer(reached: Reached, item: torch.optim.Optimizer, path: Path) -> None:
    """Its tensors are as large as the model: no copies of them are made beforehand."""
    for state in item.state.values():
        if isinstance(state, dict):
            reached.spared.update(id(value) for value in state.values() if isinstance(value, Tensor))
    _instance(reached, item, path)


def _instance(reached: Reached, item: Any, path: Path) -> None:
    """An object: its attributes and slots, and those of its class where that is the user's."""
    own = _own_dict(item)
    if own is not None and any(_home(type(value)).startswith(_SHARED) for value in own.values()):
        return  # other threads may be at work on it
    _attributes(reached, item, own, path)


def _attributes(reached: Reached, item: Any, own: dict[str, Any] | None, path: Path) -> None:
    if own is not None and id(own) not in reached._seen:
        reached._seen.add(id(own))
        place = places.of_mapping(own, dict.copy(own))
        reached._add(place, path)
    if slots_of(item):
        reached._add(places.of_slots(item), path)
    classes: tuple[Any, ...] = type(item).__mro__
    for kind in classes:
        if id(kind) not in reached._seen and is_users_class(kind):
            reached._waiting.append((kind, (path, kind.__name__)))


def _own_dict(item: Any) -> dict[str, Any] | None:
    try:
        own = object.__getattribute__(item, "__dict__")
    except AttributeError:
        return None
    return own if isinstance(own, dict) else None


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


def _home(kind: type) -> str:
    """The module that a class comes from; some made by Cython name none."""
    name = kind.__module__
    return name if isinstance(name, str) else ""


_known: dict[type, Kind] = {}  # of the newest classes


def _kind(kind: type) -> Kind:
    """What is done with objects of a class."""
    found = _known.get(kind)
    if found is None:
        if len(_known) > 8192:
            _known.clear()
        found = _known[kind] = _kind_of(kind)
    return found


def _kind_of(kind: type) -> Kind:
    if _home(kind).startswith("stabkit.") and not issubclass(kind, nn.Module):
        return _own
    for types_, handler in _KINDS:
        if issubclass(kind, types_):
            return handler
    if _home(kind).startswith(_LEFT) or kind.__name__ in ("RLock", "lock"):
        return _atom
    if hasattr(kind, "__next__") and not kind.__flags__ & HEAP:
        return _iterator
    if kind is types.GeneratorType:
        return _iterator
    return _instance


_LEADING: tuple[Kind, ...] = (_module, _function, _method, _partial, _own)
