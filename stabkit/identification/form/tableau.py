"""The general linear method of an affine normal form, before a step size makes it a textbook one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from stabkit.identification.fields.recorded_fields import RecordedField, recorded_field, together
from stabkit.identification.form.coefficients import Coefficient
from stabkit.identification.form.normal_form import NormalForm, Stage, Terms
from stabkit.identification.form.operations import MOVES
from stabkit.integrators import GeneralLinearMethod
from stabkit.tracing.graph.values import Value, operation, outputs_of

Matrix = npt.NDArray[np.float64]
_ZERO = 1e-6  # of weights in single precision
#: Coefficients between states that a scalar test problem can stand for.
_NUMBERS = frozenset({"scalar", "diagonal", "gate", "dropout", "masked", "samples"})  # of noise the mean is no skip


@dataclass(frozen=True, eq=False)
class Blocks:
    """The tableau before a step size is chosen.

    Attributes:
        A: stage from stage; one row for every input of every stage.
        U: stage from state.
        B: state from stage.
        V: state from state.
        fields: the field of every row; rows of one field share weights.
        rows: the stage behind every row.
        recorded: where the field of every row was recorded.
        guided: the weights of several calls of one network at one point that make one field; empty for others.
    """

    A: Matrix
    U: Matrix
    B: Matrix
    V: Matrix
    fields: tuple[int, ...]
    rows: tuple[Stage, ...]
    recorded: tuple[RecordedField | None, ...] = ()
    guided: tuple[float, ...] = ()

    @classmethod
    def single(cls, a: float) -> Blocks:
        """X' = a x + f(x), with a field of which nothing else is known."""
        one = np.ones((1, 1))
        return cls(0.0 * one, one, one, a * one, (0,), ())

    @classmethod
    def without_field(cls, a: float) -> Blocks:
        """X' = a x, and what does not depend on x."""
        return cls(np.zeros((0, 0)), np.zeros((0, 1)), np.zeros((1, 0)), a * np.ones((1, 1)), (), ())

    @property
    def n_fields(self) -> int:
        """How many different fields there are."""
        return len(set(self.fields))

    @property
    def shared(self) -> bool:
        """Whether several stages evaluate one field."""
        return len({id(stage) for stage in self.rows}) > self.n_fields

    @property
    def weights_shared(self) -> bool | None:
        """Whether stages evaluate one field; None for one stage, and where fields have some weights in common.

        Branches behind one norm, or with one projection of queries, are neither one field nor fields of their own.
        """
        stages = {id(stage): stage for stage in self.rows}.values()
        if self.shared or len(stages) < 2:
            return self.shared or None
        used = [{c for part in s.key if isinstance(part, tuple) for c in part[1]} for s in stages]
        apart = len(set().union(*used)) == sum(map(len, used)) and not any(s.opaque for s in stages)
        return False if apart else None

    def then(self, other: Blocks) -> Blocks:
        """This step followed by another; stages of one field share it across the two."""
        size, more = len(self.rows), len(other.rows)
        A = np.block([[self.A, np.zeros((size, more))], [other.U @ self.B, other.A]])
        rows = (*self.rows, *other.rows)
        seen: dict[object, int] = {}
        places = [*((self.rows, i) for i in range(size)), *((other.rows, i) for i in range(more))]
        fields = tuple(seen.setdefault((stages[i].key, _number(stages, i)), len(seen)) for stages, i in places)
        return Blocks(A, np.vstack([self.U, other.U @ self.V]), np.hstack([other.V @ self.B, other.B]),
                      other.V @ self.V, fields, rows, (*self.recorded, *other.recorded),
                      self.guided or other.guided)  # fmt: skip

    def without_unread(self) -> Blocks:
        """Without a stage that a zero multiplies wherever it is used, as the last one of Forest and Ruth."""
        kept = [j for j in range(len(self.rows)) if self.A[:, j].any() or self.B[:, j].any()]
        if len(kept) in (0, len(self.rows)):
            return self
        return self.of_rows(kept).without_unread()

    def of_rows(self, kept: Sequence[int]) -> Blocks:
        """Some rows alone, as if there were no others."""
        places = list(kept)
        recorded = tuple(self.recorded[j] for j in places) if self.recorded else ()
        return Blocks(self.A[np.ix_(places, places)], self.U[places], self.B[:, places], self.V,
                      tuple(self.fields[j] for j in places), tuple(self.rows[j] for j in places), recorded,
                      self.guided)  # fmt: skip

    def method(self, h: float) -> GeneralLinearMethod:
        """The method with z = h times the eigenvalue of a field's Jacobian."""
        return GeneralLinearMethod(_rows(self.A / h), _rows(self.U), _rows(self.B / h), _rows(self.V),
                                   fields=self.fields)  # fmt: skip

    def recorded_with(self, h: float) -> tuple[RecordedField | None, ...]:
        """Where h times the field of every row was recorded."""
        return tuple(None if field is None else field.times(h) for field in self.recorded)


