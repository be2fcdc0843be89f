"""Boundaries of steps around the rounds of loops, in place of those that would cut through a round."""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Iterator, Sequence

from stabkit.tracing.graph.frontiers import Frontiers
from stabkit.tracing.graph.intervals import Interval, Intervals, numbered
from stabkit.tracing.graph.loops import Loop, find_loops

_FEWEST_ROUNDS = 3


def around_rounds(
    intervals: Intervals, frontiers: Frontiers, units: Sequence[Interval], boundaries: set[int]
) -> set[int]:
    """Boundaries where the rounds of loops begin and end, in place of those that cut through a round.

    A round that hands on one tensor may be cut where one tensor carries all of it, between the parts of a splitting.
    Of a round that hands on several, any other cut is as likely one between the stages of a step.
    """
    counts = Counter(call.path for call in intervals.graph.calls if call.finished)
    recurring = [unit for unit in units if counts[unit.path] > 1]
    loops = find_loops(intervals.graph, frontiers, [(unit.start, unit.stop, unit.path) for unit in recurring])
    for loop in loops:
        width = frontiers.width[loop.start + loop.period]
        inside = {b for b in boundaries if loop.start < b < loop.stop}
        between = {b for b in inside if loop.carried == 1 and frontiers.width[b] == width}
        between = {b for b in between if not _beside(units, b, loop.boundaries)}
        ends = set(loop.boundaries)
        if frontiers.width[loop.stop] > 1 and not any(unit.start >= loop.stop for unit in units):
            ends.discard(loop.stop)  # what the last round leaves is put together for the output
        boundaries = (boundaries - inside) | between | ends
    for first, behind, stop in _parts_of_rounds(units, recurring, loops, intervals.end):
        cut = {b for b in boundaries if first < b < stop and frontiers.width[b] > 1}
        tail = {b for b in boundaries if behind <= b < stop == intervals.end}
        boundaries = boundaries - cut - tail
    return boundaries


def rounds_of_lists(intervals: Intervals, frontiers: Frontiers, units: Sequence[Interval]) -> list[int]:
    """Where rounds begin and end that call the next module of each of several lists, and others that stay the same.

    Each round of a learned method has networks of its own, and one operator between them; layers have a gate beside.
    """
    counts = Counter(unit.pattern for unit in units)
    anchors = [(unit.start, unit.stop, unit.pattern) for unit in units if counts[unit.pattern] >= _FEWEST_ROUNDS]
    loops = find_loops(intervals.graph, frontiers, anchors, numbered)
    starts = [start for start, *_ in anchors]
    return [
        b
        for loop in loops
        if loop.count >= _FEWEST_ROUNDS and sum(loop.start <= start < loop.start + loop.period for start in starts) > 1
        for b in loop.boundaries
    ]


def _parts_of_rounds(
    units: Sequence[Interval], recurring: Sequence[Interval], loops: Sequence[Loop], end: int
) -> Iterator[tuple[int, int, int]]:
    """Runs of calls that recur, but in no whole rounds: those of the first round, of the last, or of the only one.

    Where each begins, where its last call ends, and where something else begins. A first round that starts at a
    constant lacks operations of the others; how much is alive in it does not tell its stages apart.
    """
    places = {unit: place for place, unit in enumerate(units)}
    rest = [u for u in recurring if not any(loop.start <= u.start < loop.stop for loop in loops)]
    others = sorted([*(unit.start for unit in units), *(loop.start for loop in loops), end])
    for place, unit in enumerate(rest):
        if place and places[unit] == places[rest[place - 1]] + 1:
            continue
        run = [unit]
        while place + len(run) < len(rest) and places[rest[place + len(run)]] == places[run[-1]] + 1:
            run.append(rest[place + len(run)])
        behind = run[-1].stop
        yield run[0].start, behind, others[bisect.bisect_left(others, behind)]


def _beside(units: Sequence[Interval], position: int, boundaries: range) -> bool:
    """Whether no unit lies between a position and the boundary of a round before or after it."""
    before = boundaries.start + (position - boundaries.start) // boundaries.step * boundaries.step
    ends = ((before, position), (position, before + boundaries.step))
    return any(not any(unit.start < stop and unit.stop > start for unit in units) for start, stop in ends)
