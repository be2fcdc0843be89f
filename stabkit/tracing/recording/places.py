"""What holds other things, how it was, and how to make it so again, without a method that a subclass overrides."""

from __future__ import annotations

import functools
import operator
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

NOTHING = object()
EMPTY: dict[Any, Any] = {}


@dataclass(slots=True)
class Place:
    """Something that holds others: how it was, and how to compare and fill it."""

    holder: Any
    contents: Any
    same: Callable[[Any, Any], bool]
    fill: Callable[[Any, Any], None]
    items: Callable[[Any], Iterable[tuple[Any, Any]]]
    put: Callable[[Any, Any, Any], None]


def same_mapping(now: dict[Any, Any], before: dict[Any, Any]) -> bool:
    """Whether it is what it was."""
    if not before:
        return not dict.__len__(now)
    return (
        dict.__len__(now) == len(before)
        and all(map(operator.is_, dict.values(now), before.values()))
        and list(dict.keys(now)) == list(before)
    )


def same_ordered(now: OrderedDict[Any, Any], before: dict[Any, Any]) -> bool:
    """Whether it is what it was."""
    if not before:
        return not dict.__len__(now)
    return (
        dict.__len__(now) == len(before)
        and all(map(operator.is_, OrderedDict.values(now), before.values()))
        and list(OrderedDict.keys(now)) == list(before)
    )


def fill_mapping(holder: dict[Any, Any], contents: dict[Any, Any]) -> None:
    """Make it what it was."""
    dict.clear(holder)
    dict.update(holder, contents)


def fill_ordered(holder: OrderedDict[Any, Any], contents: dict[Any, Any]) -> None:
    """Make it what it was."""
    OrderedDict.clear(holder)
    for key, value in contents.items():
        OrderedDict.__setitem__(holder, key, value)


def set_item(holder: dict[Any, Any], key: Any, value: Any) -> None:
    """Put another thing into it."""
    dict.__setitem__(holder, key, value)


def nothing_of(_contents: Any) -> tuple[()]:
    """Of what needs no look."""
    return ()


def same_sequence(now: Any, before: Any) -> bool:
    """Whether it is what it was."""
    return len(now) == len(before) and all(map(operator.is_, now, before))


def fill_list(holder: list[Any], contents: list[Any]) -> None:
    """Make it what it was."""
    list.__setitem__(holder, slice(None), contents)


def set_entry(holder: list[Any], key: int, value: Any) -> None:
    """Put another thing into it."""
    list.__setitem__(holder, key, value)


def fill_queue(holder: deque[Any], contents: list[Any]) -> None:
    """Make it what it was."""
    deque.clear(holder)
    deque.extend(holder, contents)


def fill_set(holder: set[Any], contents: set[Any]) -> None:
    """Make it what it was."""
    set.clear(holder)
    set.update(holder, contents)


def never(_holder: Any, _key: Any, _value: Any) -> None:
    """Of what shows nothing that another thing could be put in the place of."""


def fill_bytes(holder: Any, contents: Any) -> None:
    """Make it what it was."""
    holder[:] = contents


def same_text(now: Any, before: Any) -> bool:
    """Whether it is what it was."""
    return bool(now.__getstate__()[:2] == before[:2] and now.tell() == before[-2])


def fill_text(holder: Any, contents: Any) -> None:
    """Make it what it was."""
    holder.__setstate__(contents)


def in_cell(cell: types.CellType) -> Any:
    """What a closure holds."""
    try:
        return cell.cell_contents
    except ValueError:
        return NOTHING


def same_cell(cell: types.CellType, contents: Any) -> bool:
    """Whether it is what it was."""
    return in_cell(cell) is contents


def fill_cell(cell: types.CellType, contents: Any) -> None:
    """Make it what it was."""
    if contents is NOTHING:
        del cell.cell_contents
    else:
        cell.cell_contents = contents


def items_of_cell(contents: Any) -> tuple[tuple[Any, Any], ...]:
    """What it holds, by name."""
    return () if contents is NOTHING else (("closure", contents),)


def set_cell(cell: types.CellType, _key: Any, value: Any) -> None:
    """Put another thing into it."""
    cell.cell_contents = value


def same_global(where: tuple[dict[str, Any], str], value: Any) -> bool:
    """Whether it is what it was."""
    return where[0].get(where[1], NOTHING) is value


