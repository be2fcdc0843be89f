"""Which stages evaluate the same vector field: the same operations with the same weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from stabkit.hashing import raw
from stabkit.identification.form.operations import MOVES
from stabkit.tracing.graph.values import operation

Constant = tuple[str, int, tuple[int, ...], tuple[int, ...]]


@cache
def _saved_names(kind: type) -> tuple[str, ...]:
    return tuple(name for name in dir(kind) if name.startswith("_saved_") and "_sym_" not in name)


def constants(node: Node) -> tuple[Constant, ...]:
    """The saved tensors of a node that do not depend on the input, by name, address, shape and strides.

    Strides tell a weight from its transpose: the two fields K^T f(K y) and K f(K^T y) are not one.
    """
    return tuple((name, t.data_ptr(), tuple(t.shape), t.stride()) for name, t in _saved(node))


def _saved(node: Node) -> Iterator[tuple[str, Tensor]]:
    for name in _saved_names(type(node)):
        if name.startswith("_saved_result"):
            continue  # a by-product of the operation, made anew by every call
        saved: Any = getattr(node, name)
        if isinstance(saved, Tensor) and saved.grad_fn is None and saved.layout == torch.strided and saved.numel() > 1:
            yield name, saved


def key_of(nodes: Iterable[Node], names: Mapping[int, str]) -> tuple[tuple[str, tuple[Constant, ...]], ...]:
    """What two stages have in common when they are the same field: their operations, in order, and weights.

    Moves are left out, since a caller may reshape before one call and not before another; so are numbers, such as the
    time at which the field is evaluated, and, where parameters are used, other constants, such as dropout masks.

    Args:
        nodes: the operations of a stage.
        names: the parameters and buffers of the model by address.
    """
    weighty = [n for n in nodes if operation(n) not in MOVES]
    own = [(_kind(n), tuple(c for c in constants(n) if c[1] in names)) for n in weighty]
    if any(found for _, found in own):
        return tuple(own)
    return tuple((_kind(n), _by_value(n)) for n in weighty)


def _kind(node: Node) -> str:
    """The name of an operation; of a convolution with what tells K from its adjoint, and one grid from another."""
    known: Any = node
    told = [getattr(known, f"_saved_{name}", None) for name in ("transposed", "stride", "dilation")]
    return operation(node) if told[0] is None else f"{operation(node)} {told}"


def _by_value(node: Node) -> tuple[Constant, ...]:
    """The constants of a node with their contents for an address: every call may make them anew (spectral norm)."""
    found = []
    for name, tensor in _saved(node):
        found.append((name, hash(raw(tensor).tobytes()), tuple(tensor.shape), tensor.stride()))
    return tuple(found)


def addresses(model: nn.Module) -> dict[int, str]:
    """The parameters and buffers of a model by address."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {t.data_ptr(): name for name, t in named if t.layout == torch.strided and t.numel()}


def parameters_of(nodes: Iterable[Node], names: Mapping[int, str]) -> tuple[str, ...]:
    """Names of the parameters and buffers that some operations use directly."""
    found = {names[address] for node in nodes for _, address, *_ in constants(node) if address in names}
    return tuple(sorted(found))
