"""Where one step ends and the next begins: the depth axis that a person would draw.

Module calls say what the author named; the width of the frontier says where the graph can be cut. A boundary
needs both: it lies between two calls, at a position where as little as possible is alive.
"""

from __future__ import annotations

import bisect
import fnmatch
import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from torch import nn

from stabkit.errors import TraceError
from stabkit.tracing.cutting.gaps import Gap, around, gaps_between, narrowest
from stabkit.tracing.cutting.ladders import are_like_blocks, are_stages, between_rounds, is_history
from stabkit.tracing.graph.frontiers import Frontiers
from stabkit.tracing.graph.intervals import Interval, Intervals
from stabkit.tracing.graph.loops import loops_of_products
from stabkit.tracing.graph.rounds import around_rounds, rounds_of_lists
from stabkit.tracing.graph.tandem import tandem_repeat
from stabkit.tracing.graph.values import operation

_FEWEST_ROUNDS = 3  # of a loop that only its operations tell of: two may be the stages of one step

Depth = str | Sequence[str] | Callable[[str, nn.Module], bool]


@dataclass(frozen=True)
class Span:
    """A stretch of the graph that will be one step.

    Attributes:
        start: first position.
        stop: last position.
        calls: the module calls in it that were taken as units, in order.
        shape: ``"block"`` (branches inside), ``"layer"`` (plain, with weights) or ``"glue"`` (plain, without).
    """

    start: int
    stop: int
    calls: tuple[Interval, ...]
    shape: str = "layer"

    @cached_property
    def main(self) -> Interval | None:
        """The call that does most of the work."""

        def work(call: Interval) -> tuple[int, int]:
            weights = any(p.numel() for p in call.module.parameters())
            return (int(weights), min(call.stop, self.stop) - max(call.start, self.start))

        return max(self.calls, key=work, default=None)


def choose(intervals: Intervals, frontiers: Frontiers, depth: Depth = "auto") -> list[Span]:
    """The pieces of a graph, in order and without gaps.

    Args:
        intervals: the module calls on the graph.
        frontiers: its live frontiers.
        depth: ``"auto"``; ``"cuts"`` (every position where one value carries everything); ``"modules"`` (every
            module without children); a list of module paths or globs; or a function of path and module that picks
            the modules to be steps.

    Raises:
        TraceError: ``depth`` is none of these, or picks no module that the graph passes through.
    """
    if depth == "auto":
        units = [unit for root in intervals.children(None) for unit in _Units(intervals).of(root) or [root]]
        pieces = _by_modules(intervals, frontiers, units)
        # the stages of a solver's only step are no layers, however few steps that leaves
        if len(pieces) <= 2 and intervals.end >= 8 and len({unit.path for unit in units}) == len(units):
            by_operations = _by_operations(intervals, frontiers)
            if len(by_operations) > len(pieces) + 1:
                return by_operations
        return _around_rounds_of_products(intervals, frontiers, units, pieces)
    if depth == "cuts":
        return _between(intervals, [], [0, *frontiers.cuts(), intervals.end])
    picked = _picked(intervals, depth)
    return _between(intervals, picked, around(intervals, picked))


def _wanted(depth: Callable[[str, nn.Module], bool], call: Interval) -> bool:
    try:
        return bool(depth(call.path, call.module))
    except Exception as error:
        raise TraceError(
            f"depth failed on module {call.path!r}: {type(error).__name__}: {error}; it is given path and module"
        ) from error


