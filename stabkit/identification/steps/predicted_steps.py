"""Branches that are multiplied by what a controller makes: x' = x + h(x) F(x), a step size that is no constant.

The controller reads the state, another stream, a condition or the index of the layer, and not the value of the field:
an attention over the channels of F(x), made of F(x) itself, is a part of the field.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.autograd.graph import Node

from stabkit.identification.form.normal_form import NormalForm
from stabkit.identification.form.operations import MOVES, has_matrix
from stabkit.identification.form.pieces import ADDED, Piece
from stabkit.identification.record import Identification
from stabkit.tracing.graph.values import Value, meta_of, operation
from stabkit.vocabulary import activation_of


def with_predicted_step(record: Identification, form: NormalForm) -> Identification:
    """A record of Euler's method that says which numbers a controller multiplies its branch by; others as they are."""
    if not record.name.startswith("forward Euler") or record.step_size != 1.0:
        return record
    found = [predicted for a in form.forms[0] if (predicted := _predicted(form.piece, a)) is not None]
    if len(found) != 1:
        return record
    numbers, of = found[0]
    how = (
        f"h = 1: the field is h({of}) F(x), and h, no constant, is from {numbers.min():.3g} to {numbers.max():.3g} here"
    )
    return replace(record, convention=how, system=record.system.replace("f(x)", f"h({of}) F(x)"))


def _predicted(piece: Piece, atom: Value) -> tuple[Tensor, str] | None:
    """The numbers that a controller multiplies a field by, and whether it reads the state, x, or others alone, c."""
    if atom in piece.ends or atom.output == ADDED:
        return None
    node = atom.node
    while operation(node) in MOVES and len(piece.inputs(node)) == 1 and piece.inputs(node)[0] not in piece.ends:
        node = piece.inputs(node)[0].node
    factors = piece.inputs(node)
    if operation(node) != "Mul" or len(set(factors)) != 2:
        return None
    for place, (factor, value) in enumerate((factors, factors[::-1])):
        saved = getattr(node, ("_saved_self", "_saved_other")[place], None)
        if isinstance(saved, Tensor) and not saved.is_complex() and _controls(piece, factor, value):
            return saved.detach().to(torch.float64), "x" if _reads_state(piece, factor) else "c"
    return None


def _controls(piece: Piece, factor: Value, value: Value) -> bool:
    """Whether a factor is made of what is held fixed, or with weights of the state and not of what it multiplies.

    One that the state makes is a number for many entries, or bounded.
    """
    node = _behind_moves(piece, factor)
    facts = None if node is None else activation_of(node)
    made, fields = _ancestors(piece, factor), _ancestors(piece, value)
    if not _reads_state(piece, factor):
        return _reads_state(piece, value) and any(map(has_matrix, fields))
    narrow = meta_of(factor).numel < meta_of(value).numel
    if not narrow and (facts is None or not facts.is_bounded):
        return False
    apart = value.node not in made and factor.node not in fields
    return apart and any(map(has_matrix, fields)) and any(map(has_matrix, made - fields))


def _reads_state(piece: Piece, value: Value) -> bool:
    """Whether a value depends on a state, and not on what is held fixed alone."""
    read = {v for node in _ancestors(piece, value) for v in piece.inputs(node)} | {value}
    return not read.isdisjoint(piece.sources)


def _behind_moves(piece: Piece, value: Value) -> Node | None:
    while value not in piece.ends and operation(value.node) in MOVES and len(piece.inputs(value.node)) == 1:
        value = piece.inputs(value.node)[0]
    return None if value in piece.ends else value.node


def _ancestors(piece: Piece, value: Value) -> set[Node]:
    stack, found = [value], set[Node]()
    while stack:
        v = stack.pop()
        if v not in piece.ends and v.node not in found:
            found.add(v.node)
            stack.extend(piece.inputs(v.node))
    return found
