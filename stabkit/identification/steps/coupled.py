"""Streams of a coupled system: the skip of every state, and which values of the others its branch reads.

Each state is read by itself, with the others' old and new values held fixed. All branches at old values make one step
of the whole system at once; new values, in the order in which they are made, a step of Gauss-Seidel type.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch.autograd.graph import Node

from stabkit.identification.evidence.reproduction import confirmed
from stabkit.identification.form.chain import Link
from stabkit.identification.form.coefficients import Coefficient
from stabkit.identification.form.flow_index import Surroundings
from stabkit.identification.form.formed_ahead import as_made
from stabkit.identification.form.normal_form import NormalForm
from stabkit.identification.form.operations import SCALES, has_matrix
from stabkit.identification.form.pieces import Piece
from stabkit.identification.form.slots import Slots
from stabkit.identification.record import Identification
from stabkit.identification.steps.driven import weights_of_inputs
from stabkit.integrators import GeneralLinearMethod
from stabkit.tracing.graph.values import Value, meta_of, operation, outputs_of

ReadOne = Callable[[Surroundings, Slots, tuple[int, ...]], Identification]
COARSE = ("unnamed", "unknown", "plain")  # what says less of several states than their streams
_MOST = 6  # states of which every pairing is tried
_UNREAD = ("unknown", "unnamed", "not a step", "part of a step", "transition")
_SUMS = ("no branch", "linear recurrence (a", "scaled state (a")
_DRIVEN = (
    "damped Euler",
    "diagonal skip",
    "forward Euler",
    "projected Euler (post-norm)",
    "running sum",
    "scaled skip",
)
#: Streams that are carried on by a number below one, and driven by others or by a field of their own.
_DAMPED = re.compile(
    r"(?:forward Euler|running sum|damped Euler|diagonal skip)"
    r"(?: \(a (?:= )?(0\.\d+|from 0\.\d+ to (?:1|0\.\d+) by entry)\))?"
)
_OF_CELLS = {
    "affine coupling": "gated step (times a gate, then an input)",
    "plain": "made anew",
    "transformed skip": "made of its old value and others by a map that bends",
}
_OWN_SIZES = "none for all: every state has its own"
_SAME = 1e-6  # numbers of single precision networks


@dataclass(frozen=True)
class _Stream:
    """One state, read with the others held fixed.

    Attributes:
        record: what it is by itself.
        links: from its old to its new value.
        old: the places of states of which it reads the old value, in order.
        new: the states whose new value it reads, or one in between.
        passed: the values through which it passes.
    """

    record: Identification
    links: tuple[Link, ...]
    old: tuple[int, ...]
    new: tuple[int, ...]
    passed: tuple[Value, ...]

    @property
    def values(self) -> set[Value]:
        """The old value, the new one, and what lies on the way."""
        return {self.links[0].form.sources[0], *self.passed, self.links[-1].form.targets[0]}

    @property
    def is_sum(self) -> bool:
        """Whether it only adds what is made of others, which are held fixed."""
        return self.record.name.startswith(_SUMS) and not (self.is_scaled and not (self.old or self.new))

    @property
    def is_scaled(self) -> bool:
        """Whether it is multiplied by a number above one, or below zero."""
        return self.record.name.startswith("scaled state (a")

    @property
    def h(self) -> float | None:
        """The step size; None where there is none."""
        return None if self.is_sum or self.record.name.startswith("plain") else self.record.step_size

    @property
    def drive(self) -> float | None:
        """The one number, other than one, that multiplies what is added to it of others; None where there is none."""
        sums = [link.form for link in self.links if link.kind == "sum"]
        if not self.is_sum or len(sums) != 1 or self.links[-1].form is not sums[0]:
            return None
        added = [c for atom, c in sums[0].forms[0].items() if atom not in sums[0].sources]
        one = len(added) == 1 and added[0].kind == "scalar" and abs(abs(added[0].value) - 1) > _SAME
        return abs(added[0].value) if one and added[0].value else None

    @property
    def name(self) -> str:
        """What it is called."""
        if not self.is_sum:
            return self.record.name
        _, number, rest = self.record.name.partition("(a")
        if not number:  # what follows the addition stays with it
            return "running sum" + self.record.name.removeprefix("no branch").replace(" with noise", "")
        return f"running sum {number}{rest.removesuffix(', no branch')}".strip()


def coupled(
    around: Surroundings, found: Slots, steps: tuple[int, ...], record: Identification, read_one: ReadOne
) -> Identification:
    """The reading of every state of a system, where it says more than a record of all at once.

    Args:
        around: the index of the flow.
        found: the states.
        steps: the steps of the flow that make up the step.
        record: the reading of all states at once.
        read_one: reads a step of one state.
    """
    coarse = record.name.startswith(COARSE) or (" steps of general linear method" in record.name)
    if not coarse or not 2 <= len(found.sources) == len(found.targets) <= _MOST:
        return record
    found = as_made(around, found, steps[0], steps[-1] + 1)
    piece = around.whole(steps[0], steps[-1] + 1, found)
    order = _pairing(piece)
    if order is None:
        return record
    found = replace(found, targets=tuple(found.targets[j] for j in order))
    streams = _streams(around, found, steps, read_one)
    if any(s.record.name.startswith(_UNREAD) or s.record.evidence == "unknown" for s in streams):
        return record
    if all(s.record.name.startswith("plain") for s in streams) or _rotates(found, streams):
        return record
    known = [s.record.residual for s in streams if s.record.residual is not None]
    proven = all(s.record.evidence == "proven" for s in streams)
    adaptive = _adaptive(streams)
    one = all((s.h or s.drive) in (None, 1.0) for s in streams) and adaptive is None
    cell = _memory_cell(streams)
    if cell is not None:  # what is multiplied by gates is no affine coupling: nothing stays as it is
        streams = [replace(s, record=replace(s.record, name=_OF_CELLS[s.record.name], step_size=None))
                   for s in streams]  # fmt: skip
    if adaptive is not None or cell is not None:  # what divides or multiplies a state is no number: no tableau
        record, proven = replace(record, method=None, recorded=()), False
    name = adaptive or cell or _momentum(streams) or _name(streams)
    if name.startswith(("forward Euler of", "damped Euler of", "Gauss-Seidel")) and _reads_between(record):
        return record
    new = replace(
        record,
        name=name,
        step_size=record.step_size if one else None,
        convention=record.convention if one else _OWN_SIZES,
        evidence="proven" if proven else "measured",
        residual=max(known, default=None),
        notes=(*_notes(streams), *record.notes[:1]),
        system="; ".join(_said(i, streams, "x".join(map(str, meta_of(v).shape))) for i, v in enumerate(found.sources)),
    )
    return confirmed(new, piece)


def _pairing(piece: Piece) -> tuple[int, ...] | None:
    """Which new state follows each old one; None where no order fits, or several but the given one.

    A value that is an old and a new state at once is a history.
    """
    if set(piece.sources) & set(piece.targets):
        return None
    carried = [_carried(piece, target) for target in piece.targets]
    places = tuple(range(len(piece.sources)))
    # what no new state carries on is only read, and made anew: the output of a cell beside its memory and a position
    anew = set(piece.sources).difference(*carried)
    fits = [
        p for p in itertools.permutations(places)
        if all(piece.sources[i] in {*carried[p[i]], *anew} for i in places)
    ] if len(anew) < len(places) - 1 else []  # fmt: skip
    return places if places in fits else fits[0] if len(fits) == 1 else None


def _carried(piece: Piece, target: Value) -> set[Value]:
    """The sources of as many entries from which a value comes by moves, numbers, sums, norms and activations alone."""
    seen: set[Value] = set()
    stack = [target]
    while stack:
        value = stack.pop()
        if value in seen:
            continue
        seen.add(value)
        if value in piece.ends or value.node not in piece.inside:
            continue
        taken = piece.linear.get(value.node)
        if taken is None and not has_matrix(value.node) and not piece.hides(value.node):
            taken = piece.inputs(value.node)
        stack.extend(taken or ())
    return {s for s in piece.sources if s in seen and meta_of(s).numel == meta_of(target).numel}


def _streams(around: Surroundings, found: Slots, steps: tuple[int, ...], read_one: ReadOne) -> list[_Stream]:
    """Every state by itself: first to see what it passes on its way, then with these values of the others as well."""
    start, stop = steps[0], steps[-1] + 1
    count = len(found.sources)

    def alone(i: int, more: Sequence[Value]) -> Slots:
        others = [v for values in (found.sources, found.targets) for j, v in enumerate(values) if j != i]
        contexts = dict.fromkeys((*found.contexts, *others, *more))
        return Slots((found.sources[i],), (found.targets[i],), tuple(contexts), False, found.earlier)

    passed: list[tuple[Value, ...]] = []
    for i in range(count):
        links = around.chain(start, stop, alone(i, ()))
        carried = all(link.kind not in ("map", "join") for link in links)  # else what lies between is made of the old
        ends = [link.form.targets[0] for link in links[:-1]] if carried else []
        passed.append(tuple(dict.fromkeys((*ends, *_sums_on_the_way(around.whole(start, stop, alone(i, ())))))))
    streams = []
    for i in range(count):
        own = {found.sources[i], found.targets[i], *passed[i]}
        slots = alone(i, [v for j in range(count) if j != i for v in passed[j] if v not in own])
        piece = around.whole(start, stop, slots)
        read = {v for node in piece.nodes for v in piece.inputs(node) if v in piece.contexts}
        old = tuple(j for j in range(count) if found.sources[j] in read and j != i)
        new = tuple(j for j in range(count) if j != i and read & {found.targets[j], *passed[j]})
        streams.append(_Stream(read_one(around, slots, steps), around.chain(start, stop, slots), old, new, passed[i]))
    return streams


def _sums_on_the_way(piece: Piece) -> list[Value]:
    """The sums by which one state moves, also where others, moved by it in between, lead around them."""
    (target,) = piece.targets
    path = piece.expand(target)[1]
    sums = [v for node in piece.nodes if node in path for v in outputs_of(node) if v in piece.merges and v != target]
    return [v for v in sums if meta_of(v).numel == meta_of(target).numel]


def _name(streams: Sequence[_Stream]) -> str:
    """What the streams make together; sums, which only follow, come last."""
    count = len(streams)
    names = [s.name for s in sorted(streams, key=lambda s: (s.is_sum, s.name))]
    order = "Gauss-Seidel" if any(s.new for s in streams) else "forward"
    if set(names) <= {"forward Euler", "running sum"} and _is_mutual(streams):
        return f"{order} Euler of {count} coupled states"
    damped = [_DAMPED.fullmatch(s.name) for s in streams]
    if _is_mutual(streams) and all(damped):
        numbers = dict.fromkeys(found[1] or "1" for found in damped if found)
        return f"{order} damped Euler of {count} coupled states (a = {', '.join(numbers)})".removeprefix("forward ")
    return f"{count} {'coupled ' * _is_mutual(streams)}states: {', '.join(names)}"


def _reads_between(record: Identification) -> bool:
    """Whether a field is evaluated between old and new states, x + v / 2: a stage, which Euler's rule has not."""
    if not isinstance(record.method, GeneralLinearMethod):
        return False
    U, V = record.method.U, record.method.V
    of_ends = np.concatenate([[0.0, 1.0, -1.0], V.ravel()])  # sums of old and of new states have these numbers alone
    return bool((~np.isclose(U[..., None], of_ends, atol=_SAME).any(axis=-1)).any())