def _picked(intervals: Intervals, depth: Depth) -> list[Interval]:
    if depth == "modules":
        return [call for call in intervals.calls if intervals.is_leaf(call)]
    if callable(depth):
        picked = [call for call in intervals.calls if _wanted(depth, call)]
    elif isinstance(depth, str):
        raise TraceError(
            f'depth={depth!r}; expected "auto", "cuts", "modules", a list of module paths or globs such as '
            f"[{depth!r}], or a function of path and module"
        )
    elif not isinstance(depth, Sequence) or not all(isinstance(glob, str) for glob in depth):
        raise TraceError(
            f'depth={depth!r}; expected "auto", "cuts", "modules", a list of module paths or globs such as '
            "['blocks.*'], or a function of path and module"
        )
    else:
        picked = [call for call in intervals.calls if any(fnmatch.fnmatchcase(call.path, glob) for glob in depth)]
    if not picked:
        known = ", ".join(dict.fromkeys(call.path for call in intervals.calls if call.path))
        raise TraceError(f"depth={depth!r} picks no module on the way from input to output; there are: {known[:600]}")
    outermost: list[Interval] = []
    for call in picked:  # in the order of their beginnings; what lies inside one that was picked belongs to it
        if not outermost or call.start >= outermost[-1].stop:
            outermost.append(call)
    return outermost


def _between(intervals: Intervals, units: Sequence[Interval], boundaries: Sequence[int]) -> list[Span]:
    pieces = []
    starts = [unit.start for unit in units]
    latest = list(itertools.accumulate((unit.stop for unit in units), max))
    for start, stop in itertools.pairwise(sorted(set(boundaries))):
        # none before the first of these reaches into the piece, none after the last begins before its end
        near = units[bisect.bisect_right(latest, start) : bisect.bisect_left(starts, stop)]
        inside = _whole(intervals, [u for u in near if min(u.stop, stop) > max(u.start, start)], start, stop)
        if not units:
            named = (call for call in intervals.enclosing(start, stop) if call.path)
            inside = tuple(itertools.islice(named, 1))
        pieces.append(Span(start, stop, inside, _shape(intervals, start, stop)))
    return pieces


def _whole(intervals: Intervals, units: list[Interval], start: int, stop: int) -> tuple[Interval, ...]:
    """The one call that several units of a piece are all of, if it lies within the piece."""
    if len(units) < 2:
        return tuple(units)
    parent = intervals.parent(units[0])
    while parent is not None and start <= parent.start and parent.stop <= stop:
        if all(parent.start <= unit.start and unit.stop <= parent.stop for unit in units):
            return (parent,)
        parent = intervals.parent(parent)
    return tuple(units)


def _shape(intervals: Intervals, start: int, stop: int) -> str:
    if intervals.is_wide(start, stop):
        return "block"
    return "layer" if intervals.has_weights(start, stop) else "glue"


# ---------------------------------------------------------------- from the modules


def _by_modules(intervals: Intervals, frontiers: Frontiers, units: Sequence[Interval]) -> list[Span]:
    gaps = gaps_between(intervals, units)
    boundaries = {0, intervals.end, *(gap.position for gap in gaps if gap.width == 1)}
    first = narrowest(intervals, 0, units[0].start) if units else 0
    last = narrowest(intervals, units[-1].stop, intervals.end, latest=False) if units else 0
    # what the model does outside any module before the first unit and after the last is no part of these
    boundaries.update(position for position in (first, last) if intervals.width[position] == 1)
    passed = [gap for gap in gaps if _passed_by(intervals, gap)]
    boundaries.update(gap.position for gap in passed)
    begun, ended = {id(gap.before) for gap in passed}, {id(gap.after) for gap in passed}
    for gap in gaps:  # the first of a run of such blocks begins where it begins, and the last ends where it ends
        # as far behind the last block as the others end: x + f(x) may stand outside of them
        behind = min((g.position - g.before.stop for g in passed if g.after is gap.before), default=0)
        last = min(gap.before.stop + behind, gap.position)  # what passed the run by may be joined to it just behind
        ends = id(gap.before) in ended and intervals.made_in(gap.before, last) == 1
        begins = id(gap.after) in begun and intervals.taken_by(gap.position, gap.after) == 1
        if gap.width > 1 and begins:
            boundaries.add(gap.position)
        elif gap.width == 1:  # and split off just before it
            first = gap.after.start
            boundaries.update([first] * (id(gap.after) in begun and intervals.taken_by(first, gap.after) == 1))
        boundaries.update([last] * ends)
    rungs = _rungs(intervals, gaps)
    if rungs:  # those inside of a round of a loop are none
        rungs &= around_rounds(intervals, frontiers, units, boundaries | rungs)
    boundaries = around_rounds(intervals, frontiers, units, boundaries)
    positions = [gap.position for gap in gaps]
    for start, stop in itertools.pairwise(sorted(boundaries)):
        inside = gaps[bisect.bisect_right(positions, start) : bisect.bisect_left(positions, stop)]
        # no narrow boundary over most of the graph: a ladder of states that are tuples
        if stop - start <= 0.5 * intervals.end or (len(inside) < 4 and not is_history(intervals, inside)):
            continue
        rounds = [b for b in rounds_of_lists(intervals, frontiers, units) if start < b < stop]
        if not rounds and not are_stages(inside):
            rounds = [gap.position for gap in between_rounds(intervals, inside)]
        boundaries.update(rounds)
    boundaries.update(rungs)
    return _glued(intervals, _between(intervals, units, sorted(boundaries)))


