"""The model, its gradients and the random state come back bit for bit as they were."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

_TABLES = ("_parameters", "_buffers", "_modules")


class Safe:
    """What a forward pass may change about a model, and how to put it back.

    Buffers are copied at once: batch norm and quantisation observers write to them without saying so in their
    operator schema. Parameters are as large as the model, so they are copied only when an operation is about
    to write to their storage (`before_write`).
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = list(model.modules())
        self._attributes = [dict(vars(module)) for module in self._modules]
        self._tables = [{name: dict(vars(m)[name]) for name in _TABLES} for m in self._modules]
        self._grads = [(p, p.grad) for p in model.parameters()]
        self._flags = [(p, p.requires_grad) for p in model.parameters()]
        self._buffers = [(b, b.detach().clone()) for b in model.buffers() if not _lazy(b)]
        self._by_storage: dict[int, list[Tensor]] = {}
        self._written: dict[int, tuple[Tensor, Tensor]] = {}
        for parameter in model.parameters():
            if not _lazy(parameter) and parameter.layout == torch.strided:
                self._by_storage.setdefault(parameter.untyped_storage()._cdata, []).append(parameter)

    @property
    def changed_parameters(self) -> int:
        """How many parameters the forward pass wrote to."""
        return len(self._written)

    def freeze(self) -> None:
        """Let no parameter require grad, so that the graph holds only what depends on the input."""
        for parameter, _ in self._flags:
            if parameter.requires_grad:
                parameter.requires_grad_(False)

    def before_write(self, storage: int) -> None:
        """Copy the parameters on a storage (its ``_cdata``) that is about to be written."""
        for parameter in self._by_storage.pop(storage, ()):
            self._written[id(parameter)] = (parameter, parameter.detach().clone())

    def restore(self) -> None:
        """Put everything back; safe to call after an exception."""
        for module, attributes, tables in zip(self._modules, self._attributes, self._tables, strict=True):
            state = vars(module)
            if state.keys() != attributes.keys() or any(state[k] is not v for k, v in attributes.items()):
                state.clear()
                state.update(attributes)
            for name, entries in tables.items():
                table = state[name]
                if list(table) != list(entries) or any(table[k] is not v for k, v in entries.items()):
                    table.clear()
                    table.update(entries)
        with torch.no_grad():
            for tensor, saved in [*self._buffers, *self._written.values()]:
                if not _same_bits(tensor, saved):
                    tensor.copy_(saved)
        for parameter, flag in self._flags:
            if parameter.requires_grad != flag:
                parameter.requires_grad_(flag)
        for parameter, grad in self._grads:
            if parameter.grad is not grad:
                parameter.grad = grad


def _lazy(tensor: Tensor) -> bool:
    return isinstance(tensor, UninitializedParameter | UninitializedBuffer)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal without a write: a NaN equals itself here, or buffers that hold one would always count as changed."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return bool(((a == b) | ((a != a) & (b != b))).all()) if a.layout == torch.strided else torch.equal(a, b)


@contextlib.contextmanager
def unchanged_randomness() -> Iterator[None]:
    """Restore the random state of the CPU and of every CUDA device in use."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    with torch.random.fork_rng(devices=list(devices)):
        yield


@contextlib.contextmanager
def unchanged(model: nn.Module) -> Iterator[Safe]:
    """Run a block after which the model is as it was, also when the block raises."""
    safe = Safe(model)
    try:
        with unchanged_randomness():
            yield safe
    finally:
        safe.restore()


def unwrap(model: Any) -> Any:
    """The user's own module inside wrappers that only distribute or compile it."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):  # torch.compile
            model = model._orig_mod
        else:
            return model
