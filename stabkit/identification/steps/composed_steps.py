"""Steps after each other that make one composition: leapfrogs of several sizes, one of them backward."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from stabkit.identification.form.flow_index import Surroundings
from stabkit.identification.form.tableau import Blocks
from stabkit.identification.names.compositions import Shear, is_composition, may_be_known, merged, shears
from stabkit.identification.names.single import CLOSE
from stabkit.identification.record import Identification
from stabkit.identification.steps.forks_and_joins import holds_a_step
from stabkit.integrators import GeneralLinearMethod

_FEW = 4  # states of which every order is tried
_LONGEST = 8  # steps in a composition; Yoshida's of order 6 takes seven leapfrogs
_SECOND_ORDER = "x'' = f(x)"  # systems whose force is multiplied by h^2

LEAPFROG_OR = "leapfrog, or additive couplings in turn"  # one map: which is meant shows in how it begins, if at all
_KICK = "additive coupling"
_DRIFT_AND_KICK = (
    "symplectic Euler (Hamiltonian)", "symplectic Euler (position, velocity)",
    "reversible (two-stream symplectic Euler)",
)  # fmt: skip

Reader = Callable[[int, int], Identification]


def with_compositions(records: Sequence[Identification], read: Reader) -> list[Identification]:
    """Records, those of steps that make one composition taken together.

    Args:
        records: the readings of consecutive steps.
        read: the reading of some steps, by their first and one past their last.
    """
    known = [_shears(record) for record in records]
    found: list[Identification] = []
    i = 0
    while i < len(records):
        whole = _composition(records, known, i, read)
        found.append(records[i] if whole is None else whole)
        i += 1 if whole is None else sum(record.steps[0] in whole.steps for record in records)
    return found


def _composition(
    records: Sequence[Identification], known: Sequence[tuple[Shear, ...]], first: int, read: Reader
) -> Identification | None:
    """The record of a composition that begins with one of some records; None where none does."""
    sequence: list[Shear] = []
    for last in range(first, min(first + _LONGEST, len(records))):
        if not known[last]:
            return None
        sequence += known[last]
        if last > first and may_be_known(merged(sequence, 0.0)):
            whole = read(records[first].steps[0], records[last].steps[-1] + 1)
            if is_composition(whole.name) or whole.name == "stormer_verlet":  # so that all of it evaluates one field
                return whole
    return None


def with_first_rounds(records: Sequence[Identification]) -> list[Identification]:
    """Records, the first of a method named as the next one where it does the same to its states in another order.

    States stand in the order in which they were made, and what a method starts with may be made in another than what
    it hands on: a velocity is computed from the position first, and before it in every step.
    """
    found = list(records)
    for i in reversed(range(len(found) - 1)):
        record, after = found[i], found[i + 1]
        ours, theirs = _table(record), _table(after)
        if ours is None or theirs is None or record.name == after.name or ours.V.shape != theirs.V.shape:
            continue
        orders = itertools.permutations(range(len(ours.V))) if len(ours.V) <= _FEW else ()
        if any(_is_same(ours, theirs, list(order)) for order in orders):
            scale = _unit(after) / _unit(record)
            recorded = tuple(None if field is None else field.times(scale) for field in record.recorded)
            found[i] = replace(after, steps=record.steps, residual=record.residual, checks=record.checks,
                               recorded=recorded, over_time=record.over_time)  # fmt: skip
    return found


def with_halved_starts(records: Sequence[Identification]) -> list[Identification]:
    """Records, those that may be a leapfrog or couplings named as the first where a step of half the size begins them.

    The two-step midpoint rule, x_(n+1) = x_(n-1) + 2 h f(x_n), is started by a step of Euler's with h (Chang et al.
    2018). Couplings of two streams, which are the same map, have no reason for half a field at their beginning.
    """
    found = list(records)
    for i, (record, after) in enumerate(itertools.pairwise(records)):
        h, begins = record.step_size or 0.0, record.notes[:1] and "begin as one" in record.notes[0]
        if not (record.name.startswith(LEAPFROG_OR) and begins) or abs(2 * h - (after.step_size or 0.0)) > CLOSE * h:
            continue
        why = "the start of the two-step midpoint rule: half of the number that multiplies the next branches: a fork"
        told = "h: the number that multiplies the branch"
        found[i] = replace(record, name="forward Euler", step_size=2 * h, convention=told, system="x' = f(x)",
                           notes=(why, *record.notes[1:]))  # fmt: skip
        run = itertools.takewhile(lambda r: r.name.startswith(LEAPFROG_OR), records[i + 1 :])
        for place, other in enumerate(run, i + 1):
            system = "x' = f(x, t), two-step midpoint rule, weights of its own at each step"
            found[place] = replace(other, name="leapfrog", system=system)
    return found


def with_half_kicks(records: Sequence[Identification], around: Surroundings) -> list[Identification]:
    """Records, those of drifts and kicks of one size behind a kick of half of it named as the leapfrog they make.

    After half a kick the velocity lies between two positions, and symplectic Euler steps are those of Verlet's method.
    """
    found = list(records)
    for i, record in enumerate(records[:-1]):
        half = 2 * abs(record.step_size or 0.0)
        if not record.name.startswith(_KICK) or not half:
            continue
        kicks = _numbers(around, record, behind=False)
        for j in range(i + 1, len(records)):
            step = records[j]
            if _closes(around, step, kicks, half):
                why = (
                    f"a drift, and half a kick as the one that began (step {record.steps[0]}): the end of the leapfrog"
                )
                found[j] = replace(step, name="stormer_verlet (leapfrog, drift and closing half kick)",
                                   system=records[i + 1].system, notes=(why, *step.notes))  # fmt: skip
                break
            alike = step.name == records[i + 1].name and abs(abs(step.step_size or 0.0) - half) <= CLOSE * half
            if not alike or not step.name.startswith(_DRIFT_AND_KICK):
                break
            is_end = holds_a_step(step)  # of the number that the ones before it have
            whole = {} if is_end else _numbers(around, step, behind=True)
            if not is_end and not any(
                abs(c - 2 * kicks[key]) <= CLOSE * abs(c) for key, c in whole.items() if key in kicks
            ):
                break
            why = f"half a kick before (step {record.steps[0]}) puts p between two q: {step.name} is then the leapfrog"
            found[j] = replace(step, name="stormer_verlet (leapfrog, cut after a half kick)", notes=(why, *step.notes))
    return found


def _closes(around: Surroundings, step: Identification, kicks: dict[tuple[object, ...], float], half: float) -> bool:
    """Whether a last step drifts by a whole step, twice that of the kick that began, and kicks as that one does."""
    if not (step.name.startswith((*_DRIFT_AND_KICK, _KICK)) and holds_a_step(step)):
        return False
    drifts = [abs(c) for key, c in _numbers(around, step, behind=False).items() if key not in kicks]
    last = _numbers(around, step, behind=True)
    kicked = any(abs(c - kicks[key]) <= CLOSE * abs(c) for key, c in last.items() if key in kicks)
    return kicked and bool(drifts) and all(abs(c - half) <= CLOSE * half for c in drifts)


def _numbers(around: Surroundings, record: Identification, *, behind: bool) -> dict[tuple[object, ...], float]:
    """What multiplies each field in the new states, by its weights; ``behind``: of those that read another one."""
    start, stop = record.steps[0], record.steps[-1] + 1
    form = around.normal_form(start, stop, around.slots(start, stop))
    made = {stage.output for stage in form.stages}
    last = [s for s in form.stages if any(not made.isdisjoint(terms) for terms in s.inputs)]
    read = last if behind and last else form.stages
    given = [(s.key, terms[s.output].value) for s in read for terms in form.forms if s.output in terms]
    return {key: sum(c for k, c in given if k == key) for key, _ in given}


def _is_same(ours: Blocks, theirs: Blocks, order: list[int]) -> bool:
    pairs = ((ours.A, theirs.A), (ours.U[:, order], theirs.U), (ours.B, theirs.B), (ours.V[:, order], theirs.V))
    return ours.A.shape == theirs.A.shape and all(np.allclose(a, b, atol=CLOSE) for a, b in pairs)


def _unit(record: Identification) -> float:
    """What multiplies the eigenvalue of a field in z."""
    h = record.step_size or 1.0
    return h * h if record.system == _SECOND_ORDER else h


def _table(record: Identification) -> Blocks | None:
    """The tableau of a record of several states that is proven, with its step size; None for others."""
    method = record.method
    if not isinstance(method, GeneralLinearMethod) or method.states < 2 or record.evidence != "proven":
        return None
    unit = _unit(record)
    A, B = np.asarray(method.A) * unit, np.asarray(method.B) * unit
    return Blocks(A, np.asarray(method.U), B, np.asarray(method.V), tuple(method.fields), ())


def _shears(record: Identification) -> tuple[Shear, ...]:
    """The kicks and drifts of a step that has a method of two states; empty for others."""
    table = _table(record) if record.step_size else None
    return () if table is None or len(table.V) != 2 else shears(table) or ()
