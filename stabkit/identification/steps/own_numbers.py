"""Branches whose entries are multiplied by a number each, such as LayerScale's: the numbers belong to the field.

g * f(x) is a field of its own, and a tableau with the mean of g in it is that of no step: what is left in the tableau
is one, or by how much one use of a field is the multiple of another.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from stabkit.identification.form.coefficients import Coefficient
from stabkit.identification.form.flow_index import Surroundings
from stabkit.identification.form.normal_form import NormalForm, Terms
from stabkit.identification.form.tableau import Blocks
from stabkit.tracing.graph.values import Value, meta_of

_SAME = 1e-5  # products of several numbers of single precision
_GONE = 1e-3  # a mean this far below the numbers is the rest of what cancels, and no unit


def without_own_numbers(around: Surroundings, parts: Sequence[tuple[NormalForm, Blocks]]) -> tuple[list[Blocks], bool]:
    """The tableaus of some additions with the numbers of single entries taken into the fields.

    Args:
        around: the flow.
        parts: every addition with its tableau, which holds the mean of such numbers.

    Returns:
        The tableaus, and whether means are left in them: uses of one field with numbers that are no multiples of each
        other, a skip that has a number for each entry, and numbers that another input makes stay as they are.
    """
    counts: Counter[object] = Counter(stage.key for form, _ in parts for stage in form.stages)
    uses: dict[object, list[Coefficient]] = {}
    for form, _ in parts:
        for stage in form.stages:
            uses.setdefault(stage.key, []).extend(_uses(form, stage.output))
    scaled = {key for key, found in uses.items() if any(c.kind == "diagonal" for c in found)}
    ends = [c for form, _ in parts for a, c in form.forms[0].items() if a in form.sources]
    fed = bool(around.flow.side_inputs) and any(around.has_fed_factor(form.piece) for form, _ in parts)
    tables = [table for _, table in parts]
    if not scaled or fed or any(c.kind != "scalar" for c in ends):
        return tables, bool(scaled)
    sizes = {
        (s.key, meta_of(s.output).numel == meta_of(form.targets[0]).numel) for form, _ in parts for s in form.stages
    }
    entries = {key for key in scaled if (key, False) not in sizes}  # several copies of a batch add up to one value
    multiples = {key for key in entries if all(_is_multiple(c, uses[key][0]) for c in uses[key])}
    units: dict[object, float] = {}
    for i, (form, _) in enumerate(parts):
        tables[i] = _with_units(tables[i], form, multiples, uses, counts, units)
    return tables, multiples != scaled


def _with_units(
    table: Blocks,
    form: NormalForm,
    multiples: set[object],
    uses: dict[object, list[Coefficient]],
    counts: Counter[object],
    units: dict[object, float],
) -> Blocks:
    A, B, recorded = table.A.copy(), table.B.copy(), list(table.recorded)
    for key in multiples:
        columns = [j for j, stage in enumerate(table.rows) if stage.key == key]
        if not columns:
            continue
        largest = max(max(abs(c.low), abs(c.high)) for c in uses[key])
        total = float(B[0, columns].sum()) or float(A[:, columns].sum())
        unit = units.setdefault(key, total)
        if abs(unit) > _GONE * largest:
            A[:, columns], B[:, columns] = A[:, columns] / unit, B[:, columns] / unit
        elif len(uses[key]) == 1 == counts[key] and any(
            stage.key == key and stage.output in form.forms[0] for stage in form.stages
        ):
            B[0, columns], unit = 1.0, 0.0
        else:
            continue
        for j in columns if recorded else ():
            field = recorded[j]
            recorded[j] = None if field is None or not unit else field.times(unit)
    return replace(table, A=A, B=B, recorded=tuple(recorded))


def _uses(form: NormalForm, output: Value) -> Iterator[Coefficient]:
    """The numbers with which a stage enters new states, and stages beside something else."""
    inputs: list[Terms] = [terms for stage in form.stages for terms in stage.inputs if _beside(form, terms)]
    return (terms[output] for terms in (*form.forms, *inputs) if output in terms)


def _beside(form: NormalForm, terms: Terms) -> bool:
    """Whether the input of a stage is made of several things: a factor before a single one belongs to its field."""
    return sum(atom not in form.piece.contexts for atom in terms) > 1


def _is_multiple(c: Coefficient, other: Coefficient) -> bool:
    """Whether the numbers of entries are the same multiple of others, as far as mean, first, least and largest tell."""
    if c.kind != "diagonal" or other.kind != "diagonal" or c.sample is None or other.sample is None:
        return False
    ours, theirs = (np.array([d.value, d.sample, d.low, d.high]) for d in (c, other))
    largest = int(np.abs(theirs).argmax())
    for turned in (theirs, theirs[[0, 1, 3, 2]]):
        r = ours[largest] / turned[largest] if turned[largest] else np.inf
        turns = (r < 0) == (turned is not theirs)
        if turns and np.allclose(ours, r * turned, atol=_SAME * float(np.abs(ours).max())):
            return True
    return False


def states_in_fields(forms: Sequence[NormalForm], table: Blocks) -> Blocks:
    """The tableau where a stage that reads the state times a number for each entry reads no state: the field does.

    f(k + D x) with a diagonal D is a field of x and k, and evaluates nothing at a state that others have moved.
    """
    own = {
        id(stage)
        for form in forms
        for stage in form.stages
        for terms in stage.inputs
        if len(terms) > 1 and any(a in form.sources and c.kind == "diagonal" for a, c in terms.items())
    }
    rows = [i for i, stage in enumerate(table.rows) if id(stage) in own]
    if not rows:
        return table
    U = table.U.copy()
    U[rows] = 0.0
    return replace(table, U=U)
