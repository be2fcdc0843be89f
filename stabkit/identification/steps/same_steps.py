"""Whether a step does what another one does to its states, where some of these are constants, or one value."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence

from stabkit.identification.form.coefficients import Coefficient
from stabkit.identification.form.normal_form import NormalForm, Stage, Terms
from stabkit.identification.form.operations import MOVES
from stabkit.identification.names.single import CLOSE
from stabkit.tracing.graph.values import Value, meta_of, operation


def number_beside(
    ours: NormalForm,
    theirs: NormalForm,
    places: Mapping[Value, Value | None],
    made: Mapping[Value, Value],
    contexts: Collection[Value],
    *,
    kick: bool,
) -> float | None:
    """The number that multiplies our fields beside theirs, where all else is the same; None where it is not.

    Args:
        ours: from the values at hand to new states.
        theirs: from old states to new ones.
        places: which of the values at hand each old state is; None for a constant.
        made: our new state for each of theirs.
        contexts: what we hold fixed: how a field reads it is its own.
        kick: whether one field may be multiplied by another number although it is shared.
    """
    stages = _matched(ours.stages, theirs.stages, places)
    if stages is None:
        return None
    known = {**places, **{s.output: o.output for s, o in stages}}
    outputs = {o.output for _, o in stages}
    scales: dict[Value, float] = {}
    forms = {t: _without(terms, contexts) for t, terms in zip(ours.targets, ours.forms, strict=True)}
    rows = [(forms[made[t]], terms) for t, terms in zip(theirs.targets, theirs.forms, strict=True)]
    for row, terms in rows:
        if not _rows_agree(row, _placed(terms, known), outputs, scales):
            return None
    counts = Counter(stage.key for stage in ours.stages)
    for their, our in stages:
        inputs = [placed for terms in their.inputs if (placed := _placed(terms, known)) != {}]
        mine = [left for terms in our.inputs if (left := _without(terms, contexts))]
        if None in inputs or not _inputs_agree(mine, inputs, outputs, scales, shared=counts[our.key] > 1):
            return None
    numbers = list(scales.values())
    if not numbers or max(numbers) - min(numbers) > CLOSE * max(map(abs, numbers)):
        return None
    return numbers[0] if abs(numbers[0] - 1) <= CLOSE or _may_differ(ours, theirs, stages, kick=kick) else None


def _may_differ(ours: NormalForm, theirs: NormalForm, stages: Sequence[tuple[Stage, Stage]], *, kick: bool) -> bool:
    """Whether the number before a field may be another one: one is written, and each field has weights of its own.

    A number before a field that both evaluate is the step size, and only one kick alone may be of another size.
    """
    shared = any(their.key == our.key for their, our in stages)
    written = all(_read_by(ours, our.output) == _read_by(theirs, their.output) for their, our in stages)
    return written and (not shared or (kick and len(stages) == 1))


def _read_by(form: NormalForm, value: Value) -> Counter[str]:
    """The operations that read a value."""
    return Counter(operation(node) for node in form.piece.nodes if value in form.piece.inputs(node))


def _without(terms: Terms, contexts: Collection[Value]) -> Terms:
    return {a: c for a, c in terms.items() if a not in contexts}


def _matched(
    ours: Sequence[Stage], theirs: Sequence[Stage], places: Mapping[Value, Value | None]
) -> list[tuple[Stage, Stage]] | None:
    """Their stages with ours, in order, without those of theirs that see constants alone; None where they differ."""
    constant = {v for v, image in places.items() if image is None}
    left: list[Stage] = []
    for stage in theirs:
        if stage.inputs and all(terms.keys() <= constant for terms in stage.inputs):
            constant.add(stage.output)
        else:
            left.append(stage)
    if len(left) != len(ours) or not ours:
        return None
    pairs = list(zip(left, ours, strict=True))
    return pairs if all(_are_alike(a, b) for a, b in pairs) else None


def _are_alike(their: Stage, our: Stage) -> bool:
    """Whether a stage does the operations of another, or fewer of several values of which some are constants."""
    a, b = (Counter(op for node in s.nodes if (op := operation(node)) not in MOVES) for s in (their, our))
    same_shape = meta_of(their.output).shape == meta_of(our.output).shape
    return same_shape and (a == b or (len(their.inputs) > len(our.inputs) and b <= a))


def _placed(terms: Terms, known: Mapping[Value, Value | None]) -> dict[Value, float] | None:
    """Terms by our values, without constants; None where a coefficient is no number."""
    found: dict[Value, float] = {}
    for atom, coefficient in terms.items():
        image = known.get(atom)
        if image is not None:
            if not _is_number(coefficient):
                return None
            found[image] = found.get(image, 0.0) + coefficient.value
    return found


def _is_number(coefficient: Coefficient) -> bool:
    """Whether it is one number, also where a value is spread over more entries."""
    spread = coefficient.kind == "part" and coefficient.low == coefficient.high
    return coefficient.kind == "scalar" or spread


def _rows_agree(
    mine: Terms, theirs: dict[Value, float] | None, outputs: Collection[Value], scales: dict[Value, float]
) -> bool:
    """Whether two combinations are the same but for what multiplies each stage, which is noted."""
    if theirs is None or not all(map(_is_number, mine.values())):
        return False
    largest = max((abs(x) for x in theirs.values()), default=1.0)
    theirs = {a: x for a, x in theirs.items() if abs(x) > CLOSE * largest}
    if {a for a, c in mine.items() if abs(c.value) > CLOSE * largest} != theirs.keys():
        return False
    for atom, number in theirs.items():
        if atom in outputs:
            scale = mine[atom].value / number
            if abs(scales.setdefault(atom, scale) - scale) > CLOSE * abs(scale):
                return False
        elif abs(mine[atom].value - number) > CLOSE * largest:
            return False
    return True


def _inputs_agree(
    mine: Sequence[Terms],
    theirs: Sequence[dict[Value, float] | None],
    outputs: Collection[Value],
    scales: dict[Value, float],
    *,
    shared: bool,
) -> bool:
    """Whether a stage is evaluated where another is; a number before the one value that it reads belongs to it."""
    left = [t for t in theirs if t is not None]
    different: list[dict[Value, float]] = []
    for terms in left:
        if terms not in different:
            different.append(terms)
    ours = {tuple((a, c.value) for a, c in terms.items()): terms for terms in mine}  # a row of nodes along two axes
    if len(ours) != len(different):
        return False
    for own, terms in zip(ours.values(), different, strict=True):
        if not shared and len(own) == 1 and own.keys() == terms.keys():
            continue
        if not _rows_agree(own, terms, outputs, scales):
            return False
    return True
