"""A skip along operations that mix entries in general, but not with these constants: found by measuring it.

An identity matrix, a running sum of which the last is taken, entries that are read and written by index: each is
affine, so it hides a multiple of the identity or it does not, and two random cotangents tell which.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import Node

from stabkit.identification.form.operations import ADDENDS, is_affine
from stabkit.identification.form.pieces import Piece, pull
from stabkit.tracing.graph.values import Value, operation, outputs_of, random_tensors

_ROUNDINGS = 64.0
_BLOCK = 500  # operations


@dataclass(frozen=True)
class HiddenSkip:
    """A skip that was measured.

    Attributes:
        value: the number ``a`` of x' = a x + f(x); the mean where every entry has one of its own.
        residual: relative deviation from it on random cotangents.
        operations: the affine operations on the way, in order.
        low: the smallest number of an entry.
        high: the largest one.
    """

    value: float
    residual: float
    operations: tuple[str, ...]
    low: float
    high: float

    @property
    def is_one_number(self) -> bool:
        """Whether all entries have the same."""
        return self.low == self.high


def _affine_way(piece: Piece) -> dict[Node, list[Value]] | None:
    """The affine operations from the one source to the one target, with the inputs on the way; None if all are."""
    allowed = reached_along_affine(piece)
    return allowed if allowed is not None and len(allowed) < len(piece.nodes) else None


def reached_along_affine(piece: Piece) -> dict[Node, list[Value]] | None:
    """The affine operations by which the one source reaches the one target, if it does, with their inputs on the way.

    Nothing is computed: what arrives may be zero.
    """
    source, target = piece.sources[0], piece.targets[0]
    reached: set[Value] = {source}
    allowed: dict[Node, list[Value]] = {}
    for node in piece.nodes:
        inputs = piece.inputs(node)
        if operation(node) in ADDENDS and len(inputs) > 1:
            affine = inputs[:1]
        else:
            affine = inputs if is_affine(node, len(inputs)) else []
        taken = [value for value in affine if value in reached]
        if taken:
            allowed[node] = taken
            reached.update(outputs_of(node))
    if target not in reached:
        return None
    wanted = {target}
    for node in reversed(list(allowed)):  # an affine beginning of a branch that bends later is not on the way
        if wanted.isdisjoint(outputs_of(node)):
            del allowed[node]
        else:
            wanted.update(allowed[node])
    return allowed


def affine_pulls(piece: Piece, cotangents: Sequence[Tensor]) -> list[Tensor] | None:
    """Cotangents of the target as they reach the source along affine operations alone; None where nothing does."""
    allowed = _affine_way(piece)
    if allowed is None:
        return None
    pulled = [
        pull(piece.graph, list(allowed), allowed, {piece.targets[0]: w}).get(piece.sources[0]) for w in cotangents
    ]
    arrived = [p for p in pulled if p is not None]
    return arrived if len(arrived) == len(pulled) else None


def reaches_linearly(piece: Piece) -> bool:
    """Whether something of the one source reaches the one target along affine operations alone."""
    pulled = affine_pulls(piece, [random_tensors([piece.targets[0]], seed=0)[0]])
    return pulled is not None and bool(pulled[0].any())


def hidden_skip(piece: Piece, *, of_entries: bool = False) -> HiddenSkip | None:
    """What reaches the one target from the one source along affine operations alone, when that is a multiple of it.

    Args:
        piece: with one source and one target.
        of_entries: whether every entry may have a factor of its own, as a norm with fixed statistics gives it.

    Returns:
        None when nothing arrives, when it is no such multiple, when it leaves some entries out, and when nothing else
        is added.
    """
    drawn = [random_tensors([piece.targets[0]], seed)[0] for seed in range(2)]
    pulled = affine_pulls(piece, drawn)
    if pulled is None or any(p.numel() != w.numel() for p, w in zip(pulled, drawn, strict=True)):
        return None
    w = torch.stack([t.reshape(-1) for t in drawn]).double()
    s = torch.stack([t.reshape(-1) for t in pulled]).double()
    a = (w * s).sum(0) / (w * w).sum(0) if of_entries else (w * s).sum() / (w * w).sum()
    residual = float((s - a * w).norm() / w.norm())
    tolerance = _ROUNDINGS * torch.finfo(drawn[0].dtype).eps
    if residual > tolerance or float(a.abs().min()) <= tolerance:
        return None
    operations = tuple(operation(node) for node in _affine_way(piece) or ())
    low, high = float(a.min()), float(a.max())
    if high - low <= tolerance * abs(high):  # one number, but for rounding
        low = high = float(a.mean())
    return HiddenSkip(float(a.mean()), residual, operations, low, high)


def residuals_inside(piece: Piece) -> int:
    """How many additions of a piece add something to a value that it was made of, neither of which is a state of it.

    They are counted where a person would: 0 for a piece of more operations than a block has, and without those of the
    time steps of recurrent layers.
    """
    if len(piece.nodes) > _BLOCK:
        return 0
    behind: dict[Value, set[Value]] = {}  # of every value the sums and branching points that it was made of
    uses = Counter(v for node in piece.nodes for v in piece.inputs(node))
    count = 0
    for node in piece.nodes:
        inputs = piece.inputs(node)
        made = {v for v in inputs if uses[v] > 1 and v not in piece.ends}.union(*(behind.get(v, set()) for v in inputs))
        if operation(node) == "Add" and len(set(inputs)) == 2 and node not in piece.owned:
            a, b = inputs
            count += a in behind.get(b, set()) or b in behind.get(a, set())
        behind.update(dict.fromkeys((Value(node, i) for i in range(len(node._input_metadata))), made))
    return count
