"""One backward node applied by hand, with what the engine does around it."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.graph import Node

from stabkit.tracing.graph.values import Value, meta_of, operation
from stabkit.tracing.recording.untouched_model import WAY_BACK
from stabkit.vocabulary import COSTLY
from stabkit.vocabulary import is_python_node as is_python_node

Cotangents = list[Tensor | None]
_FEW = 4


def alike(node: Node) -> tuple[object, ...]:
    """What two nodes have in common whose backward runs the same code: the operation, its shapes and its settings."""
    if is_python_node(node):
        return (id(node),)  # what its backward does is for its author to know
    settings = tuple(str(getattr(node, name)) for name in _settings(type(node)))
    shapes = tuple((tuple(entry.shape), entry.dtype) for entry in node._input_metadata)
    return type(node), shapes, settings


@lru_cache(maxsize=4096)
def _settings(kind: type[Node]) -> tuple[str, ...]:
    """Names of what a class of nodes saves beside tensors, which have a raw form as well."""
    names = dir(kind)
    return tuple(name for name in names if name.startswith("_saved_") and f"_raw{name}" not in names)


def apply_node(
    node: Node, cotangents: Cotangents, active: Sequence[Value], *, rewrite: bool = False
) -> list[tuple[Value, Tensor]]:
    """Pull the cotangents of a node's outputs back to those of its inputs that are ``active``.

    The engine itself also sums broadcast dimensions and casts to the dtype of the input; so does this. It never
    runs hooks, and a cotangent goes to the node's own inputs only: the derivative is partial, not total.

    Args:
        node: the node.
        cotangents: one for every output, None where nothing arrives.
        active: the inputs that are wanted.
        rewrite: let convolutions and batch norms be computed in a way that is cheaper under ``torch.vmap`` and for a
            second derivative, and rounds differently from the engine's.
    """
    name = type(node).__name__
    if "BatchNorm" in name:
        cotangents = match_layout(node, cotangents)
    if is_python_node(node):
        edges, grads = _apply_python(node, cotangents)
    else:
        override = (_REWRITES if rewrite else _OVERRIDES).get(name)
        if override is not None:
            raw = override(node, cotangents, active)
        elif operation(node) == _SELF_ADJOINT and torch.is_grad_enabled():
            raw = _SelfAdjoint.apply(cotangents[0], node)
        else:
            raw = call_node(node, cotangents)
        grads = raw if isinstance(raw, tuple) else (raw,)
        edges = list(node.next_functions)
    # an edge equals the value that it leads to; most nodes have one or two, a concatenation may have a thousand
    wanted = active if len(active) <= _FEW else set(active)
    pulled = []
    for edge, grad in zip(edges, grads, strict=False):
        if grad is not None and edge in wanted:
            value = Value(*edge)
            pulled.append((value, _as_recorded(value, grad)))
    return pulled


def call_node(node: Any, cotangents: Cotangents) -> Any:
    """What a node of torch's own returns for the cotangents of its outputs, one gradient for every edge."""
    if "NotImplemented" in node.name():  # the notes of the step say what torch would warn of
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*autograd kernel was not registered")
            return node(*cotangents)
    return node(*cotangents)


# an elementwise operation whose backward has no derivative in torch; it is linear and diagonal, hence self-adjoint
_SELF_ADJOINT = "Hardsigmoid"


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


def _nowhere() -> None:
    """The node was made outside of a recorded pass."""


def _apply_python(node: Any, cotangents: Cotangents) -> tuple[list[Any], Sequence[Tensor | None]]:
    """A custom Function wants zeros for missing cotangents, and may return one gradient per argument or per input."""
    filled = [
        torch.zeros(entry.shape, dtype=entry.dtype, device=entry.device)
        if cotangent is None and entry is not None
        else cotangent
        for entry, cotangent in zip(node._input_metadata, cotangents, strict=True)
    ]
    way_back = node.metadata.get(WAY_BACK, _nowhere)()
    with contextlib.nullcontext() if way_back is None else way_back:
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
        return call_node(node, cotangents)
    out = torch.ops.aten.convolution(
        cotangents[0],
        node._saved_weight,
        None,
        signed(node._saved_stride),
        signed(node._saved_padding),
        signed(node._saved_dilation),
        node._saved_transposed,
        signed(node._saved_output_padding),
        node._saved_groups,
    )
    return (out, *[None] * (len(node.next_functions) - 1))