def _rotates(found: Slots, streams: Sequence[_Stream]) -> bool:
    """Whether two states enter each other by numbers: a matrix then tells what is kept, and not the number of each."""
    places = {v: j for j, s in enumerate(streams) for v in (found.sources[j], *s.passed, found.targets[j])}
    mixed = [
        {places[a] for link in s.links if link.kind != "weightless" for a in link.form.forms[0] if a in places} - {i}
        for i, s in enumerate(streams)
    ]
    return any(i in mixed[j] for i in range(len(mixed)) for j in mixed[i])


def _is_mutual(streams: Sequence[_Stream]) -> bool:
    """Whether some state reads one that reads it, by way of others or at once."""
    reads = [{*s.old, *s.new} for s in streams]
    for _ in streams:
        reads = [r.union(*(reads[j] for j in r)) for r in reads]
    return any(i in r for i, r in enumerate(reads))


def _said(i: int, streams: Sequence[_Stream], shape: str) -> str:
    """One stream in words."""
    stream = streams[i]
    parts = [f"x_{i + 1} ({shape}): {stream.name}"]
    sums = sum(link.kind == "sum" for link in stream.links)
    if sums > 1:
        parts.append(f"{sums} additions")
    if (h := stream.h or stream.drive) is not None:
        parts.append(f"h = {h:.3g}")
    if fed := weights_of_inputs(stream.links, {v for s in streams for v in s.values}):
        parts.append(f"driven by an input with the weight {' and '.join(f'{w:.3g}' for w in fed)}")
    for what, places in (("old", stream.old), ("new", stream.new)):
        if places:
            parts.append(f"reads {what} {' and '.join(f'x_{j + 1}' for j in places)}")
    if not any(i in s.old or i in s.new for s in streams):
        parts.append("read by no other")
    return ", ".join(parts)


