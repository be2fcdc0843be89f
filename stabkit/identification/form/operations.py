"""Kinds of recorded operations, as far as reading a method needs them."""

from __future__ import annotations

from torch.autograd.graph import Node

from stabkit.tracing.derivatives.audit import OPAQUE
from stabkit.tracing.graph.values import operation
from stabkit.tracing.products.node_derivatives import is_python_node
from stabkit.vocabulary import is_activation, moves, norm_of

#: Operations that only move, copy or cast entries, whatever their indices; linear in all of their inputs.
MOVES = moves() - moves("gather")
#: Moves that put several tensors side by side.
JOINS = moves("join")
#: Moves that write one tensor into a part of another.
WRITES = moves("write")
#: Operations that add their inputs, with constant weights.
ADDS = frozenset({"Add", "Sub", "Rsub", "ForeachAdd", "ForeachSub"})
#: Operations that add something to their first input: a product, entries that are scattered into it.
ADDENDS = frozenset({"Addbmm", "Addcdiv", "Addcmul", "Addmm", "Addmv", "Addr", "Baddbmm", "IndexAdd", "ScatterAdd"})
#: Those of them whose other two inputs are multiplied.
PRODUCTS_ADDED = frozenset({"Addbmm", "Addcmul", "Addmm", "Addmv", "Addr", "Baddbmm"})
#: Operations that combine entries along a dimension with constant weights.
CONTRACTIONS = frozenset({"Bmm", "Mean", "Mm", "Mv", "Sum"})
#: Operations that are diagonal and linear when one input alone depends on the state.
SCALES = frozenset({"ForeachMul", "ForeachNeg", "MaskedFill", "Mul", "NativeDropout", "Neg", "Where"})
#: Operations that multiply two tensors entry by entry.
PRODUCTS = frozenset({"Mul", "Div"})
#: Operations with a weight matrix or a kernel, or a product of two matrices.
MATRICES = (
    "Addbmm", "Addmm", "Addmv", "Baddbmm", "Bmm", "Convolution", "Dot", "Linear", "MkldnnLinear", "Mm", "Mv",
    "SparseAddmm", "SparseMm",
)  # fmt: skip
#: Operations that are affine in all their inputs, and put entries into other places.
_SCATTERS = frozenset({"IndexAdd", "IndexPut", "Scatter", "ScatterAdd"})
#: Operations that are affine in their one input that depends on the state, and mix its entries.
_MIXES = frozenset(
    {
        "AdaptiveAvgPool2D",
        "AdaptiveAvgPool1D",
        "AvgPool1D",
        "AvgPool2D",
        "AvgPool3D",
        "Cumsum",
        "FftC2C",
        "FftC2R",
        "FftR2C",
        "Gather",
        "Index",
        "IndexSelect",
        "Mean",
        "Sum",
        "UpsampleBilinear2D",
        "UpsampleNearest2D",
        "ViewAsComplex",
        "ViewAsReal",
    }
)


_AFFINE = MOVES | ADDS | _SCATTERS
_CLOSED = frozenset(OPAQUE) | {"CppFunction"}
_known: dict[type[Node], bool] = {}  # of torch's own nodes by class: it is asked of each of them several times over


def is_opaque(node: Node) -> bool:
    """Whether the inside of the operation is not known: an unregistered hand-written backward, or a fused kernel.

    ``CppFunction`` is what torch shows of every compiled operation that has no class of its own.
    """
    closed = _known.get(type(node))
    if closed is not None:
        return closed
    name = operation(node)
    if is_python_node(node):  # whose class may be one of many that a forward pass makes, and be registered later
        if name in _CLOSED or name in WRITES:  # torchdiffeq's own assignment of a stage into the buffer of all stages
            return name in _CLOSED
        return not is_activation(node) and norm_of(node) is None
    _known[type(node)] = name in _CLOSED
    return _known[type(node)]


def has_matrix(node: Node) -> bool:
    """Whether the operation multiplies by a matrix, a kernel, or another tensor's matrix."""
    return operation(node).startswith(MATRICES)


def is_affine(node: Node, active: int) -> bool:
    """Whether the operation is affine in its ``active`` inputs that depend on the state."""
    name = operation(node)
    if is_opaque(node):
        return False
    if name in _AFFINE:
        return True
    if "BatchNorm" in name:
        return getattr(node, "_saved_training", True) is False
    return active == 1 and (name in SCALES or name == "Div" or name in _MIXES or has_matrix(node))
