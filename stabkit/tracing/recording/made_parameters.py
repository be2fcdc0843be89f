"""Parameters that are made while a model runs: each is new, whatever it is made of, and has no history."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def parameters_made(seen: Callable[[Tensor | None, nn.Parameter], None]) -> Iterator[None]:
    """Tell of every `torch.nn.Parameter` that is made in this context.

    Args:
        seen: called with what it is made of, on the graph where that is, and the parameter.

    Example:
        >>> made = []
        >>> with parameters_made(lambda data, parameter: made.append(tuple(parameter.shape))):
        ...     _ = nn.Linear(3, 2)
        >>> made
        [(2, 3), (2,)]
    """
    kept, original = nn.Parameter.__dict__["__new__"], nn.Parameter.__new__
    thread = threading.get_ident()  # what other threads make meanwhile is none of this model's

    def new(cls: type, data: Any = None, requires_grad: bool = True, *more: Any, **others: Any) -> Any:
        made: Any = original(cls, data, requires_grad, *more, **others)
        if isinstance(made, nn.Parameter) and threading.get_ident() == thread:
            seen(data if isinstance(data, Tensor) else None, made)
        return made

    nn.Parameter.__new__ = staticmethod(new)  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Parameter.__new__ = kept  # type: ignore[method-assign]


def on_graph(data: Tensor | None) -> bool:
    """Whether a parameter is made of something that a gradient could go back through, and now cannot."""
    return data is not None and data.requires_grad and data.grad_fn is not None and torch.is_grad_enabled()
