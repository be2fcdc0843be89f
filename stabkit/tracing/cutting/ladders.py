"""Ladders: stretches where more than one value is alive at every place between modules, and where they are cut."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import nn

from stabkit.tracing.cutting.gaps import Gap
from stabkit.tracing.graph.intervals import Intervals


def are_stages(gaps: Sequence[Gap]) -> bool:
    """Whether gaps lie between calls that recur without being rounds of a loop, and more is alive in some of them."""
    units = [gaps[0].before, *(gap.after for gap in gaps)]
    return len({unit.path for unit in units}) < len(units) and len({gap.width for gap in gaps}) > 1


def is_history(intervals: Intervals, gaps: Sequence[Gap]) -> bool:
    """Whether gaps lie between like blocks, one after the other, each of which reads what the one before has made.

    Parallel branches read their common input alone, and the stages of a solver are calls of one module.
    """
    chained = all(a.after is b.before for a, b in itertools.pairwise(gaps))
    alike = all(are_like_blocks(intervals, gap) and gap.before.path != gap.after.path for gap in gaps)
    return len(gaps) > 1 and chained and alike and all(intervals.reads(gap.after, gap.before) for gap in gaps)


def between_rounds(intervals: Intervals, gaps: Sequence[Gap]) -> list[Gap]:
    """Gaps without those within a round: beside a norm in a Sequential, or where more is alive than between rounds.

    Layers that are written as several lists of modules, a convolution of each in turn, are cut where as much is alive
    again and again, and not where it is as much or more.
    """
    gaps = [gap for gap in gaps if not _is_piped(intervals, gap)] or gaps
    while True:
        keys = [tuple((unit.pattern, type(unit.module)) for unit in (gap.before, gap.after)) for gap in gaps]
        widths = {key: [gap.width for gap, other in zip(gaps, keys, strict=True) if other == key] for key in keys}
        recurs = {key: w[0] for key, w in widths.items() if len(w) > 1 and min(w) == max(w)}
        beside = {*itertools.pairwise(keys), *itertools.pairwise(reversed(keys))}
        inside = {a for a, b in beside if b in recurs and min(widths[a]) >= recurs[b] < max(widths[a])}
        if not inside:
            return list(gaps)
        gaps = [gap for gap, key in zip(gaps, keys, strict=True) if key not in inside]


def are_like_blocks(intervals: Intervals, gap: Gap) -> bool:
    """Whether a gap lies between two blocks of one class and one numbered name."""
    alike = gap.before.pattern == gap.after.pattern and type(gap.before.module) is type(gap.after.module)
    return alike and not intervals.is_leaf(gap.before)


def _is_piped(intervals: Intervals, gap: Gap) -> bool:
    """Whether a gap lies between two items of one Sequential, of which one has no weights."""
    parent = intervals.parent(gap.before)
    units = (gap.before, gap.after)
    together = parent is not None and parent is intervals.parent(gap.after) and isinstance(parent.module, nn.Sequential)
    return together and not all(intervals.has_weights(unit.start, unit.stop) for unit in units)