def _passed_by(intervals: Intervals, gap: Gap) -> bool:
    """Whether a gap between two like blocks is wide only because of values that pass both of them by.

    A long skip, kept for a decoder, does not make the blocks beside it one block.
    """
    if not are_like_blocks(intervals, gap) or gap.width == 1:
        return False
    # the widths that count for choosing leave out what decoders read, so they are compared with the full count
    alive = len(intervals.shapes(gap.position))
    return alive - intervals.passing_by(gap.position, gap.before, gap.after) == 1


def _rungs(intervals: Intervals, gaps: Sequence[Gap]) -> set[int]:
    """Gaps between three or more like blocks that hand on several values of the same shapes, all made anew by each.

    Two streams, positions and velocities, a signal and a sum of outputs. Parallel branches whose results are added up
    hand on a sum as well, but beside it their common input, which none of them makes anew.
    """
    found: set[int] = set()
    run: list[Gap] = []
    for gap in [*gaps, None]:
        if gap is not None and _hands_on_several(intervals, gap):
            start = run[-1].position if run else gap.before.start
            same = not run or intervals.shapes(start) == intervals.shapes(gap.position)
            if same and intervals.renewed(start, gap.position) >= 2 and (not run or run[-1].after == gap.before):
                run.append(gap)
                continue
        if len(run) >= 2:
            found.update(g.position for g in run)
        run = []
    return found


def _hands_on_several(intervals: Intervals, gap: Gap) -> bool:
    return gap.width > 1 and are_like_blocks(intervals, gap)


