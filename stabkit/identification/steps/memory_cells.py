"""Whether two states are those of a gated memory cell, by the numbers of its equations on what was recorded.

Hochreiter and Schmidhuber 1997, Gers et al. 2000: c' = f c + i g and h' = o phi(c'), with f and o between 0 and 1 at
every entry, and phi of entries of c' alone (tanh, nothing, a norm). A state that a gate multiplies, beside another that
is made of both, is none by that: the memory of HiPPO (Gu et al. 2020) is driven by a gated state, and no output of it.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor

from stabkit.identification.form.normal_form import NormalForm
from stabkit.identification.form.operations import ADDS, MOVES, SCALES, has_matrix
from stabkit.tracing.graph.values import Value, meta_of, operation
from stabkit.vocabulary import is_activation, norm_of

_ROUNDING = 1e-5  # by which a sigmoid in single precision, or one that is interpolated, may leave its range

_JOINS = frozenset({"Stack", "Cat"})  # of one tensor alone, these are moves


def is_memory_cell(form: NormalForm) -> bool:
    """Whether one state is kept by a gate between 0 and 1, and the other is a gate times what is made of it alone.

    Args:
        form: the normal form of a step of two states.
    """
    if len(form.sources) != 2:
        return False
    for c, h in ((0, 1), (1, 0)):
        kept, old = form.forms[c].get(form.sources[c]), form.forms[h].get(form.sources[h])
        if kept is None or kept.kind != "gate" or (old is not None and (old.value, old.low, old.high) != (0, 0, 0)):
            continue  # what is carried on of the output, but by a mask
        if kept.low >= -_ROUNDING and kept.high <= 1 + _ROUNDING:
            cells = _chosen(form, form.targets[c]) if old else _moved(form, form.targets[c])
            outputs = _chosen(form, form.targets[h]) if old else [form.targets[h]]
            if any(_is_read_out(form, value, cells) for value in outputs) or _is_read_out_next(form, c, h):
                return True
    return False


def _chosen(form: NormalForm, value: Value) -> list[Value]:
    """A value, and those between which a mask chooses for each of its rows."""
    found, stack = list[Value](), [value]
    while stack:
        v = stack.pop()
        given = form.piece.inputs(v.node) if v not in form.piece.ends else []
        found.append(v)
        if operation(v.node) in ADDS | {"Where"} or (len(given) == 1 and operation(v.node) in SCALES):
            stack.extend(given)
    return found


def _moved(form: NormalForm, value: Value) -> list[Value]:
    """A value, and what it is by moves alone; of several layers it is stacked, of one layer alone."""
    found = [value]
    while operation(found[-1].node) in MOVES | _JOINS and len(given := form.piece.inputs(found[-1].node)) == 1:
        found.append(given[0])
    return found


def _is_read_out(form: NormalForm, value: Value, cells: Collection[Value]) -> bool:
    """Whether a value is o phi(c'), or a projection of that."""
    inputs = form.piece.inputs
    while True:
        name, given = operation(value.node), inputs(value.node)
        if name == "Mul" and len(given) == 2:
            break
        if len(given) != 1 or not (name in MOVES | _JOINS or has_matrix(value.node)):
            return False
        value = given[0]
    return any(_is_share(gate) and _is_made_of_cell(form, carried, cells) for gate, _, carried in _factors(form, value))


def _is_read_out_next(form: NormalForm, cell: int, gate: int) -> bool:
    """Whether a step begins with o phi(c), as where it is cut between the output gate and its product."""
    c, o = form.sources[cell], form.sources[gate]
    readers = [node for node in form.piece.nodes if o in form.piece.inputs(node)]
    found = [
        any(_is_share(factor) and of == o and _is_made_of_cell(form, carried, [c])
            for factor, of, carried in _factors(form, Value(node, 0)))
        for node in readers
    ]  # fmt: skip
    return bool(found) and all(found)


def _factors(form: NormalForm, value: Value) -> list[tuple[Tensor | None, Value, Value]]:
    """Either factor of a product, as a number and where it is made, with the other one."""
    given, node = form.piece.inputs(value.node), value.node
    if operation(node) != "Mul" or len(given) != 2:
        return []
    saved = [getattr(node, f"_saved_{side}", None) for side in ("self", "other")]
    return [(saved[0], given[0], given[1]), (saved[1], given[1], given[0])]


def _is_share(gate: Tensor | None) -> bool:
    """Whether all entries of a factor lie between 0 and 1."""
    return gate is not None and bool(((gate >= -_ROUNDING) & (gate <= 1 + _ROUNDING)).all())


def _is_made_of_cell(form: NormalForm, value: Value, cells: Collection[Value]) -> bool:
    """Whether a value is made of the new cell by activations, norms and moves alone."""
    inputs = form.piece.inputs
    stack, met = [value], False
    while stack:
        v = stack.pop()
        if v in cells:
            met = True
            continue
        name = operation(v.node)
        known = name in MOVES | ADDS or is_activation(v.node) or norm_of(v.node) is not None
        if v in form.piece.ends or not known or meta_of(v).numel != meta_of(form.targets[0]).numel:
            return False
        stack.extend(inputs(v.node))
    return met