def _notes(streams: Sequence[_Stream]) -> tuple[str, ...]:
    if not any(s.new for s in streams):
        return ("every branch reads old values: one step of the system at once",)
    return ("new values are read as soon as they are there: the order belongs to the method",)


def _momentum(streams: Sequence[_Stream]) -> str | None:
    """A velocity that a field of the position drives, normalised or not, and a position that moves by what is new."""
    for position, velocity in itertools.permutations(range(len(streams)), 2):
        x, v = streams[position], streams[velocity]
        sums = [link.form for link in v.links if link.kind == "sum"]
        added = [link.form for link in x.links if link.kind == "sum"]
        moves, own = [f for f in added if not f.stages], [f for f in added if f.stages]
        if len(streams) > 2 or not v.name.startswith(_DRIVEN) or not x.name.startswith((*_DRIVEN, "Lie splitting")):
            continue
        in_turn = not x.old or (not x.new and not v.old)  # where a round is cut, in the one order or in the other
        if not moves or len(moves) != len(sums) or not in_turn or not all(map(_is_apart, own)):
            continue  # it moves by something else than the new velocity alone
        kept, stays = _kept(v.links), _kept(x.links)
        if kept is None or stays is None:
            continue
        # a field that is linear in the position, M k, is no stage
        linear = position in (*v.old, *v.new) and not any(form.stages for form in sums)
        ahead = [0.0] if linear else [_ahead(form, x.values) for form in sums]
        if None in ahead:
            continue
        numbers = [f"beta = {_listed(kept)}"]
        if any(ahead):
            numbers.append(f"look-ahead {_listed(m for m in ahead if m is not None)}")
        if any(abs(a.value - 1) > _SAME for a in stays):
            numbers.append(f"the position kept with {_listed(stays)}")
        rule = "Nesterov momentum" if all(ahead) else "momentum"
        ends = (("velocity", v), ("position", x))
        normed = "".join(f", {what} normalised" for what, one in ends if one.name.startswith("projected"))
        told = f"{rule} ({', '.join(numbers)}){normed}"
        return f"Lie splitting ({told}; {len(own)} Euler step{'s' * (len(own) > 1)} of the position)" if own else told
    return None


