"""One backward node applied to many cotangents at once, stacked along a new first dimension.

``torch.vmap`` does the same for any operation, at some 50 microseconds a node: as much as the operation itself takes
for the sizes of many models. So the common operations take their cotangents stacked as they are, by rules of their own,
and ``torch.vmap`` is left for the others.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from stabkit.tracing.graph.values import Meta, Value, meta_of, operation, outputs_of
from stabkit.tracing.products.node_derivatives import (
    Cotangents,
    apply_node,
    batch_norm_factor,
    call_node,
    elementwise_derivative,
    signed,
    transposed_convolution,
)
from stabkit.vocabulary import ACTIVATIONS, COSTLY, is_python_node, moves

_REMEMBERED = 2**20  # the largest derivative that is kept from walk to walk, in numbers
#: Of a node, the stacked cotangents of its outputs, its active inputs, and whether the first cotangent may be
#: overwritten: the gradient of every edge.
Rule = Callable[[Any, Cotangents, Sequence[Value], bool], Sequence[Tensor | None]]


class Stacked:
    """A node that takes many cotangents at once.

    Args:
        node: the node.
        active: the inputs that are wanted.
        remembers: whether to keep a derivative that was asked for before, until `forget`.

    Attributes:
        outputs: its values.
        in_place: whether its result may take the place of its only cotangent.
        part_of: the value of which its output is a part, whose other entries get nothing from it.
    """

    def __init__(self, node: Node, active: Sequence[Value], *, remembers: bool = False) -> None:
        self.node = node
        self.active = active
        self.outputs = tuple(outputs_of(node))
        rule = _rule(node, active)
        self.in_place = rule in (_by_derivative, _batch_norm, _relu)
        known = set(active)
        edges = enumerate(_edges(node))
        self._wanted = [(i, edge, meta_of(edge)) for i, edge in edges if edge is not None and edge in known]
        self._rule = rule
        self.part_of = active[0] if rule in _PARTS else None
        self._factor_of = _FACTORS.get(rule) if remembers else None
        self._asked = False
        self._factor: Tensor | None = None

    @property
    def by_rule(self) -> bool:
        """Whether it has a rule of its own, and does without ``torch.vmap``."""
        return self._rule is not None

    def pull(self, cotangents: Cotangents, *, overwrite: bool = False) -> list[tuple[Value, Tensor]]:
        """Stacked cotangents ``(k, *shape)`` of the outputs, None where nothing arrives, pulled back to the inputs.

        Args:
            cotangents: one for every output.
            overwrite: whether nobody else needs them, so that an `in_place` node may reuse their memory.
        """
        if self._rule is None:
            return _batched(self.node, cotangents, self.active)
        if self._factor_of is not None:
            grads: Sequence[Tensor | None] = (_times(_first(cotangents), self._remembered(self._factor_of), overwrite),)
        else:
            grads = self._rule(self.node, cotangents, self.active, overwrite and self.in_place)
        pulled = []
        for i, value, meta in self._wanted:
            grad = grads[i] if i < len(grads) else None
            if grad is None:
                continue
            if grad.dtype != meta.dtype or grad.shape[1:] != meta.shape:
                grad = _as_recorded(meta, grad)
            pulled.append((value, grad))
        return pulled

    def add_to(self, whole: Tensor, cotangent: Tensor) -> None:
        """Add a stacked cotangent of the output to that of the value `part_of` which it is a part."""
        _PARTS[self._rule](self.node, [whole], self.active, False)[0].add_(cotangent)  # type: ignore[union-attr]

    def forget(self) -> None:
        """Let go of what was remembered."""
        self._asked, self._factor = False, None

    def _remembered(self, factor_of: Callable[[Any], Tensor]) -> Tensor:
        """What cotangents are multiplied with; it is kept from the second time on: most nodes are walked once."""
        if self._factor is not None:
            return self._factor
        factor = factor_of(self.node)
        if self._asked and factor.numel() <= _REMEMBERED:
            self._factor = factor
        self._asked = True
        return factor


def _edges(node: Node) -> list[Value | None]:
    return [None if parent is None else Value(parent, output) for parent, output in node.next_functions]


def _batched(node: Node, cotangents: Cotangents, active: Sequence[Value]) -> list[tuple[Value, Tensor]]:
    """By ``torch.vmap``."""
    there = [i for i, cotangent in enumerate(cotangents) if cotangent is not None]
    reached: list[Value] = []

    def one(*slices: Tensor) -> tuple[Tensor, ...]:
        given: Cotangents = [None] * len(cotangents)
        for i, part in zip(there, slices, strict=True):
            given[i] = part
        pulled = apply_node(node, given, active, rewrite=True)
        reached[:] = [value for value, _ in pulled]
        return tuple(grad for _, grad in pulled)

    with warnings.catch_warnings():
        # operations without a batching rule of their own are looped over, which torch warns of
        warnings.filterwarnings("ignore", message="There is a performance drop")
        grads = torch.vmap(one)(*[cotangent for cotangent in cotangents if cotangent is not None])
    return list(zip(reached, grads, strict=True))


def _as_recorded(meta: Meta, grad: Tensor) -> Tensor:
    """As the engine does after a node: broadcast dimensions summed, in the dtype of the value."""
    if grad.shape[1:] != meta.shape:
        whole = (grad.shape[0], *meta.shape)
        more = grad.dim() - len(whole)
        grad = (grad.sum(tuple(range(1, 1 + more))) if more else grad).sum_to_size(whole)
    if grad.dtype != meta.dtype:
        if grad.is_complex() and not meta.dtype.is_complex:
            grad = grad.real
        grad = grad.to(meta.dtype)
    return grad


# ---------------------------------------------------------------- which rule


def _rule(node: Node, active: Sequence[Value]) -> Rule | None:
    if is_python_node(node) or not active:
        return None
    name, kind = type(node).__name__, operation(node)
    only_first = set(active) == {_edges(node)[0]}
    if name == "ConvolutionBackward0":
        saved: Any = node
        return _convolution if only_first and len(meta_of(active[0]).shape) == saved._saved_weight.dim() else None
    if name in _LINEAR and list(active) == [node.next_functions[_LINEAR[name]]]:
        weight: Tensor | None = node._saved_mat2  # type: ignore[attr-defined]
        plain = weight is not None and weight.layout == torch.strided and weight.dtype == meta_of(active[0]).dtype
        return _linear if plain else None
    if name == "NativeBatchNormBackward0":
        return _batch_norm if only_first and not node._saved_training else None  # type: ignore[attr-defined]
    if kind in _OF_FIRST:
        return _OF_FIRST[kind] if only_first else None
    if kind in _RESHAPED:
        return _reshaped
    if kind == "Cat" and sum(edge[0] is None for edge in node.next_functions) > 1:
        return None  # how wide each of the constant parts is, is not known
    if name in _BY_NAME:
        return _BY_NAME[name]
    if name == "ReluBackward0":
        return _relu
    if name == "AddBackward0" and getattr(node, "_saved_alpha", None) == 1:
        return _added
    if kind in COSTLY or (kind.endswith("Backward") and kind.removesuffix("Backward") in ACTIVATIONS):
        return _by_derivative if only_first else None
    return _elementwise if kind in _ELEMENTWISE else None


# ---------------------------------------------------------------- the rules


def _elementwise(
    node: Any, cotangents: Cotangents, active: Sequence[Value], overwrite: bool
) -> Sequence[Tensor | None]:
    """What the node saved meets the last dimensions of the cotangent, so the first may be there or not."""
    raw = node(*cotangents)
    return raw if isinstance(raw, tuple) else (raw,)


def _added(node: Any, cotangents: Cotangents, active: Sequence[Value], overwrite: bool) -> Sequence[Tensor | None]:
    return (cotangents[0], cotangents[0])


def _by_derivative(
    node: Any, cotangents: Cotangents, active: Sequence[Value], overwrite: bool
) -> Sequence[Tensor | None]:
    """The derivative is computed once, not for every cotangent."""
    return (_times(_first(cotangents), _derivative(node), overwrite),)


def _derivative(node: Node) -> Tensor:
    found: Any = elementwise_derivative(node)
    factor: Tensor = found[0] if isinstance(found, tuple) else found
    return factor


def _times(cotangent: Tensor, factor: Tensor, overwrite: bool) -> Tensor:
    if overwrite and torch.promote_types(cotangent.dtype, factor.dtype) == cotangent.dtype:
        return cotangent.mul_(factor)
    return (cotangent * factor).to(cotangent.dtype)


def _relu(node: Any, cotangents: Cotangents, active: Sequence[Value], overwrite: bool) -> Sequence[Tensor | None]:
    given, result = _first(cotangents), node._saved_result.detach()
    if not overwrite:
        return (call_node(node, [given]),)
    return (torch.ops.aten.threshold_backward.grad_input(given, result, 0, grad_input=given),)


def _first(cotangents: Cotangents) -> Tensor:
    assert cotangents[0] is not None
    return cotangents[0]


def _dims(node: Any, name: str, rank: int) -> list[int]:
    """Dimensions that were saved, counted from the first one of a value."""
    saved = getattr(node, name)
    return [d % rank for d in signed([saved] if isinstance(saved, int) else saved)]


def _convolution(
    node: Any, cotangents: Cotangents, active: Sequence[Value], overwrite: bool
) -> Sequence[Tensor | None]:
    given = _first(cotangents)
    folded = transposed_convolution(node, given.flatten(0, 1))
    return (folded.reshape(*given.shape[:2], *folded.shape[1:]),)


def _linear(node: Any, cotangents: Cotangents, active: Sequence[Value], overwrite: bool) -> Sequence[Tensor | None]:
    """Of ``x @ mat2`` or ``alpha x @ mat2 + beta b`` with respect to x, in one product."""
    given, matrix = _first(cotangents), node._saved_mat2
    rows = given.flatten(0, 1) @ matrix.mH
    alpha = getattr(node, "_saved_alpha", 1)
    grad = (rows if alpha == 1 else rows * alpha).reshape(*given.shape[:2], matrix.shape[0])
    return (*[None] * _LINEAR[type(node).__name__], grad)


def _product(node: Any, cotangents: Cotangents, active: Sequence[Value], overwrite: bool) -> Sequence[Tensor | None]:
    """Of ``a @ b``, both of which may depend on the source."""
    given = _first(cotangents)
    wanted = [edge[0] is not None and Value(*edge) in active for edge in node.next_functions]
    return (
        given @ node._saved_mat2.mH if wanted[0] else None,
        node._saved_self.mH @ given if wanted[1] else None,
    )


def _batch_norm(node: Any, cotangents: Cotangents, active: Sequence[Value], overwrite: bool) -> Sequence[Tensor | None]:
    return (_times(_first(cotangents), _channel_factor(node), overwrite),)


def _channel_factor(node: Any) -> Tensor:
    return batch_norm_factor(node).view(-1, *[1] * (len(meta_of(Value(node, 0)).shape) - 2))


def _layer_norm(node: Any, cotangents: Cotangents, active: Sequence[Value], overwrite: bool) -> Sequence[Tensor | None]:
    given = _first(cotangents)
    saved = [
        t.expand(given.shape[0], *t.shape).contiguous()
        for t in (node._saved_input, node._saved_result1, node._saved_result2)
    ]
    shape, wanted = signed(node._saved_normalized_shape), [True, False, False]
    weight, bias = node._saved_weight, node._saved_bias
    backward = torch.ops.aten.native_layer_norm_backward
    return tuple(backward(given.contiguous(), saved[0], shape, saved[1], saved[2], weight, bias, wanted))


def _layer_norm_forward(
    node: Any, cotangents: Cotangents, active: Sequence[Value], overwrite: bool
) -> Sequence[Tensor | None]:
    """The derivative of a norm's backward with respect to its cotangent: the norm's own Jacobian."""
    given = _first(cotangents)
    dims = tuple(range(-len(node._saved_normalized_shape), 0))
    normal = (node._saved_input - node._saved_mean) * node._saved_rstd
    inner = (given * normal).mean(dims, keepdim=True)
    out = (given - given.mean(dims, keepdim=True)).addcmul_(normal, inner, value=-1.0).mul_(node._saved_rstd)
    return (out if node._saved_weight is None else out.mul_(node._saved_weight),)


def _softmax(node: Any, cotangents: Cotangents, active: Sequence[Value], overwrite: bool) -> Sequence[Tensor | None]:
    return (_softmax_jacobian(_first(cotangents), node._saved_result, node),)


def _softmax_forward(
    node: Any, cotangents: Cotangents, active: Sequence[Value], overwrite: bool
) -> Sequence[Tensor | None]:
    """The derivative of its backward: the Jacobian is symmetric."""
    return (_softmax_jacobian(_first(cotangents), node._saved_output, node),)


def _softmax_jacobian(given: Tensor, result: Tensor, node: Any) -> Tensor:
    (dim,) = _dims(node, "_saved_dim", max(1, result.dim()))
    if result.dim() == 0:
        return torch.zeros_like(given)
    scaled = given * result
    return scaled.addcmul_(result, scaled.sum(dim + 1, keepdim=True), value=-1.0)


def _reshaped(node: Any, cotangents: Cotangents, active: Sequence[Value], overwrite: bool) -> Sequence[Tensor | None]:
    given = _first(cotangents)
    return (given.reshape(given.shape[0], *meta_of(active[0]).shape),)


def _transposed(node: Any, cotangents: Cotangents, active: Sequence[Value], overwrite: bool) -> Sequence[Tensor | None]:
    given = _first(cotangents)
    rank = given.dim() - 1
    if rank < 2:
        return (given,)
    a, b = (0, 1) if operation(node) == "T" else (_dims(node, f"_saved_dim{i}", rank)[0] for i in (0, 1))
    return (given.transpose(a + 1, b + 1),)


def _permuted(node: Any, cotangents: Cotangents, active: Sequence[Value], overwrite: bool) -> Sequence[Tensor | None]:
    given = _first(cotangents)
    order = _dims(node, "_saved_dims", given.dim() - 1)
    back = sorted(range(len(order)), key=order.__getitem__)
    return (given.permute(0, *(d + 1 for d in back)),)


def _expanded(node: Any, cotangents: Cotangents, active: Sequence[Value], overwrite: bool) -> Sequence[Tensor | None]:
    return (_first(cotangents),)  # what was expanded is summed as for every broadcast


def _selected(node: Any, cotangents: Cotangents, active: Sequence[Value], overwrite: bool) -> Sequence[Tensor | None]:
    given, shape = _first(cotangents), meta_of(active[0]).shape
    (dim,) = _dims(node, "_saved_dim", len(shape))
    (index,) = signed([node._saved_index])
    return (torch.ops.aten.select_backward(given, [given.shape[0], *shape], dim + 1, index % shape[dim]),)


def _sliced(node: Any, cotangents: Cotangents, active: Sequence[Value], overwrite: bool) -> Sequence[Tensor | None]:
    given, shape = _first(cotangents), meta_of(active[0]).shape
    (dim,) = _dims(node, "_saved_dim", len(shape))
    start, end, step = signed([node._saved_start, node._saved_end, node._saved_step])
    return (torch.ops.aten.slice_backward(given, [given.shape[0], *shape], dim + 1, start, end, step),)


def _select_of(node: Any, cotangents: Cotangents, active: Sequence[Value], overwrite: bool) -> Sequence[Tensor | None]:
    """The derivative of the backward of a selection: the selection."""
    given = _first(cotangents)
    (dim,) = _dims(node, "_saved_dim", given.dim() - 1)
    (index,) = signed([node._saved_index])
    return (given.select(dim + 1, index),)


def _slice_of(node: Any, cotangents: Cotangents, active: Sequence[Value], overwrite: bool) -> Sequence[Tensor | None]:
    given = _first(cotangents)
    (dim,) = _dims(node, "_saved_dim", given.dim() - 1)
    start, end, step = signed([node._saved_start, node._saved_end, node._saved_step])
    return (torch.ops.aten.slice(given, dim + 1, start, end, step),)


def _pieces(node: Any, cotangents: Cotangents, active: Sequence[Value], overwrite: bool) -> Sequence[Tensor | None]:
    """Parts of a tensor, of which some may get no cotangent, put together again."""
    (dim,) = _dims(node, "_saved_dim", len(meta_of(active[0]).shape))
    some = next(c for c in cotangents if c is not None)
    parts = [
        some.new_zeros(len(some), *meta_of(Value(node, i)).shape) if c is None else c for i, c in enumerate(cotangents)
    ]
    return (torch.stack(parts, dim + 1) if operation(node) == "Unbind" else torch.cat(parts, dim + 1),)


def _joined(node: Any, cotangents: Cotangents, active: Sequence[Value], overwrite: bool) -> Sequence[Tensor | None]:
    given = _first(cotangents)
    (dim,) = _dims(node, "_saved_dim", given.dim() - 1)
    if operation(node) == "Stack":
        return given.unbind(dim + 1)
    sizes = [None if edge is None else _width(edge, dim) for edge in _edges(node)]
    left = given.shape[dim + 1] - sum(size for size in sizes if size is not None)
    return torch.split_with_sizes(given, [left if size is None else size for size in sizes], dim + 1)


def _width(value: Value, dim: int) -> int:
    shape = meta_of(value).shape
    return shape[dim] if shape != (0,) else 0  # torch lets an empty vector be joined to anything


def _reduced(node: Any, cotangents: Cotangents, active: Sequence[Value], overwrite: bool) -> Sequence[Tensor | None]:
    """Of a sum or mean over some dimensions, or all."""
    given, shape = _first(cotangents), meta_of(active[0]).shape
    dims = _dims(node, "_saved_dim", max(1, len(shape))) if hasattr(node, "_saved_dim") else []
    reduced = sorted(set(dims)) or list(range(len(shape)))
    if not getattr(node, "_saved_keepdim", False):
        for dim in reduced:
            given = given.unsqueeze(dim + 1) if shape else given
    if operation(node) == "Mean":
        given = given / prod(shape[dim] for dim in reduced) if shape else given
    return (given.expand(given.shape[0], *shape),)


#: What the rules multiply with that multiply with one tensor.
_FACTORS: dict[Rule | None, Callable[[Any], Tensor]] = {_by_derivative: _derivative, _batch_norm: _channel_factor}
# selections: their backward, and the forward operation on what is stacked, which is a view
_PARTS: dict[Rule | None, Rule] = {_selected: _select_of, _sliced: _slice_of}
# products with a matrix, and which of their arguments the matrix multiplies
_LINEAR = {"AddmmBackward0": 1, "MmBackward0": 0}
_RESHAPED = moves("reshape")
# what the backward multiplies the cotangent with lies beside its last dimensions
_ELEMENTWISE = ACTIVATIONS | {
    *("Abs", "Add", "Clone", "Cos", "Div", "Exp", "Log", "MaskedFill", "Mul"),
    *("Neg", "Pow", "Reciprocal", "Rsqrt", "Sqrt", "Sub", "Where"),
}
#: Those with respect to the first argument alone.
_OF_FIRST: dict[str, Rule] = {
    "NativeLayerNorm": _layer_norm,
    "NativeLayerNormBackward": _layer_norm_forward,
    "Softmax": _softmax,
    "SafeSoftmax": _softmax,
    "SoftmaxBackwardData": _softmax_forward,
    "Transpose": _transposed,
    "T": _transposed,
    "Permute": _permuted,
    "Expand": _expanded,
    "Select": _selected,
    "Slice": _sliced,
    "SelectBackward": _select_of,
    "SliceBackward": _slice_of,
    "Unbind": _pieces,
    "Split": _pieces,
    "SplitWithSizes": _pieces,
    "UnsafeSplit": _pieces,
    "Sum": _reduced,
    "Mean": _reduced,
}
_BY_NAME: dict[str, Rule] = {
    "BmmBackward0": _product,
    "MmBackward0": _product,
    "CatBackward0": _joined,
    "StackBackward0": _joined,
}
