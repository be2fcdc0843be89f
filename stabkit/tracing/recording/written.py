"""What operations write to, seen before they do."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.overrides import TorchFunctionMode

from stabkit.tracing.recording.transparency import EagerMode, replaced

#: how the memory of a tensor leaves torch, which does not see what is written to it there
HANDED_OUT: frozenset[Any] = frozenset(
    {
        torch.Tensor.numpy,
        torch.Tensor.__array__,
        torch.Tensor.__dlpack__,
        torch.Tensor.data_ptr,
        torch.Tensor.untyped_storage,
        torch.Tensor.storage,
        torch.Tensor.resize_as_,
    }
)


@lru_cache(maxsize=4096)
def facts(func: Any) -> tuple[str, bool]:
    """The name of an operation without its namespace and overload, and whether it writes to what it is given."""
    return func._schema.name.split("::")[-1], func._schema.is_mutable


@lru_cache(maxsize=4096)
def _takes_a_tensor(func: Any) -> bool:
    """Whether an operation takes a tensor first."""
    return isinstance(func, OpOverload) and isinstance(func._schema.arguments[0].type, torch.TensorType)


def _as_tensor(number: complex) -> Tensor:
    """A number that was saved for a derivative: a mode is given it as a plain one, which few operations take."""
    wide = torch.complex128 if isinstance(number, complex) else torch.float64 if isinstance(number, float) else None
    return torch.tensor(number, dtype=wide)


def written(schema: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """The tensors that an operation writes to."""
    for position, argument in enumerate(schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        given = args[position] if position < len(args) else kwargs.get(argument.name)
        for item in given if isinstance(given, list | tuple) else (given,):
            if isinstance(item, Tensor):
                yield item


class Writes(EagerMode):
    """Tells of every tensor that is about to be written."""

    supports_higher_order_operators = True

    def __init__(self, told: Callable[[Tensor], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._told = told

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, OpOverload) and facts(func)[1]:
            for tensor in written(func._schema, args, kwargs):
                self._told(tensor)
        if args and isinstance(args[0], bool | int | float | complex) and _takes_a_tensor(func):
            args = (_as_tensor(args[0]), *args[1:])
        return func(*args, **kwargs)


_GRADIENT: Any = torch.Tensor.grad
#: how gradients are put into ``.grad``
ACCUMULATES: frozenset[Any] = frozenset({_GRADIENT.__set__, _GRADIENT.__delete__, torch.Tensor.backward})


class HandedOut(TorchFunctionMode):
    """Tells of every tensor whose memory is handed out of torch, and that gradients are put into ``.grad``."""

    def __init__(self, told: Callable[[Tensor], None], accumulates: Callable[[], None]) -> None:
        super().__init__()
        self._told = told
        self._accumulates = accumulates

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in HANDED_OUT:
            self._told(args[0])
        elif func in ACCUMULATES:
            self._accumulates()
        return func(*args, **(kwargs or {}))


def version_of(tensor: Tensor) -> int | None:
    """How often something was written to it; None where nobody counts."""
    try:
        return tensor._version
    except RuntimeError:  # it was made under inference_mode, or has the memory of one that was
        return None


_PARTS: dict[torch.layout, tuple[str, ...]] = {
    torch.sparse_coo: ("_indices", "_values"),
    **dict.fromkeys((torch.sparse_csr, torch.sparse_bsr), ("crow_indices", "col_indices", "values")),
    **dict.fromkeys((torch.sparse_csc, torch.sparse_bsc), ("ccol_indices", "row_indices", "values")),
}


def parts_of(tensor: Tensor) -> list[Tensor]:
    """The dense tensors that hold the numbers of one: torch compares no sparse tensors."""
    if tensor.layout == torch.strided:
        return [tensor]
    names = _PARTS.get(tensor.layout)
    return [tensor.to_dense()] if names is None else [getattr(tensor.detach(), name)() for name in names]


@contextlib.contextmanager
def backward_told(accumulates: Callable[[], None]) -> Iterator[None]:
    """Tell of calls of ``torch.autograd.backward``, which no mode sees, nor anything that runs on the way back."""
    original = torch.autograd.backward

    def backward(*args: Any, **kwargs: Any) -> None:
        accumulates()
        original(*args, **kwargs)

    with replaced(torch.autograd, "backward", backward):
        yield


@contextlib.contextmanager
def watched(told: Callable[[Tensor], None], accumulates: Callable[[], None]) -> Iterator[None]:
    """Tell of every tensor that is about to be written or is handed out, and that gradients are put into ``.grad``."""
    with backward_told(accumulates), HandedOut(told, accumulates), Writes(told):
        yield
