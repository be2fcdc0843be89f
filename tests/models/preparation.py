"""What is done to a model and its inputs before they are traced."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

SEED = 0

Built = tuple[Any, tuple[Any, ...], dict[str, Any]]


def tensors_in(container: Any, path: str = "", depth: int = 6) -> Iterator[tuple[str, Tensor]]:
    """Tensors in a nest of mappings, sequences and plain objects, with dotted paths."""
    if isinstance(container, Tensor):
        yield path, container
        return
    if depth == 0 or isinstance(container, str | bytes | nn.Module | type):
        return
    if isinstance(container, Mapping):
        children: Iterable[tuple[Any, Any]] = container.items()
    elif isinstance(container, list | tuple):
        children = enumerate(container)
    else:
        children = getattr(container, "__dict__", {}).items()
    for key, child in children:
        yield from tensors_in(child, f"{path}.{key}" if path else str(key), depth - 1)


def named_inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[str, Tensor]]:
    """Input tensors by the names that a flow gives to its source."""
    return [*tensors_in(args), *tensors_in(kwargs)]


def cast(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], dtype: torch.dtype) -> Built:
    """Model and float inputs in another dtype; complex parameters stay complex."""

    def convert(tensor: Tensor) -> Tensor:
        if tensor.is_complex():
            return tensor.to(dtype.to_complex())
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    if isinstance(model, nn.Module):
        model = model._apply(convert)
    memo = {id(tensor): convert(tensor) for _, tensor in named_inputs(args, kwargs)}
    return model, *copy.deepcopy((args, kwargs), memo)


def modules(model: Any) -> list[tuple[str, nn.Module]]:
    """Named modules of a model; none of a plain function."""
    return list(model.named_modules(remove_duplicate=False)) if isinstance(model, nn.Module) else []


def parameters(model: Any) -> list[nn.Parameter]:
    """Initialised parameters of a model; none of a plain function."""
    found = model.parameters() if isinstance(model, nn.Module) else []
    return [p for p in found if not isinstance(p, nn.parameter.UninitializedParameter)]


def fill_zero_weights(model: Any) -> None:
    """Give parameters that are initialised at zero small random values: a zero head lets any chain pass."""
    with torch.no_grad():
        for parameter in parameters(model):
            if parameter.is_floating_point() and not bool((parameter != 0).any()):
                parameter.copy_(0.1 * torch.randn(parameter.shape, dtype=torch.float64))


def mark_gradients(model: Any) -> None:
    """Leave a gradient on some parameters, so that losing or adding to it shows."""
    for parameter in parameters(model)[:3]:
        if parameter.requires_grad and (parameter.is_floating_point() or parameter.is_complex()):
            parameter.grad = torch.ones_like(parameter)


@contextlib.contextmanager
def kept_random_state() -> Iterator[None]:
    """The random state of the caller survives."""
    with torch.random.fork_rng(devices=[]):
        yield