class _Units:
    """The module calls that are not opened any further, found from the root downwards."""

    def __init__(self, intervals: Intervals) -> None:
        self.intervals = intervals
        self._stages: dict[type, bool] = {}

    def of(self, call: Interval) -> list[Interval]:
        """The units inside a call."""
        units: list[Interval] = []
        for item in self.intervals.items(call):
            units.extend(self._opened(item) or [item])
        return units

    def _opened(self, item: Interval) -> list[Interval]:
        """The units of an item that is opened; empty when the item is itself a unit."""
        intervals = self.intervals
        if intervals.is_leaf(item):
            return []
        if intervals.repeats(item) and not self._is_stage(type(item.module)):
            return []
        inside = self.of(item)
        gaps = gaps_between(intervals, inside)
        narrow = max(intervals.base(item.start, item.stop), 1)
        if len(inside) > 1 and gaps and min(gap.width for gap in gaps) > narrow and not _repeats(intervals, inside):
            return []  # parallel branches: the item cannot be cut
        return inside

    def _is_stage(self, module_class: type) -> bool:
        """Whether calls of a class are stacks of blocks (to be opened) rather than blocks."""
        if module_class not in self._stages:
            calls = [c for c in self.intervals.calls if type(c.module) is module_class]
            numbered = any(self._numbered_items(call) for call in calls)
            self._stages[module_class] = numbered and (self._alike_regions(calls) or self._alike_children(calls))
        return self._stages[module_class]

    def _numbered_items(self, call: Interval) -> bool:
        """Whether most items bear one numbered name, as blocks in a list do and the parts of a block do not."""
        inside = [item for item in self.intervals.items(call) if not self.intervals.is_leaf(item)]
        patterns = Counter(item.pattern for item in inside if "#" in item.pattern[len(call.pattern) :])
        again = Counter(item.path for item in inside)  # one module called several times
        most = max([*patterns.values(), *again.values()], default=0)
        return most >= 2 and most >= 0.5 * len(inside)

    def _alike_regions(self, calls: list[Interval]) -> bool:
        """Each call holds wide regions only, several in one of them, that all consist of much the same operations."""
        intervals = self.intervals
        if not all(not intervals.is_leaf(c) and intervals.is_narrow_to_narrow(c) for c in calls):
            return False
        regions = [intervals.wide_regions(c.start, c.stop) for c in calls]
        if max(map(len, regions)) < 2:
            return False
        signatures = [intervals.operations(*region) for found in regions for region in found]
        return all(_similarity(signatures[0], signature) > 0.6 for signature in signatures)

    def _alike_children(self, calls: list[Interval]) -> bool:
        """Each call runs several blocks of one class, one after the other, with nothing wide between them."""
        intervals = self.intervals
        several = False
        for call in calls:
            if intervals.is_leaf(call):
                return False
            if not intervals.is_wide(call.start, call.stop):
                continue
            blocks = [
                item
                for item in intervals.items(call)
                if intervals.is_narrow_to_narrow(item) and intervals.is_wide(item.start, item.stop)
            ]
            if not blocks:
                return False
            most_common = Counter(type(block.module) for block in blocks).most_common(1)[0][0]
            alike = [block for block in blocks if type(block.module) is most_common]
            narrow = intervals.base(call.start, call.stop)
            if not _cover(intervals, blocks, alike[0].start, alike[-1].stop, narrow):
                return False
            several |= len(alike) >= 2
        return several


def _cover(intervals: Intervals, blocks: list[Interval], start: int, stop: int, base: int) -> bool:
    """Whether the graph is no wider than ``base`` wherever it is not inside one of the blocks."""
    inside = np.zeros(stop + 1, dtype=bool)
    for block in blocks:
        inside[block.start + 1 : block.stop] = True
    wide = intervals.width[start + 1 : stop] > base
    return not bool((wide & ~inside[start + 1 : stop]).any())


def _similarity(a: Counter[str], b: Counter[str]) -> float:
    return sum((a & b).values()) / max(1, sum((a | b).values()))


def _repeats(intervals: Intervals, units: Sequence[Interval]) -> bool:
    """Three or more units of one class, or calls of one module: a ladder, not parallel branches."""
    keys: Counter[Any] = Counter(id(u.module) if intervals.is_leaf(u) else type(u.module) for u in units)
    return max(keys.values()) >= 3


def _glued(intervals: Intervals, pieces: list[Span]) -> list[Span]:
    """Join norms, activations and pools to the plain layer before them, or after; never to a block."""
    plain = all(piece.shape != "block" for piece in pieces) and not intervals.has_convolutions
    of_linear_layers: dict[int, bool] = {}  # by the index of a parent
    joined: list[Span] = []
    for piece in pieces:
        last = joined[-1] if joined else None
        together = last is not None and (
            (piece.shape == "glue" and last.shape in ("layer", "glue"))
            or (piece.shape == "layer" and last.shape == "glue")
        )
        if last is not None and together and not (plain and _own_items(intervals, last, piece, of_linear_layers)):
            shape = "layer" if "layer" in (last.shape, piece.shape) else "glue"
            calls = _whole(intervals, [*last.calls, *piece.calls], last.start, piece.stop)
            joined[-1] = replace(last, stop=piece.stop, calls=calls, shape=shape)
        else:
            joined.append(piece)
    return joined


