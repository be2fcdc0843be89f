"""What stands behind a function or a wrapper: the modules that it calls, the model that was compiled or spread."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from typing import Any

from torch import nn


def modules_behind(function: Any) -> nn.Module:
    """A module that holds those a function uses: in its closure, its globals, its defaults or its object.

    A module is returned as it is. What holds the others is new and changes nothing about them.
    """
    if isinstance(function, nn.Module):
        return function
    holder = nn.Module()
    for name, found in _held(function, 3):
        if isinstance(found, nn.Module) and all(found is not other for other in holder.children()):
            label = name.replace(".", "_")
            holder.add_module(label if label not in holder._modules else f"{label}_{len(holder._modules)}", found)
    return holder


def _held(function: Any, depth: int) -> Iterator[tuple[str, Any]]:
    """Names and values that a callable can reach without being called."""
    if isinstance(function, nn.Module) or depth == 0:
        return
    names: dict[str, Any] = {}
    if isinstance(function, functools.partial):
        names.update({"func": function.func, **{f"arg{i}": a for i, a in enumerate(function.args)}})
        names.update(function.keywords)
    elif inspect.ismethod(function):
        names.update({function.__name__: function.__func__, "self": function.__self__})
    elif inspect.isfunction(function):
        used = inspect.getclosurevars(function)
        names.update({**used.globals, **used.nonlocals})
    elif hasattr(function, "__dict__") and not inspect.isclass(function) and not inspect.ismodule(function):
        names.update(vars(function))
    for name, value in names.items():
        yield name, value
        if callable(value) or name == "self":
            yield from _held(value, depth - 1)


def unwrap(model: Any) -> Any:
    """The user's own module inside wrappers that only distribute or compile it."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):  # torch.compile
            model = model._orig_mod
        else:
            return model
