"""Entries of a stage of which slices leave nothing: parts of a state that was joined and split again on the way."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch.autograd.graph import Node

from stabkit.identification.form.operations import JOINS, MOVES
from stabkit.identification.form.pieces import Piece, pull
from stabkit.tracing.graph.values import Value, operation, random_tensors


def without_left_out(piece: Piece, atom: Value, nodes: Collection[Node], entries: Sequence[Value]) -> tuple[Value, ...]:
    """Those entries of which something reaches an operation that is more than a move, or a sum with a constant.

    Args:
        piece: the stretch of the graph.
        atom: what the stage gives out.
        nodes: its operations.
        entries: the values at which it begins.
    """
    if len(entries) < 2 or not any(operation(node) in JOINS for node in nodes):
        return tuple(entries)
    moved: set[Value] = set(entries)
    carried: list[Node] = []
    for node in piece.nodes:
        edges = piece.inputs(node)
        if node not in nodes or node is atom.node or not edges or not moved.issuperset(edges):
            continue
        if operation(node) in MOVES or (node in piece.linear and len(edges) == 1):
            carried.append(node)
            moved.update(Value(node, i) for i in range(len(node._input_metadata)))
    inside = set(carried)
    read = list(dict.fromkeys(v for n in piece.nodes if n in nodes and n not in inside for v in piece.inputs(n)))
    read = [v for v in read if v in moved]
    drawn = dict(zip(read, random_tensors(read, seed=0), strict=True))
    arrived = pull(piece.graph, carried, {node: piece.inputs(node) for node in carried}, drawn)
    kept = tuple(v for v in entries if v in arrived and bool(arrived[v].any()))
    return kept or tuple(entries)
