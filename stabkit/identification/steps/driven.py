"""What drives a state from outside: an input that is held fixed, and is no column of a tableau."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from stabkit.identification.form.chain import Link
from stabkit.identification.form.normal_form import NormalForm
from stabkit.tracing.graph.values import Value


def weights_of_inputs(links: Sequence[Link], states: Collection[Value]) -> tuple[float, ...]:
    """The numbers with which a state takes what inputs alone make, in each of its additions.

    Args:
        links: from the old to the new value of a state.
        states: the values of all states, those of others being held fixed as inputs are.
    """
    return tuple(
        c.value
        for link in links
        if link.kind == "sum"
        for atom, c in link.form.forms[0].items()
        if c.kind == "scalar" and _is_of_inputs(link.form, atom, states)
    )


def _is_of_inputs(form: NormalForm, atom: Value, states: Collection[Value]) -> bool:
    """Whether a term is made of values that are held fixed and are no states, and of nothing else."""
    stack, seen = [atom], set[Value]()
    while stack:
        value = stack.pop()
        if value in seen:
            continue
        seen.add(value)
        if value in states or value in form.piece.sources:
            return False
        if value not in form.piece.contexts:
            stack.extend(form.piece.inputs(value.node))
    return True