def _number(stages: tuple[Stage, ...], i: int) -> int:
    """Which input of its stage a row is."""
    return sum(stage is stages[i] for stage in stages[:i])


def _rows(block: Matrix) -> list[list[float]]:
    return [[float(x) for x in row] for row in block]


def blocks(
    form: NormalForm,
    contexts: Collection[Value] = (),
    *,
    moves_cancel: bool = False,
    one_coordinate: bool = False,
    any_count: bool = False,
) -> Blocks | None:
    """The tableau of a normal form; None when a state does not reach the new states as a number times itself.

    Args:
        form: as many targets as sources that are no contexts; the first new state follows the first old one.
        contexts: values that are no states, but held fixed: the input of a recurrent network.
        moves_cancel: whether moved entries return to their places outside of this form.
        one_coordinate: take the first entry of every diagonal instead of the mean, for products of several diagonals.
        any_count: take more or fewer targets than sources as well: where states of a method begin or end.
    """
    states = list(form.sources)
    numbers_only = _NUMBERS | {"moved"} if moves_cancel else _NUMBERS
    if len(states) != len(form.targets) and not any_count:
        return None
    if any(a in states and c.kind not in numbers_only for terms in form.forms for a, c in terms.items()):
        return None
    contexts = held_with(form, contexts)
    counts = Counter(stage.key for stage in form.stages)
    rows: list[tuple[Stage, int]] = []
    noise = noise_of(form)
    for stage in form.stages:
        if stage.output not in noise:  # what drawn numbers multiply is zero in the mean
            rows += [(stage, i) for i, terms in enumerate(stage.inputs) if any(a not in contexts for a in terms)]
    size, r = len(rows), len(states)
    A, U = np.zeros((size, size)), np.zeros((size, r))
    B, V = np.zeros((len(form.targets), size)), np.zeros((len(form.targets), r))
    outputs = [stage.output for stage, _ in rows]
    for i, (stage, number) in enumerate(rows):
        inputs = _own(stage.inputs[number], contexts, shared=counts[stage.key] > 1, one_coordinate=one_coordinate)
        for atom, value in inputs.items():
            if atom in states:
                U[i, states.index(atom)] = value
            else:
                A[i, [j for j, output in enumerate(outputs) if output == atom]] = value
    for i, terms in enumerate(form.forms):
        for atom, coefficient in terms.items():
            if atom in states:
                V[i, states.index(atom)] = _number_of(coefficient, one_coordinate)
            elif atom not in contexts:
                B[i, [j for j, output in enumerate(outputs) if output == atom]] = _of_stage(coefficient, one_coordinate)
    if len(rows) > 1:
        for j, (stage, number) in enumerate(rows):  # W (c x) is c W x: of several branches one h may be written so
            factor = _before_linear(stage, stage.inputs[number], contexts) if counts[stage.key] == 1 else 1.0
            A[:, j], B[:, j] = factor * A[:, j], factor * B[:, j]
    before = [{**dict(zip(states, U[i], strict=True)), **dict(zip(outputs, A[i], strict=True))} for i in range(size)]
    calls = _calls_of_one_network([stage for stage, _ in rows], A, U, B)
    turned = {key for key, count in counts.items() if count > 1 and _is_turned(form, key)}
    for j in range(size):  # the sign of a field that is used once belongs to the field, as one that follows every use
        once = counts[rows[j][0].key] == 1 and not any(j in group for group in calls)
        if rows[j][0].key in turned or (once and B[B[:, j] != 0, j][:1].sum() < 0):
            A[:, j], B[:, j] = -A[:, j], -B[:, j]
    numbers: dict[tuple[object, ...], int] = {}
    fields = [numbers.setdefault((stage.key if counts[stage.key] > 1 else id(stage), i), len(numbers))
              for stage, i in rows]  # fmt: skip
    outs = [float(B[B[:, j] != 0, j][:1].sum()) for j in range(size)]
    fields_there = [recorded_field(form, *rows[j], before[j], out) for j, out in enumerate(outs)]
    recorded = tuple(  # a way that ends at a stage ends before the sign of its field
        field.times(-1.0) if field and not out and rows[j][0].key in turned else field
        for j, (field, out) in enumerate(zip(fields_there, outs, strict=True))
    )
    found = _without_twins(Blocks(A, U, B, V, tuple(fields), tuple(stage for stage, _ in rows), recorded))
    return _guided(found, calls) if calls and len(found.rows) == size else found


