"""Which stages evaluate the same vector field: the same operations with the same weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from stabkit.identification.operations import MOVES
from stabkit.tracing.values import operation

Constant = tuple[str, int, tuple[int, ...], tuple[int, ...]]


@cache
def _saved_names(kind: type) -> tuple[str, ...]:
    return tuple(name for name in dir(kind) if name.startswith("_saved_") and "_sym_" not in name)


def constants(node: Node) -> tuple[Constant, ...]:
    """The saved tensors of a node that do not depend on the input, by name, address, shape and strides.

    Strides tell a weight from its transpose: the two fields K^T f(K y) and K f(K^T y) are not one.
    """
    found = []
    for name in _saved_names(type(node)):
        if name.startswith("_saved_result"):
            continue  # a by-product of the operation, made anew by every call
        saved: Any = getattr(node, name)
        if isinstance(saved, Tensor) and saved.grad_fn is None and saved.layout == torch.strided and saved.numel() > 1:
            found.append((name, saved.data_ptr(), tuple(saved.shape), saved.stride()))
    return tuple(found)


def key_of(nodes: Iterable[Node], names: Mapping[int, str]) -> tuple[tuple[str, tuple[Constant, ...]], ...]:
    """What two stages have in common when they are the same field: their operations, in order, and weights.

    Moves are left out, since a caller may reshape before one call and not before another; so are numbers, such as the
    time at which the field is evaluated, and, where parameters are used, other constants, such as dropout masks.

    Args:
        nodes: the operations of a stage.
        names: the parameters and buffers of the model by address.
    """
    used = [(operation(n), constants(n)) for n in nodes if operation(n) not in MOVES]
    own = [(name, tuple(c for c in found if c[1] in names)) for name, found in used]
    return tuple(own if any(found for _, found in own) else used)


def addresses(model: nn.Module) -> dict[int, str]:
    """The parameters and buffers of a model by address."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {t.data_ptr(): name for name, t in named if t.layout == torch.strided and t.numel()}


def parameters_of(nodes: Iterable[Node], names: Mapping[int, str]) -> tuple[str, ...]:
    """Names of the parameters and buffers that some operations use directly."""
    found = {names[address] for node in nodes for _, address, *_ in constants(node) if address in names}
    return tuple(sorted(found))
