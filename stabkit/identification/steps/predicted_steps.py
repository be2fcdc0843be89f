"""Branches that are multiplied by what a controller makes: x' = x + h(x) F(x), a step size that is no constant.

The controller reads the state, another stream, a condition or the index of the layer, and not the value of the field:
an attention over the channels of F(x), made of F(x) itself, is a part of the field.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.autograd.graph import Node

from stabkit.identification.form.chain import Link
from stabkit.identification.form.flow_index import Surroundings
from stabkit.identification.form.normal_form import NormalForm
from stabkit.identification.form.operations import MOVES, SCALES, has_matrix
from stabkit.identification.form.pieces import ADDED, Piece
from stabkit.identification.form.slots import Slots
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


Reader = Callable[[Surroundings, Slots, Sequence[Link], tuple[int, ...]], Identification]


def with_step_sizes_held(
    around: Surroundings, found: Slots, steps: tuple[int, ...], read: Reader
) -> Identification | None:
    """The record of a step where step sizes that are made of the state are taken as numbers; None if that is no method.

    So it is with adaptive solvers, whose first step size follows the state and its field.

    Args:
        around: the flow.
        found: the states of the step.
        steps: its place.
        read: reads a chain of sums.
    """
    start, stop = steps[0], steps[-1] + 1
    numbers = _made_by_control(around.whole(start, stop, found))
    if not numbers:
        return None
    held = around.holding(numbers)
    links = held.chain(start, stop, found)
    if not any(link.kind == "sum" for link in links) or any(link.kind in ("map", "join") for link in links):
        return None
    better = read(held, found, links, steps)
    if better.name.startswith("unnamed") or not better.shared_weights:
        return None
    return with_sizes_of_input(better, by_norm=_is_normed(around.whole(start, stop, found), numbers))


def with_sizes_of_input(record: Identification, *, by_norm: bool) -> Identification:
    """A record of a step whose size is made of numbers that are put in: its own are those of this input.

    Args:
        record: that was read with these numbers held fixed.
        by_norm: whether a norm of the state is among what makes them, as in the control of an error.
    """
    if record.step_size is None:
        return record
    made = "of the state, by the control of an error" if by_norm else "of numbers beside the state, such as times"
    why = f"step sizes are made {made}: they are those of this input, and held fixed"
    return replace(record, evidence="measured", notes=(why, *record.notes))


def without_clock(
    around: Surroundings, found: Slots, steps: tuple[int, ...]
) -> tuple[Surroundings, Slots, bool] | None:
    """The flow and the states of a step without single numbers that follow each other beside states of many: a time.

    And whether a norm of the state makes them. None where there are none.
    Where an adaptive solver makes its first step size of the state, so are all times after it.
    """
    states = [[v for v in values if meta_of(v).numel > 1] for values in (found.sources, found.targets)]
    numbers = {v for v in (*found.sources, *found.targets) if meta_of(v).numel == 1}
    if not numbers or not all(states) or len(found.sources) != len(found.targets):
        return None
    contexts = (*found.contexts, *(v for v in found.sources if v in numbers))
    whole = around.whole(steps[0], steps[-1] + 1, found)
    clock = {v.node for v in found.targets if v in numbers and v not in found.sources}
    made = {node for node in whole.nodes if meta_of(Value(node, 0)).numel == 1}
    if any(v.node not in made and v not in found.sources for node in clock for v in whole.inputs(node)):
        return None
    slots = replace(found, sources=tuple(states[0]), targets=tuple(states[1]), contexts=contexts)
    return around.holding(made), slots, _is_normed(whole, made)


def _is_normed(piece: Piece, numbers: Collection[Node]) -> bool:
    """Whether something that makes one number of many is among the operations that make numbers."""
    return any(
        operation(node) not in MOVES and any(meta_of(v).numel > 1 for v in piece.inputs(node)) for node in numbers
    )


def _made_by_control(piece: Piece) -> set[Node]:
    """The operations that make single numbers of a state of many, and what nothing else is made into: step sizes.

    The control of an error takes a norm of all entries, and so couples all samples; what it makes multiplies values of
    the field. Empty where a state is one number itself.
    """
    if min(meta_of(v).numel for v in (*piece.sources, *piece.targets)) == 1:
        return set()
    found: set[Node] = set()
    for node in piece.nodes:
        of_numbers = all(v.node in found for v in piece.inputs(node))
        if of_numbers or meta_of(Value(node, 0)).numel == 1:
            found.add(node)
    return found


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
    how = f"none for all: the field{are} h{i}(c) F{i}(x), and h{i} is from {low:.3g} to {high:.3g} here"
    told = " and ".join(f"input {name!r}" for name in around.flow.side_inputs)
    why = f"h(c), {low:.3g} to {high:.3g} by entry here, is made of what is held fixed: {told}"
    name = f"Lie splitting ({len(sums)} Euler steps)" if record.name.startswith("splitting of ") else record.name
    notes = tuple(note for note in record.notes if "LayerScale" not in note)
    return replace(record, name=name, step_size=None, convention=how, evidence="measured", notes=(why, *notes))


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
    found = []
    for place, (factor, value) in enumerate((factors, factors[::-1])):
        if meta_of(value).numel < meta_of(atom).numel:
            continue  # an outer product, e x^T: no number before a field
        saved = getattr(node, ("_saved_self", "_saved_other")[place], None)
        if isinstance(saved, Tensor) and not saved.is_complex() and _controls(piece, factor, value):
            found.append((saved.detach().to(torch.float64), "x" if _reads_state(piece, factor) else "c"))
    # of z tanh(..) either is bounded: a step size is no number below zero
    return min(found, key=lambda each: bool((each[0] < 0).any()), default=None)


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
    while value not in piece.ends and operation(value.node) in MOVES | SCALES and len(piece.inputs(value.node)) == 1:
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
