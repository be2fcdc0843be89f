"""The first and the last step of a method of several states, read as those between them.

A method of several states begins at one tensor: a velocity of zeros, a copy of the state, no older state at all. It
ends where states are added up, put side by side or left unread. Such a step has fewer states or fewer operations than
the others, and by itself it is another, simpler method: the first step of momentum is one of Euler's. It is read as the
step beside it where it does what that does with these states put in. States are found by the operations around them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import numpy as np
from torch.autograd.graph import Node

from stabkit.identification.form.flow_index import Surroundings
from stabkit.identification.form.formed_ahead import as_made
from stabkit.identification.form.operations import ADDS, MOVES, PRODUCTS
from stabkit.identification.form.pieces import Piece
from stabkit.identification.form.slots import Slots, beside_outputs
from stabkit.identification.form.sub_steps import cuts
from stabkit.identification.names.single import CLOSE, NO_STEP
from stabkit.identification.record import Identification, nothing
from stabkit.identification.steps.alignment import Images, images_after, images_before, is_same_from
from stabkit.identification.steps.forks_and_joins import changes_count, holds_a_step, inside, kind_of
from stabkit.identification.steps.same_steps import number_beside
from stabkit.identification.steps.states_between import made_by, read_by
from stabkit.integrators import GeneralLinearMethod
from stabkit.tracing.graph.values import Value, meta_of, operation

Reader = Callable[[Slots, tuple[int, ...]], Identification]

_MOST = 4  # states of which every order is tried
_SAME = "the first step of its kind: it does what the next of that kind does"
_SAME_PART = "the first step of its kind: it does what that part does"
_SECOND_ORDER = "x'' ="  # systems whose force is multiplied by h^2
_NO_METHOD = (
    "autoregressive", "dense", "fork", "iterative", "join", "linear skip", "no branch", "not a step", "part of",
    "plain", "scaled state", "skip", "some entries", "transformed skip", "transition", "unknown", "unnamed",
)  # fmt: skip


@dataclass(frozen=True)
class _Known:
    """A step that is read, and its states.

    Attributes:
        record: its reading.
        slots: its states, each new one at the place of the old one that it follows.
        piece: from the old ones to the new ones.
    """

    record: Identification
    slots: Slots
    piece: Piece


@dataclass(frozen=True, eq=False)
class _Part:
    """A step that is known, or the part of it that lies before or behind a cut.

    Attributes:
        slots: its states, in the order of those of the whole at the end that is no cut.
        of: the reading of the whole.
        read: the reading of a part; None for the whole.
        has_all: whether all evaluations of fields lie in it.
    """

    slots: Slots
    of: Identification
    read: Reader | None = None
    has_all: Callable[[], bool] = lambda: True

    @property
    def whole(self) -> bool:
        """Whether it is not a part."""
        return self.read is None

    @cached_property
    def record(self) -> Identification:
        """Its reading, which takes products: few of the parts that there are come so far."""
        return self.of if self.read is None else self.read(self.slots, self.of.steps)


def with_ends(records: Sequence[Identification], around: Surroundings, read: Reader) -> list[Identification]:
    """Records, those of the first and the last step of a method of several states as those between them.

    Args:
        records: the readings of consecutive steps.
        around: the flow.
        read: the reading of some states before and after some steps.
    """
    found: list[Identification] = []
    i = 0
    while i < len(records):
        record, count = records[i], 1
        better = None
        for apart in (1, 2):
            behind, before = records[i + apart :: apart], records[i - apart :: -apart] if i >= apart else ()
            if better is None and (like := _like(record, behind, records[i + 1 : i + apart])):
                better = _first(around, record, like, read)
            if better is None and (like := _like(record, before, records[i + 1 - apart : i])):
                better, count = _last_of(around, records, i, like, read)
        found.append(better or record)
        i += count
    return found


def _like(
    record: Identification, beside: Sequence[Identification], between: Sequence[Identification]
) -> Identification | None:
    """What two steps on one side of another have in common: of one method, and of another kind than that.

    Of three steps only the one between the ends is read. What lies ``between`` is a step that takes turns with them: a
    message and an update, attention and a feed-forward net.
    """
    if len(beside) < 2:
        return None
    one, other = beside[:2]
    if changes_count(record) and changes_count(other):
        other = one
    kinds = {kind_of(one), kind_of(other)}
    alike = _is_read(one) and _is_read(other) and len(kinds) == 1 and kind_of(record) not in kinds
    turns = all(_is_read(third) and kind_of(third) not in kinds for third in between)
    return _common(one, other) if alike and turns else None


def _common(record: Identification, other: Identification) -> Identification:
    """A record with what it has in common with another of its kind: numbers that each step has of its own are none."""
    record = replace(record, notes=tuple(note for note in record.notes if note in other.notes))
    if record.name == other.name:
        return record
    head, _, tail = record.name.partition(" (")
    words = [word for word in tail.removesuffix(")").split(", ") if word and " = " not in word]
    known = [word for word in words if word in other.name]
    pairs = zip(record.system.split(", "), other.system.split(", "), strict=False)
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)
    return replace(record, name=f"{head} ({', '.join(known)})" if known else head,
                   system=", ".join(word for word, _ in same))  # fmt: skip


def _last_of(
    around: Surroundings, records: Sequence[Identification], i: int, before: Identification, read: Reader
) -> tuple[Identification | None, int]:
    """The record of a last step, and of how many records it is made: two where it was cut.

    What was cut off it may be read by itself: x' = y - h f(y), behind y = x + m (x - x_0), looks like an Euler step.
    """
    record = records[i]
    better = _last(around, record, before, read)
    known = better is not None and _is_step(better)
    if known or _is_read(record) or i + 1 == len(records):
        return better, 1
    nodes = around.nodes(record.steps[0], record.steps[-1] + 1)
    ahead = all(operation(node) in ADDS | MOVES | PRODUCTS for node in nodes)  # where the field behind is evaluated
    if _is_read(records[i + 1]) and not ahead:
        return better, 1
    both = replace(record, steps=(*record.steps, *records[i + 1].steps))
    joined = _last(around, both, before, read)
    found = joined is not None and _is_step(joined)
    return (joined, 2) if found else (better, 1)


def _is_step(record: Identification) -> bool:
    return record.evidence != "unknown" and not record.name.startswith(_NO_METHOD)


def _is_read(record: Identification) -> bool:
    """Whether a record is one of a step by itself, and not of what was found in a fork or a join."""
    return _is_step(record) and not holds_a_step(record)


def _known(around: Surroundings, record: Identification, *, alone: bool) -> Iterator[_Known]:
    """A step that is read with its states, in every order of them that may be that of its old ones.

    ``alone``: the step at the end was read by itself, and is another one of a method of several states at most.
    """
    start, stop = record.steps[0], record.steps[-1] + 1
    found = around.slots(start, stop)
    few = 2 if alone else 1
    if len(found.sources) != len(found.targets) or not few <= len(found.sources) <= _MOST:
        return
    found = as_made(around, found, start, stop)
    shapes = [meta_of(v).shape for v in found.sources]
    for targets in itertools.permutations(found.targets):
        if [meta_of(v).shape for v in targets] == shapes:
            slots = replace(found, targets=targets)
            yield _Known(record, slots, around.whole(start, stop, slots))


def _first(around: Surroundings, record: Identification, beside: Identification, read: Reader) -> Identification | None:
    """The record of a step as the first one of the method that the next one is; None where it is none."""
    for known in _known(around, beside, alone=_is_read(record)):
        slots, start, stop = known.slots, record.steps[0], record.steps[-1] + 1
        nodes = around.nodes(start, stop)
        made = made_by(around, record, slots.sources, beside)
        if made is None or not any(v.node in nodes for v in made):
            return None
        pairs = zip(slots.targets, made, strict=True)
        images = images_before(around.graph, pairs, slots.sources, {*nodes, *known.piece.nodes})
        for part in _parts(around, known, read, behind=True):
            if not part.whole and _is_read(record):
                break
            better = _begun(around, record, part, made, images, read)
            if better is not None:
                return better
    return None


def _begun(
    around: Surroundings,
    record: Identification,
    part: _Part,
    made: tuple[Value, ...],
    images: Images,
    read: Reader,
) -> Identification | None:
    """The record of a first step that makes some states as a known one does; None where it does not."""
    start, stop = record.steps[0], record.steps[-1] + 1
    nodes, contexts = around.nodes(start, stop), _held(around, record, images, part)
    old = [images.get(v) for v in part.slots.sources]
    bases = tuple(dict.fromkeys(v for v in old if v is not None and v not in contexts))
    if not (bases or contexts) or not _cut_off(around, nodes, made, {*bases, *contexts}, start):
        return None
    if bases == tuple(old) and not set(bases) & set(made):
        found = Slots(bases, made, contexts, split=False)
        inner = read(found, record.steps)
        if kind_of(inner) == kind_of(part.record):
            return _told(inner, record, part, "the first step of its kind: its states are made before it", ": a fork")
    begin, held = (bases, contexts) if bases else (contexts, ())  # from constants alone what drives it is all there is
    form = around.form_of(around.piece(nodes, begin, tuple(dict.fromkeys(made)), held))
    theirs = around.form_of(
        around.piece(_nodes_of(around, part), part.slots.sources, part.slots.targets, part.slots.contexts)
    )
    for places in _places(part.slots.sources, old, bases):
        scale = number_beside(
            form, theirs, places, dict(zip(part.slots.targets, made, strict=True)), contexts, kick=not part.whole
        )
        if scale is None:
            continue
        times = "" if abs(scale - 1) <= CLOSE else f" times {scale:.4g}"
        why = f"{_SAME if part.whole else _SAME_PART}{times}{_starts(part.slots.sources, places)}"
        return _told(_scaled(_without_numbers(part.record, record), scale), record, part, why, ": a fork")
    pairs = list(zip(part.slots.targets, made, strict=True))
    for places in _places(part.slots.sources, old, bases):
        if part.whole and is_same_from(around.graph, pairs, places, _nodes_of(around, part)):
            why = f"{_SAME}{_starts(part.slots.sources, places)}, with the numbers of that one"
            return _told(part.record, record, part, why, ": a fork")
    return None


def _nodes_of(around: Surroundings, part: _Part) -> list[Node]:
    steps = part.of.steps
    return around.nodes(steps[0] - part.slots.earlier, steps[-1] + 1)


def _held(around: Surroundings, record: Identification, images: Images, part: _Part) -> tuple[Value, ...]:
    """What a step reads and holds fixed, or makes for the steps behind it to hold fixed."""
    start, stop = record.steps[0], record.steps[-1] + 1
    own = around.slots(start, stop).contexts
    here = {*around.flow.states[start].values, *around.flow.states[stop].values}
    known = (images.get(v, v if v in here else None) for v in part.slots.contexts)
    return tuple(dict.fromkeys([*own, *(v for v in known if v is not None)]))


def _cut_off(
    around: Surroundings, nodes: Sequence[Node], values: Sequence[Value], ends: Collection[Value], start: int
) -> bool:
    """Whether some values are made of the state at the beginning by way of some others alone."""
    inside, stack, seen = set(nodes), list(values), set[Value]()
    state = around.flow.states[start].values
    while stack:
        value = stack.pop()
        if value in seen or value in ends:
            continue
        seen.add(value)
        if value in state or value.node not in inside:
            return False
        stack.extend(around.graph.inputs[value.node])
    return True


def _places(
    states: Sequence[Value], old: Sequence[Value | None], bases: Sequence[Value]
) -> Iterator[dict[Value, Value | None]]:
    """Which value each old state may be; None for a constant."""
    choices = [[v] if v is not None else [None, *bases] for v in old]
    for chosen in itertools.product(*choices):
        shapes = all(v is None or meta_of(v).shape == meta_of(s).shape for v, s in zip(chosen, states, strict=True))
        if shapes:
            yield dict(zip(states, chosen, strict=True))


def _starts(states: Sequence[Value], places: Mapping[Value, Value | None]) -> str:
    """How old states begin, in words; empty where each is a value of its own."""
    fixed = sum(places[v] is None for v in states)
    copies = len(states) - fixed - len({v for v in places.values() if v is not None})
    told = [f"{fixed} of {len(states)} states begins at a constant"] if fixed else []
    told += [f"{copies + 1} states begin as one"] if copies else []
    return f" where {' and '.join(told)}" if told else ""


def _parts(around: Surroundings, known: _Known, read: Reader, *, behind: bool) -> Iterator[_Part]:
    """A known step, and what lies behind each cut through it, or before: the largest first."""
    yield _Part(known.slots, known.record)
    inner = [values for _, values in cuts(known.piece)]

    def has_all(slots: Slots) -> bool:
        piece = around.piece(known.piece.nodes, slots.sources, slots.targets, slots.contexts)
        return len(around.form_of(piece).stages) == len(around.form_of(known.piece).stages)

    for values in inner if behind else reversed(inner):
        kept = known.slots.targets if behind else known.slots.sources
        for order in itertools.permutations(values):
            old, new = (order, kept) if behind else (kept, order)
            if all(_carries(known.piece, a, b) for a, b in zip(old, new, strict=True)):
                slots = replace(known.slots, sources=old, targets=new, split=False)
                yield _Part(slots, known.record, read, partial(has_all, slots))


def _carries(piece: Piece, old: Value, new: Value) -> bool:
    """Whether a state goes on as another: along sums and numbers, or as it is."""
    stack, seen = [new], set[Value]()
    while stack:
        value = stack.pop()
        if value == old:
            return True
        if value not in seen:
            seen.add(value)
            stack.extend(piece.linear.get(value.node, ()))
    return False


def _last(around: Surroundings, record: Identification, beside: Identification, read: Reader) -> Identification | None:
    """The record of a step as the last one of the method that the one before is; None where it is none."""
    start, stop = record.steps[0], record.steps[-1] + 1
    for known in _known(around, beside, alone=_is_read(record)):
        slots = known.slots
        own = set(known.piece.nodes)
        nodes = [n for n in around.nodes(beside.steps[0], stop) if n not in own]
        sources = read_by(around, record, slots.targets, beside)
        if sources is None:
            return None
        images = images_after(around.graph, dict(zip(slots.sources, sources, strict=True)), known.piece.nodes, nodes)
        dropped = _dropped(around, record, known, sources, images)
        if dropped is not None:
            return dropped
        for part in _parts(around, known, read, behind=False):
            if not part.whole and _is_read(record):
                break
            targets = tuple(images[v] for v in part.slots.targets if v in images)
            if len(set(targets)) < len(part.slots.targets) or not any(v.node in nodes for v in targets):
                continue
            contexts = tuple(dict.fromkeys([*slots.contexts, *around.slots(start, stop).contexts]))
            contexts = tuple(v for v in contexts if v not in sources)
            inner = read(Slots(sources, targets, contexts, split=False, earlier=slots.earlier), record.steps)
            if kind_of(inner) == kind_of(part.record) or not (_is_step(inner) or _is_step(part.record)):
                why = "the last step of its kind: what it makes of its states is joined, or not read"
                return _told(inner, record, part, why, ": a join")
    return None


def _dropped(
    around: Surroundings,
    record: Identification,
    known: _Known,
    sources: tuple[Value, ...],
    images: Mapping[Value, Value],
) -> Identification | None:
    """The record of a step that does what a known one does, but for states that nothing reads; None for others."""
    start, stop = record.steps[0], record.steps[-1] + 1
    slots = known.slots
    left = [v for v in slots.targets if v in images and images[v] not in sources]
    ends = [v for v in around.flow.states[stop].values if v not in around.flow.states[start].values]
    stacked = beside_outputs(around.flow, start, stop)
    ends = ends if stacked is None else list(stacked.targets)
    nodes = around.nodes(start - slots.earlier, stop)
    made = {v: images[v] for v in left}
    stay = set(sources).intersection(around.flow.states[stop].values)
    if stay or _is_read(record) or not 0 < len(left) < len(slots.targets):
        return None
    if not _cut_off(around, nodes, ends, made.values(), start):
        return None
    ours = around.form_of(around.piece(nodes, sources, tuple(made.values()), slots.contexts))
    theirs = around.form_of(around.piece(known.piece.nodes, slots.sources, left, slots.contexts))
    places = dict(zip(slots.sources, sources, strict=True))
    scale = number_beside(ours, theirs, places, made, slots.contexts, kick=False)
    if scale is None:
        return None
    part = _Part(slots, known.record)
    why = f"the last step of its kind: {len(slots.targets) - len(left)} of its {len(slots.targets)} states are not read"
    return _told(_scaled(_without_numbers(known.record, record), scale), record, part, why, ": a join")


def _told(inner: Identification, record: Identification, part: _Part, why: str, ending: str) -> Identification:
    """The record of an end, with what is known of the step besides; as it is where what it is a part of has no name."""
    if not part.whole:
        why = f"a part of a step as the one beside it makes ({part.of.name}); {why}"
    if not _is_step(inner) or not (part.whole or len(part.slots.sources) == 1 or _has_name(part)):
        if part.whole or not _is_step(record):
            return record
        inner = nothing(record.steps, "part of a step", why, part.of.evidence)
    told = tuple(map(str, record.over_time))
    found = inside(replace(inner, steps=record.steps, over_time=record.over_time), f"{why}{ending}")
    return replace(found, notes=(*found.notes, *(t for t in told if t not in found.notes)))


def _has_name(part: _Part) -> bool:
    """Whether a part of a step of two states has a name that holds without the rest.

    So it is where it has all fields of the whole, which only mixes its states besides, and where it is one kick, and
    each state of the whole moves by the other: a sum beside a state makes no half of a system with it. Half a kick and
    a drift would be a step of another size.
    """
    one, whole = part.record.method, part.of.method
    if not isinstance(one, GeneralLinearMethod) or not isinstance(whole, GeneralLinearMethod):
        return False
    if not np.allclose(one.V, np.eye(one.states), atol=CLOSE):
        return part.has_all() and kind_of(part.record) == kind_of(part.of)
    if whole.states != 2 or not whole.is_explicit:
        return False
    A, U, B, V = (np.abs(np.asarray(x, dtype=float)) for x in (whole.A, whole.U, whole.B, whole.V))
    reads = V + B @ np.linalg.inv(np.eye(len(A)) - A) @ U
    return bool(reads[0, 1] and reads[1, 0])


def _without_numbers(known: Identification, record: Identification) -> Identification:
    """A record without what it states of numbers (t = 0.1) that are not known to be those of another step as well."""
    return replace(known, notes=tuple(note for note in known.notes if " = " not in note or note in record.notes))


def _scaled(record: Identification, scale: float) -> Identification:
    """A record of a step with fields that are multiplied by another number."""
    if abs(scale - 1) <= CLOSE or record.step_size is None:
        return record
    if scale <= 0 or record.system.startswith(_SECOND_ORDER):
        return replace(record, step_size=None, convention=NO_STEP)
    return replace(record, step_size=record.step_size * scale)
