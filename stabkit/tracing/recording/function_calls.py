"""The functions of torch that are called while a mode is on: what looks on, or gives them other arguments."""

from __future__ import annotations

from typing import Any

from torch.overrides import TorchFunctionMode


class FunctionCalls(TorchFunctionMode):
    """Sees every function of torch that is called, within its own context; one that changes nothing."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return self._called(func, args, kwargs or {})

    def _called(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return func(*args, **kwargs)


def name_of(func: Any) -> str:
    """The name of a function of torch, without underscores.

    Example:
        >>> import torch
        >>> name_of(torch.Tensor.add_), name_of(torch.Tensor.__matmul__)
        ('add', 'matmul')
    """
    return str(getattr(func, "__name__", "")).strip("_")
