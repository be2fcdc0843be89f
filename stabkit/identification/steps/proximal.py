"""Proximal maps behind additions: Euler's step on the smooth part, then the prox of the rest (forward-backward).

A map of every entry by itself that never falls and never grows faster than its argument is the proximal map of a convex
function (Moreau 1965): soft thresholds (ISTA), rectifiers, projections on boxes and balls of the maximum norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from stabkit.identification.form.chain import Link
from stabkit.identification.form.linear_parts import LinearParts
from stabkit.identification.form.operations import MOVES, is_affine
from stabkit.identification.form.pieces import Piece, pull
from stabkit.identification.names.single import Name
from stabkit.identification.record import Identification, record_of
from stabkit.tracing import Flow
from stabkit.tracing.graph.graph import element_of
from stabkit.tracing.graph.values import Value, meta_of, operation, outputs_of, random_tensors
from stabkit.vocabulary import is_activation

_ROUNDINGS = 64.0
_BOUNDS = frozenset({"Maximum", "Minimum"})
_SAME = 1e-4  # thresholds in single precision


@dataclass(frozen=True, eq=False)
class ProximalMap:
    """A proximal map inside a step.

    Attributes:
        begin: what it is taken of.
        end: its result.
        operations: what it is made of.
        threshold: the smallest and largest t of a soft threshold; None for other maps.
    """

    begin: Value
    end: Value
    operations: tuple[str, ...]
    threshold: tuple[float, float] | None

    @property
    def name(self) -> str:
        """What it is called."""
        if self.threshold is not None:
            return "soft threshold"
        return " ".join(dict.fromkeys(self.operations)) if len(self.operations) < 3 else "proximal map"

    @property
    def note(self) -> str:
        """What it does, in words."""
        if self.threshold is None:
            made = ", ".join(dict.fromkeys(self.operations))
            return f"a map of every entry ({made}) with slopes from 0 to 1 here: the prox of a convex function"
        low, high = self.threshold
        t = f"{low:.3g}" if high - low <= _SAME * high else f"{low:.3g} to {high:.3g}"
        return f"the soft threshold sign(x) max(|x| - t, 0), t = {t}: the prox of t |x|_1"


def proximal_maps(flow: Flow, piece: Piece) -> tuple[ProximalMap, ...]:
    """The proximal maps of states, and of sums in which one takes part, on the way to the new states; in order."""
    regions: dict[Value, list[Value]] = {}
    for node in piece.nodes:
        for value in outputs_of(node):
            begin = piece.base.get(value, value)
            if begin != value and (begin in piece.merges or begin in piece.sources):
                regions.setdefault(begin, []).append(value)
    found = (_proximal_map(flow, piece, begin, values) for begin, values in regions.items())
    return tuple(one for one in found if one is not None)


def _proximal_map(flow: Flow, piece: Piece, begin: Value, values: Sequence[Value]) -> ProximalMap | None:
    """The map from a sum to the one value that is taken of what is made of it without weights."""
    inside = {value.node for value in values}
    used = {v for node in piece.nodes if node not in inside for v in piece.inputs(node)} | set(piece.targets)
    ends = [value for value in values if value in used]
    if begin in piece.sources and (begin in used or begin in piece.targets):
        return None  # a state as it is besides: its map is a field
    if ends and not any(_avoids(piece, begin, ends[0], other) for other in ends[1:]):
        ends = ends[:1]  # the others are multiples of it, or made of it
    if len(ends) != 1 or ends[0].output != 0 or meta_of(ends[0]).shape != meta_of(begin).shape:
        return None
    region = Piece(piece.graph, piece.nodes, [begin], ends)
    made_of = [node for node in region.nodes if operation(node) not in MOVES]
    slope = _slope(region, begin, ends[0])
    if slope is None or all(is_affine(node, len(set(region.inputs(node)))) for node in made_of):
        return None
    slack = _ROUNDINGS * torch.finfo(slope.dtype).eps
    if float(slope.min()) < -slack or float(slope.max()) > 1 + slack:
        return None
    y, result = _recorded(region, begin), _kept(flow, ends[0])
    threshold = None if y is None or result is None else _soft_threshold(y, result, slope)
    parts = dict.fromkeys(element_of(piece.graph, node) or node for node in made_of)
    return ProximalMap(begin, ends[0], tuple(operation(p) if isinstance(p, Node) else p.name for p in parts), threshold)


def _avoids(piece: Piece, begin: Value, end: Value, value: Value) -> bool:
    """Whether something of the beginning reaches a value on a way past the end."""
    stack, seen = [value], {end}
    while stack:
        v = stack.pop()
        if v == begin:
            return True
        if v not in seen and v not in piece.ends:
            seen.add(v)
            stack.extend(piece.inputs(v.node))
    return False


def soft_threshold(flow: Flow, index: int, link: Link) -> tuple[float, float] | None:
    """The smallest and largest t of sign(y) max(|y| - t, 0), where a link is that and its result a state.

    However it is spelled: by the derivative, 0 or 1, and by the numbers that were recorded at both ends. With too few
    entries on either side of the threshold nothing is said.

    Args:
        flow: that the link belongs to.
        index: the index of the state.
        link: behind an addition.
    """
    state, piece = flow.states[index], link.form.piece
    source, target = piece.sources[0], piece.targets[0]
    result = state.tensor_of(target)
    if link.kind != "weightless" or result is None:
        return None
    y, slope = _recorded(piece, source), _slope(piece, source, target)
    return None if y is None or slope is None else _soft_threshold(y, result.detach(), slope)


def with_clamps_taken_off(links: Sequence[Link]) -> Sequence[Link]:
    """Links whose last is a map and no sum where a clamp is all that is taken off: x - clamp(x, -t, t).

    That is the soft threshold, whose slopes are 0 and 1 as those of a clamp are.
    """
    *before, last = links
    stages = last.form.stages if last.kind == "sum" else ()
    made = [node for stage in stages for node in stage.nodes if operation(node) not in MOVES]
    bent = all(operation(node) in _BOUNDS or is_activation(node) for node in made)  # by slopes of 0 and 1, see below
    if len(stages) != 1 or not made or not bent:
        return links
    slope = _slope(last.form.piece, last.form.sources[0], last.form.targets[0])
    if slope is None or not bool(((slope == 0) | (slope == 1)).all()):
        return links
    return (*before, replace(last, kind="weightless", nodes=(*last.nodes, last.form.targets[0].node)))


def learned_threshold(flow: Flow, steps: tuple[int, ...], links: Sequence[Link]) -> Identification | None:
    """The record of a soft threshold behind one linear map of the state and of what is held fixed; None for others.

    x' = prox(S x + W y) is a step of forward-backward splitting whose gradient step, S = 1 - h A^T A and W = h A^T, is
    written or learned as two matrices (Gregor and LeCun 2010, LISTA).
    """
    *maps, last = links
    if not maps:
        return None
    threshold = soft_threshold(flow, steps[-1] + 1, last)
    if threshold is None:
        return None
    nodes = [node for link in maps for node in link.form.piece.nodes]
    held = [v for link in maps for v in link.form.piece.contexts]
    ends = maps[0].form.sources, maps[-1].form.targets
    parts = LinearParts(Piece(flow.recorded.graph, nodes, *ends, contexts=tuple(dict.fromkeys(held))))
    if not parts.ways or parts.has_field or parts.beside or not parts.joins:
        return None
    low, high = threshold
    t = f"{low:.3g}" if high - low <= _SAME * high else f"{low:.3g} to {high:.3g}"
    why = f"a linear map of the state and of what is held fixed, then the soft threshold, t = {t}: the prox of t |x|_1"
    name = Name("linear step, then soft threshold (forward-backward)", "x' in (S - 1) x + u - d(t |x|_1)", 1.0,
                "h = 1: the matrix S as it is")  # fmt: skip
    return replace(record_of(name, None, steps, skip=None, residual=0.0, notes=(why,)), evidence="measured")


def _soft_threshold(y: Tensor, result: Tensor, slope: Tensor) -> tuple[float, float] | None:
    if y.shape != result.shape or y.is_complex():
        return None
    slack = _ROUNDINGS * torch.finfo(result.dtype).eps * float(y.abs().max())
    if not bool(((slope == 0) | ((slope - 1).abs() <= slack)).all()):
        return None
    kept = slope != 0
    t = (y.abs() - result.abs())[kept]
    ends = bool((result[~kept].abs() <= slack).all()) and bool((result[kept] * y[kept] > 0).all())
    both = bool((y[kept] > 0).any()) and bool((y[kept] < 0).any()) and not bool(kept.all())
    if not ends or not both or float(t.min()) <= slack or bool((y[~kept].abs() > t.max() + slack).any()):
        return None
    return float(t.min()), float(t.max())


def _slope(piece: Piece, source: Value, target: Value) -> Tensor | None:
    """The derivative of every entry of a link by that in its place; None where others take part."""
    w = random_tensors([target], seed=0)[0]
    edges = {node: piece.inputs(node) for node in piece.nodes}
    at = [pull(piece.graph, piece.nodes, edges, {target: c}).get(source) for c in (torch.ones_like(w), w)]
    if w.is_complex() or at[0] is None or at[1] is None or at[0].shape != w.shape:
        return None
    slack = _ROUNDINGS * torch.finfo(w.dtype).eps
    return at[0] if bool(((at[1] - at[0] * w).abs() <= slack * w.abs()).all()) else None


def _recorded(piece: Piece, source: Value) -> Tensor | None:
    """What an operation that reads a value kept of it."""
    for node in piece.nodes:
        known: Any = node
        kept = getattr(known, "_saved_self", None)
        parent, output = node.next_functions[0]
        if isinstance(kept, Tensor) and parent is not None and Value(parent, output) == source:
            return kept.detach()
    return None


def _kept(flow: Flow, value: Value) -> Tensor | None:
    """A value as a state of the flow holds it."""
    held = (state.tensor_of(value) for state in flow.states)
    return next((tensor.detach() for tensor in held if tensor is not None), None)
