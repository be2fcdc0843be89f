"""A state that is multiplied by a matrix made of it, x' = M(x) x + f(x): streams that mix by what they hold.

Nothing of it shows among the linear paths, since a product of two tensors that both depend on the state is linear in
neither; but it is no map without a skip either: the state itself reaches the next one, past no weights.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from torch.autograd.graph import Node

from stabkit.identification.form.operations import ADDS, MOVES, SCALES
from stabkit.identification.form.pieces import Piece
from stabkit.identification.record import Identification, nothing
from stabkit.identification.steps.streams import MOST_STREAMS
from stabkit.tracing.graph.values import Value, meta_of, operation, outputs_of

_PRODUCTS = frozenset({"Bmm", "Mm", "Mv", "Dot"})
_SUMS = frozenset({"Sum", "Mean"})  # as products of matrices are spelled by hand: (M[..., None] * x).sum(-2)
_STOCHASTIC = 1e-3  # rows and columns that are normalised by turns sum to one up to what the turns leave over


@dataclass(frozen=True)
class Mixing:
    """Matrices of the state that multiply it.

    Attributes:
        sizes: their shapes, without axes of samples.
        stochastic: ``"doubly stochastic"``, ``"of weights that sum to one"``, or ``""``, as they are at this input.
    """

    sizes: tuple[tuple[int, ...], ...]
    stochastic: str


def mixed_by_itself(piece: Piece) -> Mixing | None:
    """The matrices by which a state is multiplied on its way past all weights; None where there is no such way."""
    reached, products = set(piece.sources), dict[Value, tuple[Node, ...]]()
    for node in piece.nodes:
        edges = piece.inputs(node)
        taken = [v for v in edges if v in reached]
        if not taken or not _passes(node, edges):
            continue
        passed = tuple(dict.fromkeys(n for v in taken for n in products.get(v, ())))
        by_hand = operation(node) in _SUMS and any(operation(n) == "Mul" for n in passed)
        if operation(node) in _PRODUCTS or by_hand or (operation(node) == "Mul" and len(set(edges)) == 2):
            passed = (*passed, node)
        for value in outputs_of(node):
            reached.add(value)
            products[value] = passed
    found = [n for target in piece.targets for n in products.get(target, ()) if operation(n) in _PRODUCTS | _SUMS]
    if not found:
        return None
    matrices = [m for node in dict.fromkeys(found) for m in _matrices(node, reached, piece)]
    kinds = {_kind(m) for m in matrices}
    order = ("", "of weights that sum to one", "doubly stochastic")
    sizes = tuple(dict.fromkeys(tuple(m.shape[-2:]) for m in matrices))
    return Mixing(sizes, min(kinds, key=order.index, default=""))


def streams_mixed_by_themselves(piece: Piece) -> Mixing | None:
    """The matrices that mix the streams a state holds along an axis, made of them; None where it is no such state.

    That they are streams shows in that one of them is read by itself. A sum of the state and a product with a matrix
    of it is Euler's step of attention without values of its own otherwise.
    """
    if not any(_picks_part(node) and set(piece.inputs(node)) & piece.carrying for node in piece.nodes):
        return None
    found = mixed_by_itself(piece)
    # of a single vector any field is a matrix of it times itself
    whole = any(operation(n) in _PRODUCTS and min(meta_of(Value(n, 0)).shape[-2:], default=0) > 1 for n in piece.nodes)
    few = found is not None and any(len(size) == 2 and max(size) <= MOST_STREAMS for size in found.sizes)
    return found if few and whole else None


def _picks_part(node: Node) -> bool:
    """Whether an operation takes one entry of an axis: a stream."""
    return operation(node) in ("Select", "Unbind")


def _passes(node: Node, edges: list[Value]) -> bool:
    """Whether what a node gives out is its input, moved, scaled, or multiplied by what depends on the state."""
    name = operation(node)
    if name in MOVES | ADDS | _SUMS:
        return True
    if name == "Div":
        parent, output = node.next_functions[0]
        return parent is not None and edges == [Value(parent, output)]
    return name in SCALES or (name in _PRODUCTS and len(set(edges)) == 2)


def _matrices(node: Node, reached: set[Value], piece: Piece) -> list[Tensor]:
    """The factor of a product that is not the state."""
    known: Any = node
    saved = [getattr(known, name, None) for name in ("_saved_self", "_saved_mat2")]
    places = [parent and Value(parent, output) for parent, output in node.next_functions]
    return [
        t.detach() if place == 0 else t.detach().mT
        for place, (t, value) in enumerate(zip(saved, places, strict=False))
        if isinstance(t, Tensor) and t.dim() > 1 and value in piece.inputs(node) and value not in reached
    ]


def _kind(matrix: Tensor) -> str:
    """What holds of the factor as it multiplies from the left."""
    if bool((matrix < 0).any()) or bool(((matrix.sum(-1) - 1).abs() > _STOCHASTIC).any()):
        return ""
    square = matrix.shape[-1] == matrix.shape[-2]
    columns = square and bool(((matrix.sum(-2) - 1).abs() <= _STOCHASTIC).all())
    return "doubly stochastic" if columns else "of weights that sum to one"


def record_of_mixing(mixing: Mixing, steps: tuple[int, ...]) -> Identification:
    """The record of a state that is multiplied by a matrix made of it."""
    why = f"the state is multiplied by a matrix that depends on it ({_sizes(mixing)}): no single a describes the skip"
    return nothing(steps, "skip by a matrix of the state", why, "measured", system="M(x) x + f(x), M a matrix")


def beside_identity(record: Identification, mixing: Mixing) -> Identification:
    """The record of a step that adds to its state a matrix of it times itself, P(x) x: what is passed on is the state.

    Without another name for the whole it is that of a skip by a matrix.
    """
    if record.skip != 1.0 or record.name.startswith(("unnamed", "not a step")):
        return record_of_mixing(mixing, record.steps)
    why = f"beside the identity the state is multiplied by a matrix P(x) that depends on it ({_sizes(mixing)})"
    name = f"{record.name}, streams mixed by a matrix of the state"
    if record.method is not None:
        record.method.name = name
    return replace(record, name=name, system=f"{record.system}, one field of them P(x) x", notes=(why, *record.notes))


def _sizes(mixing: Mixing) -> str:
    sizes = " and ".join(" by ".join(map(str, size)) for size in mixing.sizes) or "spelled as a product and a sum"
    return f"{sizes}, {mixing.stochastic} at this input" if mixing.stochastic else sizes
