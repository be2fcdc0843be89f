"""The range that a value is held in by the operations that make it, whatever the weights are.

Bounded activations, a softmax, clamps, products of normalised vectors, and all of these times a scalar have one; of
everything else nothing is known, and the range is that of all numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from torch.autograd.graph import Node

from stabkit.tracing.graph.values import operation
from stabkit.tracing.products.node_derivatives import signed
from stabkit.vocabulary import activation_of, moves

_MOVES = moves("reshape", "permute", "copy", "select", "gather", "expand")
_UNIT = 1e-3  # by how much the measured norm of normalised vectors may differ from what it should be


@dataclass(frozen=True)
class Range:
    """What a value is held in.

    Attributes:
        low: no entry is below.
        high: no entry is above.
        node: what bounds it; None where nothing does.
        words: how, such as ``"tanh"`` or ``"cosines"``.
        scales: scalars on the graph that multiply it.
    """

    low: float = -math.inf
    high: float = math.inf
    node: Node | None = None
    words: str = ""
    scales: tuple[Tensor, ...] = ()

    @property
    def width(self) -> float:
        """How far apart two entries can be."""
        return self.high - self.low


def range_of(node: Node | None) -> Range:
    """The range of what an operation gives."""
    made: Any = behind_moves(node)
    if made is None:
        return Range()
    name = operation(made)
    if name == "Softmax":
        return Range(0.0, 1.0, made, "softmax")
    if name in ("Mm", "Bmm", "Sum"):
        size, scales = _product(made)
        return Range(-size, size, made, "cosines", scales) if math.isfinite(size) else Range()
    if name in ("Mul", "Div", "Neg"):
        factor, inner, scale = _scaled(made)
        found = range_of(inner) if inner is not None else Range()
        return _times(found, factor, scale) if found.node is not None else Range()
    if name.startswith("Clamp"):
        return _clamped(made)
    return _of_activation(made)


def behind_moves(node: Node | None) -> Node | None:
    """The operation behind views and copies; None where several tensors come together."""
    return next((each for each in through_moves(node) if operation(each) not in _MOVES), None)


def through_moves(node: Node | None) -> Iterator[Node]:
    """A node and those behind it, as long as they are views and copies of one tensor, and the one behind these."""
    while node is not None:
        yield node
        parents = [parent for parent, _ in node.next_functions if parent is not None]
        node = parents[0] if operation(node) in _MOVES and len(parents) == 1 else None


def _of_activation(node: Node) -> Range:
    """A monotone activation lies within its limits."""
    facts = activation_of(node)
    if facts is None or facts.slope[0] < 0:
        return Range()
    low, high = (limit if not math.isnan(limit) else math.inf for limit in facts.limits)
    low = low if low < math.inf else -math.inf
    return Range(low, high, node, facts.name) if math.isfinite(low) or math.isfinite(high) else Range()


def _clamped(node: Any) -> Range:
    low, high = getattr(node, "_saved_min", None), getattr(node, "_saved_max", None)
    if isinstance(low, Tensor) or isinstance(high, Tensor) or (low is None and high is None):
        return Range()
    return Range(-math.inf if low is None else float(low), math.inf if high is None else float(high), node, "clamp")


def _times(found: Range, factor: float, scale: Tensor | None) -> Range:
    ends = sorted((found.low * factor, found.high * factor)) if factor else (0.0, 0.0)
    scales = found.scales if scale is None else (*found.scales, scale)
    return replace(found, low=ends[0], high=ends[1], scales=scales)


def _scaled(node: Any) -> tuple[float, Node | None, Tensor | None]:
    """The scalar that a tensor is multiplied with, the tensor, and the scalar as a leaf of the graph if it is one."""
    name = operation(node)
    if name == "Neg":
        return -1.0, node.next_functions[0][0], None
    parents = [parent for parent, _ in node.next_functions]
    other = _scalar(node._saved_other)
    if other is not None and parents[0] is not None:
        factor = other if name == "Mul" else 1.0 / other if other else math.inf
        return factor, parents[0], _leaf(parents[1]) if len(parents) > 1 else None
    own = _scalar(node._saved_self) if name == "Mul" else None
    if own is not None and len(parents) > 1 and parents[1] is not None:
        return own, parents[1], _leaf(parents[0])
    return 1.0, None, None


def _scalar(saved: Any) -> float | None:
    if isinstance(saved, int | float):
        return float(saved)
    return float(saved.detach()) if isinstance(saved, Tensor) and saved.numel() == 1 else None


def _leaf(node: Node | None) -> Tensor | None:
    found: Any = behind_moves(node)
    return found.variable if found is not None and hasattr(found, "variable") else None


def _product(node: Any) -> tuple[float, tuple[Tensor, ...]]:
    """The largest inner product of two sets of vectors whose norms are known, with the scalars in it."""
    made: Any = node
    left: Tensor | None
    right: Tensor | None
    if operation(node) == "Sum":  # cosine_similarity: the sum of the products of normalised vectors
        along: Any = getattr(node, "_saved_dim", ())
        made = node.next_functions[0][0]
        if len(along) != 1 or made is None or operation(made) != "Mul" or len(made.next_functions) < 2:
            return math.inf, ()
        dims = tuple(signed(along[:1])) * 2
        left, right = made._saved_self, made._saved_other
    else:
        dims = (-1, -2)
        left, right = made._saved_self, made._saved_mat2
    size, scales = 1.0, list[Tensor]()
    for (parent, _), taken, dim in zip(made.next_functions, (left, right), dims, strict=True):
        measured = taken.detach().norm(dim=dim) if isinstance(taken, Tensor) and taken.dim() else None
        if parent is None:  # what does not train stays as it is
            size *= math.inf if measured is None else float(measured.max())
            continue
        norm, found = _norm(parent)
        if measured is not None and not bool(((measured / norm - 1).abs() < _UNIT).all()):
            return math.inf, ()  # free, or normalised along something else
        size *= norm
        scales += found
    return size, tuple(scales)


def _norm(node: Node | None) -> tuple[float, tuple[Tensor, ...]]:
    """The norm that vectors have by construction, with the scalars that multiply them; infinite where it is free."""
    made: Any = behind_moves(node)
    if made is None or operation(made) not in ("Div", "Mul"):
        return math.inf, ()
    if operation(made) == "Div" and _is_norm_of(made.next_functions):
        return 1.0, ()
    factor, inner, scale = _scaled(made)
    size, scales = _norm(inner)
    return (abs(factor) * size, scales if scale is None else (*scales, scale)) if inner is not None else (math.inf, ())


def _is_norm_of(parents: Any) -> bool:
    """Whether the second is the norm of the first."""
    if len(parents) < 2 or parents[1][0] is None:
        return False
    norm: Any = behind_moves(parents[1][0])
    if norm is not None and operation(norm).startswith("ClampMin"):
        norm = behind_moves(norm.next_functions[0][0])
    if norm is None or operation(norm) not in ("LinalgVectorNorm", "Norm"):
        return False
    return behind_moves(norm.next_functions[0][0]) is behind_moves(parents[0][0])
