"""Branches that are multiplied by what a controller makes: x' = x + h(x) F(x), a step size that is no constant.

The controller reads the state, another stream, a condition or the index of the layer, and not the value of the field:
an attention over the channels of F(x), made of F(x) itself, is a part of the field.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.autograd.graph import Node

from stabkit.identification.form.flow_index import Surroundings
from stabkit.identification.form.normal_form import NormalForm
from stabkit.identification.form.operations import MOVES, has_matrix
from stabkit.identification.form.pieces import ADDED, Piece
from stabkit.identification.record import Identification
from stabkit.tracing.graph.values import Value, meta_of, operation
from stabkit.vocabulary import activation_of


def with_predicted_step(record: Identification, sums: Sequence[NormalForm]) -> Identification:
    """A record of Euler steps that says which numbers a controller multiplies their branches by; others as they are."""
    branches = [(form.piece, atom) for form in sums for atom in form.forms[0] if atom not in form.piece.ends]
    splits = record.name.startswith("Lie splitting") and record.name.endswith("Euler steps)")
    if record.step_size != 1.0 or not (splits if len(branches) > 1 else record.name.startswith("forward Euler")):
        return record
    found = [predicted for branch in branches if (predicted := _predicted(*branch)) is not None]
    if not found or (splits and len(found) < len(branches)):
        return record
    low, high = (pick(float(pick_of(n)) for n, _ in found) for pick, pick_of in ((min, Tensor.min), (max, Tensor.max)))
    if len(found) > 1:
        fields = " + ".join(f"h_{i}({of}) F_{i}(x)" for i, (_, of) in enumerate(found, 1))
        how = f"h = 1: the fields are h_i F_i, and h_i, no constants, are from {low:.3g} to {high:.3g} here"
        return replace(record, convention=how, system=f"x' = {fields}")
    of = found[0][1]
    how = f"h = 1: the field is h({of}) F(x), and h, no constant, is from {low:.3g} to {high:.3g} here"
    return replace(record, convention=how, system=record.system.replace("f(x)", f"h({of}) F(x)"))


def with_fed_step(record: Identification, around: Surroundings, sums: Sequence[NormalForm]) -> Identification:
    """A record whose branches are multiplied by what another input of the model makes: its numbers are of this input.

    That input is held fixed, and what it makes is no value of the graph: a constant of each entry, and no parameter.
    """
    if not around.flow.side_inputs or record.method is None:
        return record
    fed = [c for form in sums if around.has_fed_factor(form.piece)
           for a, c in form.forms[0].items() if a not in form.piece.ends and c.kind == "diagonal"]  # fmt: skip
    if not fed:
        return record
    low, high = min(c.low for c in fed), max(c.high for c in fed)
    i = "_i" * (len(sums) > 1)
    are = "s are" if i else " is"
    how = f"h: its mean; the field{are} h{i}(c) F{i}(x), and h{i} is from {low:.3g} to {high:.3g} here"
    told = " and ".join(f"input {name!r}" for name in around.flow.side_inputs)
    why = f"h(c), a number for every entry, is made of what is held fixed: {told}"
    name = f"Lie splitting ({len(sums)} Euler steps)" if record.name.startswith("splitting of ") else record.name
    notes = tuple(note for note in record.notes if "LayerScale" not in note)
    return replace(record, name=name, convention=how, evidence="measured", notes=(why, *notes))


def _predicted(piece: Piece, atom: Value) -> tuple[Tensor, str] | None:
    """The numbers that a controller multiplies a field by, and whether it reads the state, x, or others alone, c."""
    if atom.output == ADDED:
        return None
    node = atom.node
    while operation(node) in MOVES and len(piece.inputs(node)) == 1 and piece.inputs(node)[0] not in piece.ends:
        node = piece.inputs(node)[0].node
    factors = piece.inputs(node)
    if operation(node) != "Mul" or len(set(factors)) != 2:
        return None
    for place, (factor, value) in enumerate((factors, factors[::-1])):
        if meta_of(value).numel < meta_of(atom).numel:
            continue  # an outer product, e x^T: no number before a field
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