def _convolution_backward(node: Any, cotangents: Cotangents, active: Sequence[Value]) -> Any:
    """The transposed convolution, whose batching rule copies nothing."""
    cotangent = cotangents[0]
    only_first = set(active) == {Value(*node.next_functions[0])}
    if cotangent is None or not only_first or cotangent.dtype == torch.float64:  # slower there: not in oneDNN
        return call_node(node, cotangents)
    return (transposed_convolution(node, cotangent), *[None] * (len(node.next_functions) - 1))


def transposed_convolution(node: Any, cotangent: Tensor) -> Tensor:
    """A convolution's cotangent pulled back; the batch may be any."""
    stride, padding, dilation = (
        signed(sizes) for sizes in (node._saved_stride, node._saved_padding, node._saved_dilation)
    )
    weight, transposed, groups = node._saved_weight, node._saved_transposed, node._saved_groups
    shape = meta_of(Value(*node.next_functions[0])).shape
    if cotangent.dtype == torch.float64:
        unread = cotangent.new_zeros(1).expand(cotangent.shape[0], *shape[1:])  # the weight's gradient would read it
        padded = signed(node._saved_output_padding)
        grads = torch.ops.aten.convolution_backward(
            cotangent, unread, weight, None, stride, padding, dilation, transposed, padded, groups, [True, False, False]
        )
        return cast(Tensor, grads[0])
    geometry = zip(shape[2:], cotangent.shape[2:], stride, padding, dilation, weight.shape[2:], strict=True)
    left = [size - ((out - 1) * s - 2 * p + d * (k - 1) + 1) for size, out, s, p, d, k in geometry]
    padded = [0] * len(left) if transposed else left
    grad = torch.ops.aten.convolution(
        cotangent, weight, None, stride, padding, dilation, not transposed, padded, groups
    )
    return cast(Tensor, grad)


def _batch_norm_backward(node: Any, cotangents: Cotangents, active: Sequence[Value]) -> Any:
    """With running statistics a factor for every channel; ``native_batch_norm_backward`` copies its cotangents."""
    cotangent = cotangents[0]
    only_first = set(active) == {Value(*node.next_functions[0])}
    if cotangent is None or not only_first or node._saved_training:
        return call_node(node, cotangents)
    factor = batch_norm_factor(node).view(-1, *[1] * (cotangent.dim() - 2))
    return ((cotangent * factor).to(cotangent.dtype), *[None] * (len(node.next_functions) - 1))


def batch_norm_factor(node: Any) -> Tensor:
    """What a batch norm with running statistics multiplies every channel with."""
    factor = torch.rsqrt(node._saved_running_var + node._saved_eps)
    if node._saved_weight is not None:
        factor = factor * node._saved_weight
    return factor.detach()


def _elementwise_backward(node: Any, cotangents: Cotangents, active: Sequence[Value]) -> Any:
    """The derivative, computed once, times the cotangents; the kernel would compute it anew for each of them."""
    if cotangents[0] is None:
        return call_node(node, cotangents)
    return cotangents[0] * elementwise_derivative(node)


def elementwise_derivative(node: Any) -> Tensor:
    """The factor with which an elementwise operation multiplies its cotangent."""
    meta = meta_of(Value(node, 0))
    with torch.no_grad():
        derivative: Tensor = node(torch.ones(meta.shape, dtype=meta.dtype, device=meta.device))
    return derivative


def signed(sizes: Sequence[int]) -> list[int]:
    """Saved sizes come back as unsigned 64-bit numbers."""
    return [size - (1 << 64) if size >= (1 << 63) else size for size in sizes]


_OVERRIDES: dict[str, Callable[[Any, Cotangents, Sequence[Value]], Any]] = {
    "ConvolutionBackwardBackward0": _convolution_double_backward,
}
_REWRITES = {
    **_OVERRIDES,
    **{f"{name}Backward0": _elementwise_backward for name in COSTLY},
    "ConvolutionBackward0": _convolution_backward,
    "NativeBatchNormBackward0": _batch_norm_backward,
}
