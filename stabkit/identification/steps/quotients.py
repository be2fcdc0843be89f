"""Semi-implicit steps with a leak: x' = (x + h f(x)) / (1 + h w(x)), which is x' = x + h f(x) - h w(x) x' solved."""

from __future__ import annotations

from torch.autograd.graph import Node

from stabkit.identification.form.gates import adds_constant
from stabkit.identification.form.normal_form import NormalForm
from stabkit.identification.form.operations import MOVES, SCALES
from stabkit.identification.form.pieces import Piece
from stabkit.tracing.graph.values import Value, meta_of, operation


def leaking_quotients(form: NormalForm) -> int:
    """How often a step divides what carries the state by a constant and what depends on the state, entry by entry.

    What divides many entries by one number is a norm, and no leak.
    """
    piece = form.piece
    return sum(_divides(piece, node) for node in piece.nodes)


def _divides(piece: Piece, node: Node) -> bool:
    given, linear = piece.inputs(node), piece.linear.get(node, [])
    if len(linear) != 1 or len(given) != 2 or linear[0] not in piece.carrying or linear[0] not in given:
        return False
    other = given[1 - given.index(linear[0])]
    if operation(node) == "Mul":
        divisor = _inverted(piece, other)
    else:
        divisor = other if operation(node) == "Div" and node.next_functions[0][0] is linear[0].node else None
    if divisor is None or meta_of(divisor).numel != meta_of(Value(node, 0)).numel:
        return False
    return adds_constant(divisor, piece.inputs, piece.ends)


def _inverted(piece: Piece, value: Value) -> Value | None:
    """What a factor is the inverse of, times a number."""
    while value not in piece.ends:
        given = piece.inputs(value.node)
        if len(given) != 1:
            return None
        if operation(value.node) == "Reciprocal":
            return given[0]
        if operation(value.node) not in MOVES | SCALES:
            return None
        value = given[0]
    return None
