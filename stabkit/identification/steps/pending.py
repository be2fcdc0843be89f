"""A state that is carried as several values, of which only one combination is ever read: it and its pending increment.

Fused norms take a branch and the residual stream before it, add both, and hand on the sum: (h, r) becomes
(f(n(r + h)), r + h). Nothing reads h or r but as r + h, so there is no memory of the increment: x = r + h is the state,
and x' = x + f(n(x)) its step. Momentum reads the increment by itself, and leapfrog the older state.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from stabkit.identification.form.flow_index import Surroundings
from stabkit.identification.form.formed_ahead import as_made
from stabkit.identification.form.normal_form import NormalForm
from stabkit.identification.form.slots import Slots
from stabkit.identification.form.tableau import Blocks, Matrix, blocks
from stabkit.identification.names.single import CLOSE, Name, name_one_state
from stabkit.identification.record import Identification, record_of
from stabkit.identification.steps.forks_and_joins import changes_count, inside
from stabkit.integrators import GeneralLinearMethod

_KINDS = frozenset({"scalar", "dropout"})  # numbers that are the same for every entry and every input


def name_pending(found: Blocks, form: NormalForm) -> Name | None:
    """The name of a step of several values that are one state and its pending increment; None for others."""
    coefficients = [c for terms in form.forms for c in terms.values()]
    read = combination(found.U, found.V) if all(c.kind in _KINDS for c in coefficients) else None
    return None if read is None else _name(_in_one_state(found, read, read))


def combination(U: Matrix, V: Matrix) -> Matrix | None:
    """The one combination of several old states that stages and new states read; None where they read others.

    It reads two states at least: a state that nothing reads is no part of another.
    """
    if V.shape[1] < 2 or not len(U) or not U.any(axis=1).all() or not V.any():
        return None
    rows = np.vstack([U, V])
    of = np.asarray(U[0], dtype=float)
    along = np.outer(rows @ of / (of @ of), of)
    alike = np.allclose(rows, along, atol=CLOSE * float(np.abs(rows).max()))
    return of if alike and np.count_nonzero(of) > 1 else None


def _in_one_state(found: Blocks, read: Matrix | None, made: Matrix) -> Blocks:
    """The tableau of the combination: old states as they are ``read``, new ones put together as they are ``made``."""
    u, v = found.U, found.V
    if read is not None:
        u, v = ((block @ read / (read @ read))[:, None] for block in (u, v))
    return replace(found, U=u, B=made[None] @ found.B, V=made[None] @ v)


def _name(found: Blocks) -> Name | None:
    """The name of the tableau of the combination; None where it has none."""
    whole = abs(float(found.V[0, 0]) - 1) <= CLOSE and np.allclose(found.U, 1, atol=CLOSE)
    in_turn = whole and np.allclose(found.A, np.tril(np.tile(found.B, (len(found.A), 1)), -1), atol=CLOSE)
    if len(found.rows) > 1 and in_turn and len(found.rows) == found.n_fields:
        first = name_one_state(Blocks(np.zeros((1, 1)), np.ones((1, 1)), found.B[:, :1], found.V, (0,), found.rows[:1]))
        same = np.allclose(found.B, found.B[0, 0], atol=CLOSE)
        told = "" if same else f", h = {', '.join(f'{h:.3g}' for h in found.B[0])}"
        text = f"Lie splitting ({len(found.rows)} Euler steps{told})"
        return replace(first, name=text, system="x' = f_1(x) + f_2(x) + ..., one after the other")
    name = name_one_state(found)
    return name if name.is_known and len(found.rows) else None


def told_of(states: int) -> str:
    """What is said of a step of several values that are one state."""
    return f"the {states} values are one state and its pending increment: nothing reads them but in one combination"


def with_pending_starts(records: Sequence[Identification], around: Surroundings) -> list[Identification]:
    """Records, those of steps that hand on their first increment beside the state as what is made of both in the next.

    Args:
        records: the readings of consecutive steps.
        around: the flow.
    """
    found = list(records)
    for i, (record, behind) in enumerate(itertools.pairwise(records)):
        if changes_count(record):
            found[i] = _begun(around, record, behind) or record
    return found


def _begun(around: Surroundings, record: Identification, behind: Identification) -> Identification | None:
    """The record of the step at which an increment is first left pending; None where the next reads none."""
    start, stop = record.steps[0], record.steps[-1] + 1
    ours, theirs = around.slots(start, stop), around.slots(stop, behind.steps[-1] + 1)
    if not isinstance(behind.method, GeneralLinearMethod) or len(ours.sources) != 1:
        return None
    method, states = behind.method, len(theirs.sources)
    if method.states != states or as_made(around, theirs, stop, behind.steps[-1] + 1) != theirs:
        return None
    read = combination(np.array(method.U, dtype=float), np.array(method.V, dtype=float))
    known = {*around.flow.states[start].values, *around.flow.states[stop].values}
    if read is None or not known.issuperset(theirs.sources):
        return None
    form = around.normal_form(start, stop, Slots(ours.sources, theirs.sources, ours.contexts, split=False))
    table = blocks(form, ours.contexts, any_count=True)
    coefficients = [c for terms in form.forms for c in terms.values()]
    if table is None or any(c.kind not in _KINDS for c in coefficients):
        return None
    one = _in_one_state(table, None, read)
    named = _name(one)
    if named is None:
        return None
    residual = max((c.residual for c in coefficients), default=0.0)
    better = record_of(named, one, record.steps, skip=None, residual=residual)
    why = "the first step of its kind: its increment is handed on beside the state, and added in the next: a fork"
    return replace(inside(better, why), over_time=record.over_time)
