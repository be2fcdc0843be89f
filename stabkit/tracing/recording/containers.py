"""Finding and replacing the tensors inside whatever a model takes and returns."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

_ATOMS = (int, float, complex, str, bytes, bool, type(None), type, nn.Module, torch.dtype, torch.device)


def named_tensors(container: Any, depth: int = 8) -> list[tuple[str, Tensor]]:
    """Tensors in a nest of mappings, sequences, dataclasses and plain objects, with their paths, in order.

    Example:
        >>> [path for path, _ in named_tensors({"a": torch.ones(1), "b": (torch.ones(1), 3)})]
        ['a', 'b.0']
    """
    seen: set[int] = set()

    def walk(item: Any, path: str, left: int) -> Iterator[tuple[str, Tensor]]:
        if isinstance(item, Tensor):
            yield path, item
            return
        if isinstance(item, _ATOMS) or left == 0 or id(item) in seen:
            return
        seen.add(id(item))
        for key, child in _children(item):
            yield from walk(child, f"{path}.{key}" if path else str(key), left - 1)

    return list(walk(container, "", depth))


def listed_at(container: Any, path: str) -> list[Any] | None:
    """The list at a path of a nest; None where something else is there, or nothing.

    Example:
        >>> listed_at({"a": [1, 2], "b": (3,)}, "a"), listed_at({"a": [1, 2], "b": (3,)}, "b")
        ([1, 2], None)
    """
    for key in path.split(".") if path else ():
        container = next((child for name, child in _children(container) if str(name) == key), None)
    return container if isinstance(container, list) else None


def _children(item: Any) -> list[tuple[Any, Any]]:
    if isinstance(item, Mapping):
        return list(item.items())
    if isinstance(item, list | tuple | set | frozenset):
        return list(enumerate(item))
    if dataclasses.is_dataclass(item):
        return [(f.name, getattr(item, f.name, None)) for f in dataclasses.fields(item)]
    return list(vars(item).items()) if hasattr(item, "__dict__") else []


def map_tensors(container: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """The same nest with every tensor replaced; the containers given are not changed, but copied where it matters.

    A tensor that occurs several times is passed to the function each time.
    """
    if isinstance(container, Tensor):
        return function(container)
    if isinstance(container, _ATOMS):
        return container
    if isinstance(container, Mapping):
        return _map_mapping(container, function)
    if isinstance(container, tuple) and hasattr(container, "_fields"):
        return type(container)(*(map_tensors(child, function) for child in container))
    if type(container) in (list, tuple, set, frozenset):
        return type(container)(map_tensors(child, function) for child in container)
    if dataclasses.is_dataclass(container) and not isinstance(container, type):
        fields = {f.name: getattr(container, f.name) for f in dataclasses.fields(container) if f.init}
        return dataclasses.replace(container, **{name: map_tensors(child, function) for name, child in fields.items()})
    return _map_object(container, function) if named_tensors(container) else container


def _map_mapping(container: Mapping[Any, Any], function: Callable[[Tensor], Tensor]) -> Any:
    items = {key: map_tensors(child, function) for key, child in container.items()}
    if type(container) is dict:
        return items
    rebuilt: Any = copy.copy(container)
    for key, child in items.items():
        if child is not container[key]:
            rebuilt[key] = child
    return rebuilt


def _map_object(container: Any, function: Callable[[Tensor], Tensor]) -> Any:
    rebuilt = copy.copy(container)
    for name, child in vars(container).items():
        mapped = map_tensors(child, function)
        if mapped is not child:
            setattr(rebuilt, name, mapped)
    return rebuilt