def fill_global(where: tuple[dict[str, Any], str], value: Any) -> None:
    """Make it what it was."""
    if value is NOTHING:
        where[0].pop(where[1], None)
    else:
        where[0][where[1]] = value


def set_global(where: tuple[dict[str, Any], str], _key: Any, value: Any) -> None:
    """Put another thing into it."""
    where[0][where[1]] = value


def same_class(now: type, before: dict[str, Any]) -> bool:
    """Whether it is what it was."""
    held = vars(now)
    names = [name for name in held if name not in ("__dict__", "__weakref__", "__doc__")]
    return names == list(before) and all(held[name] is before[name] for name in names)


def fill_class(holder: type, contents: dict[str, Any]) -> None:
    """Make it what it was."""
    for name in [name for name in vars(holder) if name not in contents]:
        if name not in ("__dict__", "__weakref__", "__doc__", "__abstractmethods__", "_abc_impl"):
            type.__delattr__(holder, name)
    for name, value in contents.items():
        if vars(holder).get(name, NOTHING) is not value:
            type.__setattr__(holder, name, value)


def slots_of(item: Any) -> dict[str, Any]:
    """The slots of an object, by name."""
    kind: Any = type(item)
    return _slots(kind)


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


def in_slot(item: Any, slot: Any) -> Any:
    """What a slot holds."""
    try:
        return slot.__get__(item, type(item))
    except AttributeError:
        return NOTHING


def items_of_slots(contents: dict[str, Any]) -> list[tuple[str, Any]]:
    """What it holds, by name."""
    return [(name, value) for name, value in contents.items() if value is not NOTHING]


def same_slots(item: Any, contents: dict[str, Any]) -> bool:
    """Whether it is what it was."""
    slots = slots_of(item)
    return all(in_slot(item, slots[name]) is value for name, value in contents.items())


def fill_slots(item: Any, contents: dict[str, Any]) -> None:
    """Make it what it was."""
    for name, slot in slots_of(item).items():
        if in_slot(item, slot) is contents[name]:
            continue
        if contents[name] is NOTHING:
            slot.__delete__(item)
        else:
            slot.__set__(item, contents[name])


def set_slot(item: Any, key: str, value: Any) -> None:
    """Put another thing into it."""
    slots_of(item)[key].__set__(item, value)


def of_mapping(holder: dict[Any, Any], contents: dict[Any, Any]) -> Place:
    """A dictionary."""
    return Place(holder, contents, same_mapping, fill_mapping, dict.items, set_item)


def of_ordered(holder: OrderedDict[Any, Any], contents: dict[Any, Any]) -> Place:
    """A dictionary with an order of its own."""
    return Place(holder, contents, same_ordered, fill_ordered, dict.items, set_item)


def of_list(holder: list[Any], contents: list[Any], items: Any) -> Place:
    """A list, and how what it holds is gone through."""
    return Place(holder, contents, same_sequence, fill_list, items, set_entry)


def of_queue(holder: deque[Any]) -> Place:
    """A queue with two ends."""
    return Place(holder, list(deque.__iter__(holder)), same_sequence, fill_queue, enumerate, deque.__setitem__)


def of_set(holder: set[Any]) -> Place:
    """A set."""
    return Place(holder, set.copy(holder), operator.eq, fill_set, nothing_of, never)


def of_bytes(holder: Any) -> Place:
    """Bytes, or an array of numbers."""
    return Place(holder, holder[:], operator.eq, fill_bytes, nothing_of, never)


def of_text(holder: Any) -> Place:
    """A file in memory."""
    return Place(holder, holder.__getstate__(), same_text, fill_text, nothing_of, never)


def of_cell(cell: types.CellType) -> Place:
    """What a closure holds."""
    return Place(cell, in_cell(cell), same_cell, fill_cell, items_of_cell, set_cell)


def of_global(space: dict[str, Any], name: str) -> Place:
    """What a name of a module is bound to."""
    return Place((space, name), space.get(name, NOTHING), same_global, fill_global, items_of_cell, set_global)


def of_class(kind: type, contents: dict[str, Any]) -> Place:
    """The attributes of a class."""
    return Place(kind, contents, same_class, fill_class, dict.items, setattr)


def of_slots(item: Any) -> Place:
    """The slots of an object."""
    contents = {name: in_slot(item, slot) for name, slot in slots_of(item).items()}
    return Place(item, contents, same_slots, fill_slots, items_of_slots, set_slot)