def _own_items(intervals: Intervals, before: Span, after: Span, of_linear_layers: dict[int, bool]) -> bool:
    """Whether two pieces are items of one Sequential of linear layers: there the author's items are the steps.

    What each parent was found to be is kept in ``of_linear_layers``: all its pairs of items ask the same.
    """
    if not before.calls or not after.calls:
        return False
    parents = {call.parent for call in (*before.calls, *after.calls)}
    parent = intervals.by_index.get(parents.pop()) if len(parents) == 1 else None
    if parent is None or type(parent.module) is not nn.Sequential:
        return False
    if parent.index not in of_linear_layers:
        weighted = [item for item in parent.module if any(p.dim() >= 2 for p in item.parameters())]
        of_linear_layers[parent.index] = all(isinstance(item, nn.Linear) for item in weighted)
    return of_linear_layers[parent.index]


# ---------------------------------------------------------------- from the operations alone


def _by_operations(intervals: Intervals, frontiers: Frontiers) -> list[Span]:
    """Without usable modules (scripted, functional, fused recurrent code): regions between cuts, else repeats."""
    end = intervals.end
    rounds = {b for loop in loops_of_products(intervals.graph, frontiers, range(end)) for b in loop.boundaries}
    regions = intervals.wide_regions(0, end)
    if len(rounds) > max(len(regions), _FEWEST_ROUNDS):  # a region that holds all of them is what a loop carries on
        return _between(intervals, [], sorted({0, end, *rounds}))
    if len(regions) >= 2:
        recurrent = [c for c in intervals.calls if isinstance(c.module, nn.RNNBase)]
        boundaries = {0, end, *(_before(start, recurrent) for start, _ in regions), *(stop for _, stop in regions)}
        return _glued(intervals, _between(intervals, [], sorted(boundaries)))
    repeat = tandem_repeat([operation(node) for node in intervals.graph.nodes])
    if repeat is not None:
        first, period, count = repeat
        if period * count > 0.4 * end:

            def alive(offset: int) -> tuple[int, int]:
                """How much is alive, and, the more the better, how often it is read: a state by skip and field."""
                places = range(first + offset, end, period)[1 : count - 1]  # inputs are not alive at both ends
                readers = sum(frontiers.readers(place, place - period) for place in places)
                return sum(int(intervals.width[place]) for place in places), -readers

            offset = min(range(period), key=alive)
            boundaries = {0, end, *range(first + offset, end, period)[:count]}
            return _between(intervals, [], sorted(boundaries))
    if not regions:
        return _glued(intervals, _between(intervals, [], [0, *frontiers.cuts(), end]))
    return []


def _around_rounds_of_products(
    intervals: Intervals, frontiers: Frontiers, units: Sequence[Interval], pieces: list[Span]
) -> list[Span]:
    """The pieces, the one of them divided in which a loop of three rounds or more runs that calls no module.

    Where several pieces have such a loop inside, it is a solver that belongs to a block, and the blocks are the steps.
    """
    within = {place for unit in units if unit.path for place in range(unit.start, unit.stop)}
    outside = [place for place in range(intervals.end) if place not in within]
    loops = loops_of_products(intervals.graph, frontiers, outside)
    found = [(i, loop) for i, p in enumerate(pieces) for loop in loops if p.start <= loop.start and loop.stop <= p.stop]
    if len(found) != 1 or found[0][1].count < _FEWEST_ROUNDS:
        return pieces
    place, loop = found[0]
    piece = pieces[place]
    divided = _between(intervals, units, sorted({piece.start, piece.stop, *loop.boundaries}))
    return [*pieces[:place], *divided, *pieces[place + 1 :]]


def _before(position: int, recurrent: Sequence[Interval]) -> int:
    """Where a region begins that is the loop over time of a recurrent layer: before its products with the inputs."""
    inside = [call.start for call in recurrent if call.start < position < call.stop]
    return inside[0] if inside else position