def _is_turned(form: NormalForm, key: tuple[object, ...]) -> bool:
    """Whether a field is taken with the other sign at once wherever it is used: minus a gradient is the field."""
    return all(_is_negated(form, stage.output) for stage in form.stages if stage.key == key)


def _is_negated(form: NormalForm, value: Value) -> bool:
    """Whether nothing reads a value but a change of sign, once its entries were laid out anew at most."""
    readers = [n for n in form.piece.nodes if value in form.piece.inputs(n)]
    while len(readers) == 1 and operation(readers[0]) in MOVES:
        (moved,) = readers
        readers = [n for n in form.piece.nodes if any(v in form.piece.inputs(n) for v in outputs_of(moved))]
    return [operation(n) for n in readers] == ["Neg"]


def held_with(form: NormalForm, contexts: Collection[Value]) -> frozenset[Value]:
    """What is held fixed, and the stages that nothing else is given to: several layers of an input are one input."""
    held = set(contexts)
    for stage in form.stages if held else ():
        if all(atom in held for terms in stage.inputs for atom in terms):
            held.add(stage.output)
    return frozenset(held)


def noise_of(form: NormalForm) -> frozenset[Value]:
    """What drawn numbers multiply wherever it is used: a diffusion, and what is made for it."""
    uses: dict[Value, list[tuple[Value | None, str]]] = {}
    rows = [(None, terms) for terms in form.forms]
    for user, terms in [*rows, *((stage.output, terms) for stage in form.stages for terms in stage.inputs)]:
        for atom, coefficient in terms.items():
            uses.setdefault(atom, []).append((user, coefficient.kind))
    found: set[Value] = set()
    for stage in reversed(form.stages):  # those that take a stage come behind it
        taken = uses.get(stage.output, [])
        if taken and all(kind == "noise" or user in found for user, kind in taken):
            found.add(stage.output)
    return frozenset(found)


def _calls_of_one_network(stages: Sequence[Stage], A: Matrix, U: Matrix, B: Matrix) -> list[tuple[int, ...]]:
    """Rows that evaluate one network anew at one point, with other values held fixed, and are used together.

    Wherever one of them enters, the others do with the same weights, which do not sum to zero; the weights are those
    of every such group, since they make one field. Parts of one evaluation, as a graph gives both ends of an edge, are
    fields by themselves.
    """
    groups: dict[object, list[int]] = {}
    for i, stage in enumerate(stages):
        groups.setdefault((network_of(stage), A[i].tobytes(), U[i].tobytes()), []).append(i)
    found: list[tuple[int, ...]] = []
    known: Matrix | None = None
    for group in groups.values():
        keys = {stages[i].key for i in group}
        apart = len(set().union(*(stages[i].nodes for i in group))) == sum(len(stages[i].nodes) for i in group)
        uses = np.concatenate([A[:, group], B[:, group]])
        largest = uses[np.abs(uses).sum(axis=1).argmax()]
        if len(group) < 2 or len(keys) < len(group) or not apart or abs(largest.sum()) <= _ZERO * np.abs(largest).max():
            continue
        weights = largest / largest.sum()
        together = np.allclose(uses, uses.sum(axis=1, keepdims=True) * weights, atol=_ZERO * np.abs(uses).max())
        if not together or (known is not None and (len(known) != len(weights) or not np.allclose(known, weights))):
            return []
        known = weights
        found.append(tuple(group))
    return found


