"""The places between the modules of a model where the least is alive: where one step may end and the next begin."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from stabkit.tracing.graph.intervals import Interval, Intervals


def around(intervals: Intervals, units: Sequence[Interval]) -> list[int]:
    """One boundary in each gap between units, and around the first and the last."""
    first = narrowest(intervals, 0, units[0].start)
    last = narrowest(intervals, units[-1].stop, intervals.end, latest=False)
    return [0, first, *(gap.position for gap in gaps_between(intervals, units)), last, intervals.end]


def narrowest(intervals: Intervals, low: int, high: int, *, latest: bool = True) -> int:
    """The position from ``low`` to ``high`` where the least is alive; among equals the latest, or the earliest."""
    sign = -1 if latest else 1
    return min(range(low, high + 1), key=lambda position: (int(intervals.width[position]), sign * position))


@dataclass(frozen=True)
class Gap:
    """The place between two consecutive units where the least is alive."""

    position: int
    width: int
    before: Interval
    after: Interval


def gaps_between(intervals: Intervals, units: Sequence[Interval]) -> list[Gap]:
    """One gap between any two consecutive units of which none lies in the other, in order."""
    gaps: list[Gap] = []
    before_shapes = intervals.shapes(0)
    for before, after in itertools.pairwise(units):
        if after.start >= before.stop:
            position = _boundary(intervals, before.stop, after.start, before_shapes)
            if before.pattern != after.pattern and _is_whole(intervals, before):
                position = before.stop  # a norm before the head is no part of the last block
            gaps.append(Gap(position, int(intervals.width[position]), before, after))
            before_shapes = intervals.shapes(position)
    return _alike_in_rounds(intervals, gaps)


def _alike_in_rounds(intervals: Intervals, gaps: list[Gap]) -> list[Gap]:
    """Gaps with the last one between two modules at the place where all those before are: its round ends as theirs.

    There the input of every round is needed no more, so less is alive behind what takes it.
    """
    rounds: dict[tuple[str, str], list[int]] = {}
    for index, gap in enumerate(gaps):
        rounds.setdefault((gap.before.pattern, gap.after.pattern), []).append(index)
    found = list(gaps)
    for *earlier, last in rounds.values():
        places = {gaps[i].position - gaps[i].before.stop for i in earlier}
        position = gaps[last].before.stop + min(places, default=0)
        if len(earlier) > 1 and len(places) == 1 and position <= gaps[last].after.start:
            found[last] = replace(gaps[last], position=position, width=int(intervals.width[position]))
    return found


def _is_whole(intervals: Intervals, block: Interval) -> bool:
    """Whether a block holds branches, and nothing but its result is alive where it ends."""
    narrow = int(intervals.width[block.stop]) == 1 and int(intervals.width[block.start]) == 1
    return narrow and not intervals.is_leaf(block) and intervals.is_wide(block.start, block.stop)


def _boundary(intervals: Intervals, low: int, high: int, before: list[tuple[int, ...]]) -> int:
    """Where the least is alive: in h = h + f(h), after the addition.

    Among equals the last position that leaves the step in the space it began in, so that an activation belongs to the
    layer before it but the pooling after a block does not belong to the block; else the last of all.
    """
    width = intervals.base(low, high)
    equals = [position for position in range(low, high + 1) if intervals.width[position] == width]
    if len(equals) > 1:
        equals = [position for position in equals if intervals.shapes(position) == before] or equals
    return equals[-1]
