"""Products of fields with increments that are given to the model: the diffusion of dx = f(x) dt + g(x) dW.

They are no fields of the method, and what was kept of a diffusion for the next step is no state of it: without both,
its tableau is that of the drift (Kidger et al. 2021 solve with increments that are drawn beforehand).
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace

import numpy as np

from stabkit.identification.form.coefficients import Coefficient
from stabkit.identification.form.normal_form import NormalForm, Stage
from stabkit.identification.form.operations import MOVES, PRODUCTS
from stabkit.identification.form.tableau import Blocks
from stabkit.identification.names.single import Name
from stabkit.tracing.graph.values import Value, operation

_MULTIPLIES = PRODUCTS | MOVES | {"Bmm", "Mm", "Mv", "Sum"}


def without_increments(
    found: Blocks, form: NormalForm, contexts: Collection[Value], is_learned: Callable[[Value], bool]
) -> Blocks | None:
    """The tableau of the drift alone; None where nothing that is given multiplies a field.

    Numbers of both signs, one for every entry, are given as well: no time step is positive here and negative there.

    Args:
        found: the whole tableau.
        form: what it is that of.
        contexts: what is held fixed.
        is_learned: whether learned numbers multiply what an atom gives to a new state, which are no increments.
    """
    uses: dict[Value, list[tuple[int | None, Coefficient]]] = {}
    rows = [*enumerate(form.forms), *((None, terms) for stage in form.stages for terms in stage.inputs)]
    for place, terms in rows:
        for atom, coefficient in terms.items():
            uses.setdefault(atom, []).append((place, coefficient))
    held = [j for j, v in enumerate(form.sources) if all(_is_given(c) for _, c in uses.get(v, [])) and v in uses]
    drawn = {a for a, taken in uses.items() if all(place in held or _is_given(c) for place, c in taken)}
    if any(map(is_learned, (*drawn, *(form.sources[j] for j in held)))):
        return None
    kept = [i for i, s in enumerate(found.rows) if s.output not in drawn and not _is_increment(s, contexts)]
    if len(kept) in (0, len(found.rows)):
        return None
    U, V = found.U.copy(), found.V.copy()
    U[:, held] = V[:, held] = 0.0  # what is kept of a diffusion
    found = replace(found, U=U, V=V)
    rest = found.of_rows(kept).without_unread()
    read = [j for j in range(len(rest.V)) if rest.U[:, j].any() or np.delete(rest.V[:, j], j).any()]
    while 0 < len(read) < len(rest.V):
        rest = replace(rest, U=rest.U[:, read], B=rest.B[read], V=rest.V[np.ix_(read, read)]).without_unread()
        read = [j for j in range(len(rest.V)) if rest.U[:, j].any() or np.delete(rest.V[:, j], j).any()]
    return rest


def _is_given(coefficient: Coefficient) -> bool:
    return coefficient.kind == "diagonal" and coefficient.low < 0 < coefficient.high


def _is_increment(stage: Stage, contexts: Collection[Value]) -> bool:
    """Whether a stage multiplies a combination of states and fields by what is held fixed, and nothing else."""
    held = [bool(terms) and all(atom in contexts for atom in terms) for terms in stage.inputs]
    return any(held) and not all(held) and all(operation(node) in _MULTIPLIES for node in stage.nodes)


def with_increments(name: Name) -> Name:
    """What a method of the drift is called beside such products."""
    told = f"{name.name}, and products with increments that are given"
    return replace(name, name=told, system=f"{name.system}; with the products it is dx = f dt + g dW")