def network_of(stage: Stage) -> tuple[object, ...]:
    """What two stages of one network have in common that give different things at one point."""
    return tuple(part for part in stage.key if not isinstance(part, int))


def _guided(found: Blocks, calls: Sequence[tuple[int, ...]]) -> Blocks:
    """Calls of one network at one point taken together, as one field: classifier-free guidance."""
    A, B, recorded = found.A.copy(), found.B.copy(), list(found.recorded)
    first = list(calls[0])
    uses = np.concatenate([A[:, first], B[:, first]])
    largest = uses[np.abs(uses).sum(axis=1).argmax()]
    for group in calls:
        i, rows = group[0], list(group)
        recorded[i] = together([recorded[j] for j in rows])
        A[:, i], B[:, i] = A[:, rows].sum(axis=1), B[:, rows].sum(axis=1)
    gone = {j for group in calls for j in group[1:]}
    kept = [i for i in range(len(found.rows)) if i not in gone]
    fields = tuple(found.fields[i] for i in kept)
    rows_kept, told = tuple(found.rows[i] for i in kept), tuple(recorded[i] for i in kept)
    weights = tuple(float(w) for w in largest / largest.sum())
    return Blocks(A[np.ix_(kept, kept)], found.U[kept], B[:, kept], found.V, fields, rows_kept, told, weights)


def _without_twins(found: Blocks) -> Blocks:
    """Stages that evaluate one field at one point, taken together: x + f(x) + f(x) is Euler with h = 2."""
    A, B = found.A.copy(), found.B.copy()
    kept: list[int] = []
    for i, (field, stage) in enumerate(zip(found.fields, found.rows, strict=True)):
        twin = next((j for j in kept if found.fields[j] == field and found.rows[j] is not stage
                     and np.array_equal(A[j], A[i]) and np.array_equal(found.U[j], found.U[i])), None)  # fmt: skip
        if twin is None:
            kept.append(i)
        else:
            A[:, twin] += A[:, i]
            B[:, twin] += B[:, i]
    fields = tuple(found.fields[i] for i in kept)
    rows, recorded = tuple(found.rows[i] for i in kept), tuple(found.recorded[i] for i in kept)
    return Blocks(A[np.ix_(kept, kept)], found.U[kept], B[:, kept], found.V, fields, rows, recorded)


def _own(terms: Terms, contexts: Collection[Value], *, shared: bool, one_coordinate: bool) -> dict[Value, float]:
    """The inputs of a stage; a factor before a field that is used once belongs to the field."""
    kept = {atom: c for atom, c in terms.items() if atom not in contexts}
    if len(kept) == 1 and not (shared and next(iter(kept.values())).kind == "scalar"):
        return dict.fromkeys(kept, 1.0)
    return {atom: _of_stage(c, one_coordinate) for atom, c in kept.items()}


def _before_linear(stage: Stage, terms: Terms, contexts: Collection[Value]) -> float:
    """The number before the one value that a linear stage reads; 1 where it reads others, or is not linear."""
    kept = [c for atom, c in terms.items() if atom not in contexts]
    return kept[0].value if stage.is_affine and len(kept) == 1 and kept[0].kind == "scalar" else 1.0


def _number_of(coefficient: Coefficient, one_coordinate: bool) -> float:
    first = coefficient.sample if coefficient.kind == "diagonal" else None
    return first if one_coordinate and first is not None else coefficient.value


def _of_stage(coefficient: Coefficient, one_coordinate: bool) -> float:
    """Dropout, and which entries a stage adds to, belong to the stage."""
    return 1.0 if coefficient.kind == "dropout" else _number_of(coefficient, one_coordinate)
