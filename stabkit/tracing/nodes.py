"""One backward node applied by hand, with what the engine does around it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from stabkit.tracing.values import Value, meta_of, operation

Cotangents = list[Tensor | None]


def is_python_node(node: Node) -> bool:
    """Whether the node belongs to a custom ``torch.autograd.Function``."""
    return isinstance(node, torch.autograd.function.BackwardCFunction)


def apply_node(node: Node, cotangents: Cotangents, active: Sequence[Value]) -> list[tuple[Value, Tensor]]:
    """Pull the cotangents of a node's outputs back to those of its inputs that are ``active``.

    The engine itself also sums broadcast dimensions and casts to the dtype of the input; so does this. It never
    runs hooks, and a cotangent goes to the node's own inputs only: the derivative is partial, not total.
    """
    if "BatchNorm" in type(node).__name__:
        cotangents = match_layout(node, cotangents)
    if is_python_node(node):
        edges, grads = _apply_python(node, cotangents)
    else:
        override = _OVERRIDES.get(type(node).__name__)
        if override is not None:
            raw = override(node, cotangents, active)
        elif operation(node) in _SELF_ADJOINT and torch.is_grad_enabled():
            raw = _SelfAdjoint.apply(cotangents[0], node)
        else:
            raw = _call(node, cotangents)
        grads = raw if isinstance(raw, tuple) else (raw,)
        edges = list(node.next_functions)
    wanted = set(active)
    pulled = []
    for (parent, output), grad in zip(edges, grads, strict=False):
        if parent is None or grad is None:
            continue
        value = Value(parent, output)
        if value in wanted:
            pulled.append((value, _as_recorded(value, grad)))
    return pulled


def _call(node: Any, cotangents: Cotangents) -> Any:
    if "NotImplemented" in node.name():  # the notes of the step say what torch would warn of
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*autograd kernel was not registered")
            return node(*cotangents)
    return node(*cotangents)


# elementwise operations whose backward has no derivative in torch; it is linear and diagonal, hence self-adjoint
_SELF_ADJOINT = frozenset({"Hardsigmoid", "Hardswish"})


class _SelfAdjoint(torch.autograd.Function):
    """The backward of an elementwise operation, differentiable with respect to its cotangent."""

    @staticmethod
    def forward(ctx: Any, cotangent: Tensor, node: Any) -> Tensor:
        ctx.node = node
        grad: Tensor = node(cotangent)
        return grad

    @staticmethod
    def backward(ctx: Any, tangent: Tensor) -> tuple[Tensor, None]:
        return ctx.node(tangent), None


def _apply_python(node: Any, cotangents: Cotangents) -> tuple[list[Any], Sequence[Tensor | None]]:
    """A custom Function wants zeros for missing cotangents, and may return one gradient per argument or per input."""
    filled = [
        torch.zeros(entry.shape, dtype=entry.dtype, device=entry.device)
        if cotangent is None and entry is not None
        else cotangent
        for entry, cotangent in zip(node._input_metadata, cotangents, strict=True)
    ]
    grads = node.apply(*filled)
    grads = grads if isinstance(grads, tuple) else (grads,)
    edges = list(node.next_functions)
    if len(grads) != len(edges):
        needed = [grad for grad, need in zip(grads, node.needs_input_grad, strict=False) if need]
        edges_used = [edge for edge in edges if edge[0] is not None]
        if len(needed) == len(edges_used):
            return edges_used, needed
    return edges, grads


def _as_recorded(value: Value, grad: Tensor) -> Tensor:
    meta = meta_of(value)
    if tuple(grad.shape) != meta.shape:
        grad = grad.sum_to_size(meta.shape)
    if grad.dtype != meta.dtype:
        if grad.is_complex() and not meta.dtype.is_complex:
            grad = grad.real
        grad = grad.to(meta.dtype)
    return grad


def match_layout(node: Any, cotangents: Sequence[Tensor | None]) -> Cotangents:
    """Give a batch-norm cotangent the memory layout of the input that was saved.

    torch 2.13 and 2.14 on CPU: ``native_batch_norm_backward`` is silently wrong at batch size 1 when the cotangent
    and the saved input have different (degenerate channels-last) strides, as ``flatten(2).transpose(1, 2)`` after
    the norm makes them.
    """
    saved = getattr(node, "_saved_input", None)
    if saved is None:
        return list(cotangents)
    order = sorted(range(saved.dim()), key=lambda i: (-saved.stride(i), i))
    inverse = [order.index(i) for i in range(saved.dim())]
    return [
        g.permute(order).contiguous().permute(inverse)
        if g is not None and g.dim() == saved.dim() and g.stride() != saved.stride()
        else g
        for g in cotangents
    ]


def _convolution_double_backward(node: Any, cotangents: Cotangents, active: Sequence[Value]) -> Any:
    """One convolution instead of ``_convolution_double_backward``, which always computes the weight term as well."""
    first = node.next_functions[0]
    only_first = len(set(active)) == 1 and active[0] == Value(*first)
    if not only_first or cotangents[0] is None or any(g is not None for g in cotangents[1:]):
        return _call(node, cotangents)
    out = torch.ops.aten.convolution(
        cotangents[0],
        node._saved_weight,
        None,
        _signed(node._saved_stride),
        _signed(node._saved_padding),
        _signed(node._saved_dilation),
        node._saved_transposed,
        _signed(node._saved_output_padding),
        node._saved_groups,
    )
    return (out, *[None] * (len(node.next_functions) - 1))


def _signed(sizes: Sequence[int]) -> list[int]:
    """Saved sizes come back as unsigned 64-bit numbers."""
    return [size - (1 << 64) if size >= (1 << 63) else size for size in sizes]


_OVERRIDES: dict[str, Callable[[Any, Cotangents, Sequence[Value]], Any]] = {
    "ConvolutionBackwardBackward0": _convolution_double_backward,
}
