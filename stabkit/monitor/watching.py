"""Hooks around the call of a module, also of one that was compiled in place."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from stabkit.errors import ArgumentError

Before = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]
After = Callable[[nn.Module, Any, Any], None]


class NotScriptableError(ArgumentError, AttributeError):
    """A hook cannot be compiled by ``torch.jit.script``."""


class Hook:
    """A function around the call of a module, that does nothing in copies of the module.

    A model may be copied or pickled at any time of its training, by ``copy.deepcopy`` as averages of weights are made,
    or by ``torch.save``. A copy is not watched, what the function holds on to (open files) is none of its business, and
    a saved model must open where stabkit is not installed.
    """

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., None]) -> None:
        self._function = function

    @property
    def __name__(self) -> str:
        """What ``torch.jit.script`` asks for of every hook that it is about to compile, and nothing else does.

        Raises:
            NotScriptableError: it cannot be compiled.
        """
        raise NotScriptableError(
            "torch.jit.script compiles the hooks of a model too, and a monitor has some on this one; take them off "
            "meanwhile: monitor.detach(), torch.jit.script(model), monitor.attach()"
        )

    def __call__(self, *args: Any) -> None:
        """Call the function, except while the model is compiled or traced (``SummaryWriter.add_graph`` does that)."""
        # first of all: the compiler then drops the rest, and guards on nothing
        if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
            return
        self._function(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (contextlib.nullcontext(), "__exit__")  # takes anything and returns None


def watch(module: nn.Module, after: After | None, before: Before | None = None) -> Callable[[], None]:
    """Call ``before`` and ``after``, or one of them, around every eager call of a module; returns what undoes that.

    A module that was compiled in place (``module.compile()``) compiles its hooks as well and would never run ours, so
    its compiled call is wrapped instead. One that was scripted takes no hooks, and is not watched.
    """
    if isinstance(module, torch.jit.ScriptModule):
        return lambda: None
    later, earlier = (None if one is None else Hook(one) for one in (after, before))
    if getattr(module, "_compiled_call_impl", None) is not None:
        return _wrap_compiled(module, later, earlier)
    handles = [] if later is None else [module.register_forward_hook(later)]
    if earlier is not None:
        handles.append(module.register_forward_pre_hook(earlier, with_kwargs=True))
    if len(handles) == 1:
        return handles[0].remove

    def undo() -> None:
        for handle in handles:
            handle.remove()

    return undo


def _wrap_compiled(module: nn.Module, after: After | None, before: Before | None) -> Callable[[], None]:
    compiled: Callable[..., Any] = module._compiled_call_impl  # type: ignore[assignment]

    def call(*args: Any, **kwargs: Any) -> Any:
        if before is not None:
            before(module, args, kwargs)
        output = compiled(*args, **kwargs)
        if after is not None:
            after(module, args, output)
        return output

    def undo() -> None:
        if module._compiled_call_impl is call:
            module._compiled_call_impl = compiled

    module._compiled_call_impl = call
    return undo
