"""Soft thresholds behind an addition: Euler's step on the smooth part, then the proximal map of t |x|_1 (ISTA)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stabkit.identification.form.chain import Link
from stabkit.identification.form.pieces import Piece, pull
from stabkit.tracing import Flow
from stabkit.tracing.graph.values import Value, random_tensors

_ROUNDINGS = 64.0


def soft_threshold(flow: Flow, index: int, link: Link) -> tuple[float, float] | None:
    """The smallest and largest t of sign(y) max(|y| - t, 0), where a link is that and its result a state.

    However it is spelled: by the derivative, 0 or 1, and by the numbers that were recorded at both ends. With too few
    entries on either side of the threshold nothing is said.

    Args:
        flow: that the link belongs to.
        index: of the state.
        link: behind an addition.
    """
    state, piece = flow.states[index], link.form.piece
    source, target = piece.sources[0], piece.targets[0]
    if link.kind != "weightless" or target not in state.values:
        return None
    y, result = _recorded(piece, source), state.tensors[state.values.index(target)].detach()
    if y is None or y.shape != result.shape or y.is_complex():
        return None
    slack = _ROUNDINGS * torch.finfo(result.dtype).eps * float(y.abs().max())
    slope = _slope(piece, source, target)
    if slope is None or not bool(((slope == 0) | ((slope - 1).abs() <= slack)).all()):
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
    if at[0] is None or at[1] is None or at[0].shape != w.shape:
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