def _adaptive(streams: Sequence[_Stream]) -> str | None:
    """A velocity, a mean of squares of what drives it, and a position that moves by the one over the other."""
    for x, m, v in itertools.permutations(range(len(streams))) if len(streams) == 3 else ():
        reads = [{*s.old, *s.new} for s in (streams[x], streams[m], streams[v])]
        kept = [_DAMPED.fullmatch(streams[i].name) for i in (m, v)]
        if reads != [{m, v}, {x}, {x}] or not all(found and found[1] for found in kept):
            continue
        squares, moves = (
            [node for link in streams[i].links for a in link.form.forms[0] for node in _made_of(link.form, a)]
            for i in (v, x)
        )
        if any(map(_is_square, squares)) and not any(map(has_matrix, moves)):
            return f"adaptive momentum (Adam type, beta = {' and '.join(found[1] for found in kept if found)})"
    return None


def _memory_cell(streams: Sequence[_Stream]) -> str | None:
    """States that gates multiply, which others decide that are made anew of them: the cell of an LSTM, and its like."""
    kinds = [s.record.name for s in streams]
    cells, anew = kinds.count("affine coupling"), [s for s in streams if s.record.name == "plain"]
    if not cells or not anew or not _is_mutual(streams) or not set(kinds) <= _OF_CELLS.keys():
        return None
    if any("gate" not in {c.kind for link in s.links for c in link.form.forms[0].values()}
           for s in streams if s.record.name == "affine coupling"):  # fmt: skip
        return None
    divides = any(operation(node) == "Div" for s in anew for link in s.links for node in link.form.piece.nodes)
    normalised = ", read out over a normaliser (sLSTM)" if cells == 2 and divides else ""
    return f"gated memory cell{'s' * (cells > 1 and not normalised)}{normalised}"


