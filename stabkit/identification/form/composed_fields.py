"""Which operations may belong to one field together: calls of modules, vectors put together of parts, guidance."""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Collection, Iterator, Sequence

from torch.autograd.graph import Node

from stabkit.identification.form.operations import JOINS, MOVES, WRITES
from stabkit.identification.form.pieces import Piece
from stabkit.tracing.graph.values import Value, meta_of, operation, outputs_of
from stabkit.vocabulary import moves

Call = tuple[int, int, str]  # of a module: an interval of the clock, and its path
_SELECTS = moves("select")


def composed_fields(piece: Piece, calls: Sequence[Call]) -> Iterator[set[Node]]:
    """The operations that may belong to fields besides those that do whatever else is there, the likeliest first.

    Args:
        piece: a stretch of a graph.
        calls: calls of modules that are called repeatedly, as intervals of the clock.
    """
    called, parted = fields_called(piece, calls), _of_parts(piece)
    if parted:
        yield called | parted
    yield called
    if once := _called_once(piece):
        yield called | once
    yield _assembled(piece)


def fields_called(piece: Piece, calls: Sequence[Call]) -> set[Node]:
    """The operations of modules that are called at several points of a stretch."""
    if not piece.nodes:
        return set()
    times = {node: node._sequence_nr() for node in piece.nodes}
    first, last = min(times.values()), max(times.values())
    inside = [c for c in calls if first <= c[0] and c[1] <= last + 1]
    often = Counter(path for *_, path in inside)
    again = [c for c in inside if often[c[2]] > 1]
    return {node for node, time in times.items() if any(start <= time < stop for start, stop, _ in again)}


def _called_once(piece: Piece) -> set[Node]:
    """The operations of modules that add to a state themselves, and give out no such sum but a map of it: fields."""
    times = [node._sequence_nr() for node in piece.nodes]
    around: dict[int, Call] = {}  # the innermost call of a module around every sum
    merged = [value.node._sequence_nr() for value in piece.merges]
    for call in piece.graph.calls if merged else ():
        if call.finished and times[0] <= call.start < call.stop <= times[-1] + 1:
            own = (call.start, call.stop, call.path)
            around.update(dict.fromkeys((time for time in merged if call.start <= time < call.stop), own))
    last = {value: i for i, node in enumerate(piece.nodes) for value in piece.inputs(node)}
    last.update(dict.fromkeys(piece.targets, len(times)))
    found: set[Node] = set()
    for begin, end, _ in dict.fromkeys(around.values()):
        first, stop = (bisect.bisect_left(times, time) for time in (begin, end))
        inside = piece.nodes[first:stop]
        used = [v for node in inside for v in outputs_of(node) if last.get(v, -1) >= stop]
        if len(used) == 1 and used[0].node not in piece.linear:
            found.update(inside)
    return found


def _assembled(piece: Piece) -> set[Node]:
    """Vectors that are put together from parts of a state, and then added to one: the value of a field."""
    found: set[Node] = set()
    for node in piece.nodes:
        if operation(node) not in JOINS or Value(node, 0) in piece.targets:
            continue
        if any(meta_of(Value(node, 0)).numel == meta_of(source).numel for source in piece.sources):
            found.add(node)
    return found


def _of_parts(piece: Piece) -> set[Node]:
    """What lies between a value of several times the size of the states and what is made of its parts: of a field.

    Guidance evaluates a network once at [x, x], and combines both halves of what it gives out.
    """
    sizes = {meta_of(source).numel for source in piece.sources}
    found: set[Node] = set()
    for start, node in enumerate(piece.nodes):
        given = piece.inputs(node)
        wide = bool(given) and given[0] not in piece.ends
        wide = wide and any(meta_of(given[0]).numel in range(2 * n, meta_of(given[0]).numel + 1, n) for n in sizes)
        if wide and operation(node) in _SELECTS and given[0].node not in found and not _is_laid_out(piece, given[0]):
            found |= _until_one(piece, given[0], start, sizes)
    if not found:
        return found
    repeats = (n for n in piece.nodes if operation(n) in MOVES and len(set(piece.inputs(n))) == 1)
    return found | {n for n in repeats if meta_of(Value(n, 0)).numel not in sizes and Value(n, 0) in piece.carrying}


def _is_laid_out(piece: Piece, value: Value) -> bool:
    """Whether a value holds states or values of fields side by side, as buffers of all stages do."""
    while value not in piece.ends and operation(value.node) in MOVES - JOINS - WRITES and piece.inputs(value.node):
        value = piece.inputs(value.node)[0]
    return value in piece.carrying or operation(value.node) in JOINS | WRITES


def _until_one(piece: Piece, value: Value, start: int, sizes: Collection[int]) -> set[Node]:
    """The operations on a value from some place on, up to the one value of the size of a state that is left of it.

    Nothing where something else takes part, as the half of a state that a network scales and shifts in a coupling.
    """
    last: dict[Value, int] = dict.fromkeys(piece.targets, len(piece.nodes))
    for position, node in enumerate(piece.nodes):
        last.update((v, max(position, last.get(v, 0))) for v in piece.inputs(node))
    alive, made, passed = {value}, {value}, set[Node]()
    for position, node in enumerate(piece.nodes[start:], start):
        if alive.isdisjoint(piece.inputs(node)):
            continue
        if not made.issuperset(piece.inputs(node)):
            return set()
        passed.add(node)
        made.update(outputs_of(node))
        alive.update(v for v in outputs_of(node) if v in last)
        alive = {v for v in alive if last[v] > position}
        if len(alive) == 1 and meta_of(next(iter(alive))).numel in sizes:
            return passed
    return set()