def _made_of(form: NormalForm, atom: Value) -> list[Node]:
    """The operations that a term of a new state is made by, up to what is held fixed."""
    stack, found = [atom], dict[Node, None]()
    while stack:
        value = stack.pop()
        if value not in form.piece.ends and value.node not in found and value.node in form.piece.inside:
            found[value.node] = None
            stack.extend(form.piece.inputs(value.node))
    return list(found)


def _is_square(node: Node) -> bool:
    """Whether an operation multiplies a value by itself, or by a multiple of itself."""
    given = [Value(parent, output) for parent, output in node.next_functions if parent is not None]
    squared: Any = node
    if operation(node) == "Pow":
        return len(given) == 1 and getattr(squared, "_saved_exponent", None) == 2
    return operation(node) in ("Mul", "Addcmul") and len({_unscaled(v) for v in given[-2:]}) == 1 < len(given)


def _unscaled(value: Value) -> Value:
    """What a value is a multiple of, by numbers."""
    while operation(value.node) in SCALES:
        given = [Value(parent, output) for parent, output in value.node.next_functions if parent is not None]
        if len(given) != 1:
            break
        value = given[0]
    return value


def _is_apart(form: NormalForm) -> bool:
    """Whether an addition has a field of its own state alone: nothing that is held fixed takes part."""
    return all(v not in form.piece.contexts for node in form.piece.nodes for v in form.piece.inputs(node))


@dataclass(frozen=True)
class _Kept:
    """What an old state is multiplied by on the way to the new one: a number, or one for every entry.

    Attributes:
        value: the number; the mean of several.
        low: the smallest.
        high: the largest.
    """

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3g}" if self.low == self.high else f"{self.low:.3g} to {self.high:.3g} by entry"


def _kept(links: Sequence[Link]) -> list[_Kept] | None:
    """The numbers before the old state in every addition, with those that multiply it on the way there."""
    found: list[_Kept] = []
    factors: list[Coefficient] = []
    for link in links:
        c = link.form.forms[0].get(link.form.sources[0])
        if link.kind in ("sum", "scaling"):
            if c is None or c.kind not in ("scalar", "diagonal"):
                return None
            factors.append(c)
        if sum(c.kind == "diagonal" for c in factors) > 1:
            return None  # of a product the ends are no products of the ends
        if link.kind == "sum":
            value, *ends = (math.prod(getattr(c, what) for c in factors) for what in ("value", "low", "high"))
            found.append(_Kept(value, min(ends), max(ends)))
        if link.kind != "scaling":
            factors = []
    return found


def _ahead(form: NormalForm, position: Collection[Value]) -> float | None:
    """The number of velocities that are added to the position where the field is evaluated; None if that is no such."""
    v = form.sources[0]
    found: list[float] = []
    for terms in (terms for stage in form.stages for terms in stage.inputs):
        held = [c.value for a, c in terms.items() if a in position]
        if not held and form.piece.contexts and set(terms) <= set(form.piece.contexts):
            continue  # an input from outside
        if len(held) != 1 or not held[0] or terms.keys() - {v} - form.piece.ends:
            return None
        found.append(terms[v].value / held[0] if v in terms else 0.0)
    return found[0] if found and max(found) - min(found) <= _SAME else None


def _listed(numbers: Iterable[float | _Kept]) -> str:
    return ", ".join(dict.fromkeys(f"{x:.3g}" if isinstance(x, float) else str(x) for x in numbers))
