"""Loops that a forward pass ran through: stretches of the graph that one pattern of operations repeats.

The code of a solver is a loop, and one round of it is one step, however often the field is evaluated in it. On the
graph a round shows as a period P: the operation at every position recurs P positions later, and so does what it reads,
unless that is held fixed. So the stages of a Runge-Kutta step, which read one another, are told from steps, although
both evaluate the same field again and again.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from torch.autograd.graph import Node

from stabkit.tracing.graph.frontiers import Frontiers
from stabkit.tracing.graph.graph import Graph
from stabkit.tracing.graph.scans import scans_between
from stabkit.tracing.graph.tandem import PRODUCTS, REDUCTIONS
from stabkit.tracing.graph.values import Value, meta_of, operation, outputs_of
from stabkit.vocabulary import moves

_JOINS = moves("join")
_REARRANGE = moves("permute")
_MOST_EVALUATIONS = 32  # in one round; explicit methods in use have at most 17 stages
_MOST_CANDIDATES = 64  # periods that are compared node by node

Signature = tuple[object, ...]
Anchor = tuple[int, int, str]  # where an evaluation begins and ends, and what is evaluated


@dataclass(frozen=True)
class Loop:
    """Rounds of one loop on the graph.

    Attributes:
        start: position where the first whole round begins.
        period: number of operations in a round.
        states: the values that every round takes up, and those that the last one leaves; what is held fixed, what
            is given to one round alone, and what waits for the end are none of them.
    """

    start: int
    period: int
    states: tuple[tuple[Value, ...], ...]

    @property
    def count(self) -> int:
        """How many whole rounds there are."""
        return len(self.states) - 1

    @property
    def carried(self) -> int:
        """How many values a round hands to the next."""
        return len(self.states[1])

    @property
    def stop(self) -> int:
        """Position where the last whole round ends."""
        return self.start + self.period * self.count

    def states_at(self, *positions: int) -> tuple[tuple[Value, ...], ...] | None:
        """The states at some positions; None unless rounds begin or end at all of them, and their states are known."""
        if any(position not in self.boundaries for position in positions):
            return None
        found = tuple(self.states[(position - self.start) // self.period] for position in positions)
        return found if all(found) and len(found[0]) == self.carried else None

    @property
    def boundaries(self) -> range:
        """The positions where rounds begin and end."""
        return range(self.start, self.stop + 1, self.period)


def find_loops(
    graph: Graph, frontiers: Frontiers, anchors: Sequence[Anchor], alike: Callable[[str], str] = str
) -> tuple[Loop, ...]:
    """The loops of a graph, in order; of loops that overlap the one that explains more of it.

    Args:
        graph: the recorded graph.
        frontiers: its live frontiers.
        anchors: evaluations that may recur, in order.
        alike: what paths of modules have in common that may take each other's place in another round.
    """
    found: list[tuple[int, Loop]] = []
    signature = _signatures(graph, alike)
    for period, places in _candidates(anchors).items():
        if _is_explained(period, places, found):
            continue
        for run in _runs(graph, period, signature):
            loop = _placed(graph, frontiers, anchors, run)
            if loop is None and (later := _behind_what_is_held(graph, run)) is not None:
                loop = _placed(graph, frontiers, anchors, later)
            if loop is not None and _explains(loop, anchors):
                found.append((run.last - run.first, loop))
    found = [item for item in found if not any(_is_of_rounds(item, other) for other in found)]
    # of periods that explain as much the shortest: two rounds are one period as well
    found.sort(key=lambda item: (-item[0], item[1].period))
    kept: list[Loop] = []
    for _, loop in found:
        if all(loop.stop <= other.start or other.stop <= loop.start for other in kept):
            kept.append(loop)
    return tuple(sorted(kept, key=lambda loop: loop.start))


def _is_of_rounds(item: tuple[int, Loop], other: tuple[int, Loop]) -> bool:
    """Whether one loop is several rounds of another at a time, and explains less than one round more.

    So it is where the first round reads what is no value of the loop: an input that moves up in a history.
    """
    (length, loop), (explained, shorter) = item, other
    several = loop.period % shorter.period == 0 and loop.period > shorter.period
    overlap = loop.start < shorter.stop and shorter.start < loop.stop
    return several and overlap and length - explained < shorter.period


def loops_of_calls(graph: Graph) -> tuple[Loop, ...]:
    """The loops of a graph whose rounds call the same modules again, the outermost such calls."""
    placed = [(graph.position(c.start), graph.position(c.stop), c.path) for c in graph.calls if c.finished]
    often = Counter(path for *_, path in placed)
    anchors: list[Anchor] = []
    for start, stop, path in sorted(placed, key=lambda call: (call[0], -call[1])):
        if stop > start and often[path] > 1 and (not anchors or start >= anchors[-1][1]):
            anchors.append((start, stop, path))
    return find_loops(graph, Frontiers(graph), anchors) if len(anchors) > 1 else ()


def loops_of_products(graph: Graph, frontiers: Frontiers, places: Iterable[int]) -> tuple[Loop, ...]:
    """The loops of a graph whose rounds multiply by matrices again, at some positions where no module tells of them.

    Where no such loop is, those whose rounds add up entries again (belief propagation, routing by agreement). The loop
    over time of a recurrent layer is one field, and rounds that take slice after slice of a tensor are time steps
    inside of a step of depth: neither is such a loop.
    """
    places = list(places)
    for kinds in (PRODUCTS, REDUCTIONS):
        anchors: list[Anchor] = []
        for place in places:
            node = graph.nodes[place]
            if operation(node).startswith(kinds) and node not in graph.recurrent:
                shapes = [meta_of(value).shape for value in (Value(node, 0), *graph.inputs[node])]
                anchors.append((place, place + 1, f"{operation(node)} {shapes}"))
        found = find_loops(graph, frontiers, anchors) if len(anchors) > 1 else ()
        found = tuple(loop for loop in found if not scans_between(graph, loop.start, loop.stop))
        if found:
            return found
    return ()


def loops_outside_layers(graph: Graph) -> tuple[Loop, ...]:
    """The loops of a graph whose rounds multiply by matrices that no layer of torch holds."""
    layers = [c for c in graph.calls if c.finished and type(c.module).__module__.startswith("torch.nn.")]
    within = {
        place
        for c in layers
        if any(p.dim() > 1 for p in c.module.parameters(recurse=False))
        for place in range(graph.position(c.start), graph.position(c.stop))
    }
    places = [place for place in range(len(graph.nodes)) if place not in within]
    return loops_of_products(graph, Frontiers(graph), places)


def _is_explained(period: int, places: Sequence[int], found: Sequence[tuple[int, Loop]]) -> bool:
    """Whether a period is that of several rounds of a loop that was found, or of too little beside one.

    Every round of a loop inside of another is a loop of its own: what recurs in the next one is not explained by it.
    """
    several = [loop for _, loop in found if period % loop.period == 0]
    low, high = min(places) - period, max(places) + 2 * period  # every round recurs with an evaluation
    beside = any(loop.start < high and low < loop.stop and length >= high - low for length, loop in found)
    return beside or all(
        any(loop.start <= place and place + period < loop.stop + loop.period for loop in several) for place in places
    )


def _candidates(anchors: Sequence[Anchor]) -> dict[int, list[int]]:
    """Distances between evaluations of the same thing, those first that occur most often, each with where it occurs."""
    places: defaultdict[int, list[int]] = defaultdict(list)
    for lag in range(1, min(len(anchors) - 1, _MOST_EVALUATIONS) + 1):
        for (before, _, what), (after, _, again) in zip(anchors, anchors[lag:], strict=False):
            if what == again and after > before:
                places[after - before].append(before)
    order = sorted(places, key=lambda period: (-len(places[period]), period))
    return {period: places[period] for period in order[:_MOST_CANDIDATES]}


def _explains(loop: Loop, anchors: Sequence[Anchor]) -> bool:
    """Whether every round holds an evaluation; of two rounds alone, whether others begin or end a round that was cut.

    Two stages of one step may look like two rounds, but then more evaluations follow than a last round could hold.
    """
    each = sum(loop.start <= start < loop.start + loop.period for start, *_ in anchors)
    before = sum(start < loop.start for start, *_ in anchors)
    after = sum(start >= loop.stop for start, *_ in anchors)
    return each > 0 and (loop.count > 2 or (before <= each and after < each))


def _signatures(graph: Graph, alike: Callable[[str], str]) -> Callable[[Node], Signature]:
    """What an operation has in common with its like in another round: its kind, its shapes, and the module it is in."""
    path = dict[Node, str]()
    for call in sorted((c for c in graph.calls if c.finished), key=lambda c: (c.start, -c.stop)):
        for node in graph.nodes[graph.position(call.start) : graph.position(call.stop)]:
            path[node] = alike(call.path)  # calls are nested, so the innermost comes last
    known: dict[Node, Signature] = {}

    def signature(node: Node) -> Signature:
        if node not in known:
            shapes = tuple(meta_of(value).shape for value in outputs_of(node))
            known[node] = (operation(node), path.get(node, ""), shapes, len(graph.inputs[node]))
        return known[node]

    return signature


@dataclass(frozen=True)
class _Run:
    """A stretch in which every operation recurs one period later.

    Attributes:
        first: where it begins.
        last: where the last operation that recurs has done so.
        period: how much later.
        begins: whether a state from before is taken up in it, so that a loop begins there, rather than its second round
            after a first one that lacks operations, since its state was a constant.
    """

    first: int
    last: int
    period: int
    begins: bool


def _runs(graph: Graph, period: int, signature: Callable[[Node], Signature]) -> Iterator[_Run]:
    """Longest stretches of two rounds or more.

    In the first round the state may come from anywhere before; later it is what the round before made, or, of a method
    with a history, what moved up in it.
    """
    nodes = graph.nodes
    first = 0
    entered: list[tuple[int, Value, Value]] = []  # where a round takes up a state: that of the first, and the next one
    for position in range(len(nodes) - period + 1):
        states = None
        if position + period < len(nodes) and signature(nodes[position]) == signature(nodes[position + period]):
            states = _states(graph, position, period)
        earliest = first
        if states is None:
            earliest = position + 1
        else:
            for old, new in states:
                others = (place + 1 for place, known, image in entered if known == old and image != new)
                earliest = max(earliest, graph.rank.get(old.node, -1) + 1, *others)
                if not any(place == position - period and image == old for place, _, image in entered):
                    earliest = max(earliest, position - period + 1)
        if earliest > first:
            if position - first >= period:
                yield _Run(first, position + period, period, bool(entered))
            first = earliest
            entered = [entry for entry in entered if entry[0] >= first]
        if states and first <= position:
            entered.extend((position, old, new) for old, new in states)


def _states(graph: Graph, position: int, period: int) -> list[tuple[Value, Value]] | None:
    """What an operation reads that is neither held fixed nor one period older than what its like reads; None: unlike.

    Each is a value from before the loop, with the one that a round has put in its place.
    """
    found: list[tuple[Value, Value]] = []
    pairs = zip(graph.inputs[graph.nodes[position]], graph.inputs[graph.nodes[position + period]], strict=True)
    for old, new in pairs:
        before, after = (graph.rank.get(value.node, -1) for value in (old, new))
        if old.node is new.node:
            continue  # held fixed, or the next of a sequence of inputs
        if after - before == period and old.output == new.output and before >= 0:
            continue
        if meta_of(old).shape != meta_of(new).shape or after < 0:
            return None
        found.append((old, new))
    return found


def _behind_what_is_held(graph: Graph, run: _Run) -> _Run | None:
    """A run without the operations of its first round whose results the last one reads too: an initial residual.

    What makes it ends as the rounds do, in the same activation, and so seems to be a part of one.
    """
    final = {v for node in graph.nodes[run.last - run.period : run.last] for v in graph.inputs[node]}
    made = [graph.rank.get(v.node, -1) for v in final]
    held = [rank for rank in made if run.first <= rank < run.first + run.period]
    first = max(held, default=run.last) + 1
    return replace(run, first=first, begins=True) if run.last - first >= 2 * run.period else None


def _placed(graph: Graph, frontiers: Frontiers, anchors: Sequence[Anchor], run: _Run) -> Loop | None:
    """The loop of a stretch, its rounds divided where the least is alive; None when it has no state to hand on."""
    first, last, period = run.first, run.last, run.period
    carried = _carried(graph, frontiers, first, last)

    # a method remembers nothing of the loop at its beginning, and forgets towards its end
    middle = first + ((last - first) // period // 2) * period

    def alive(offset: int) -> tuple[int, int]:
        values = carried(middle + offset if middle + offset < last else middle + offset - period)
        return len(values), sum(meta_of(value).numbers for value in values)

    def rearranged(offset: int) -> int:
        """How many of the values are laid out for the one operation behind, which may be another way than the rest."""
        values = carried(middle + offset if middle + offset < last else middle + offset - period)
        return sum(operation(value.node) in _REARRANGE for value in values)

    within = {p for start, stop, _ in anchors if first <= start < last for p in range(start + 1, min(stop, last))}
    offsets = [o for o in range(min(period, last - first - 2 * period + 1)) if first + o + period not in within]
    if not offsets:
        return None
    sizes = {offset: alive(offset) for offset in offsets}
    least = min(sizes.values())
    equals = [offset for offset in offsets if sizes[offset] == least]
    start = first + min(equals, key=rearranged)
    if not run.begins:  # then as late as can be before something is evaluated
        begins = [start for start, *_ in anchors if start >= first + period]
        wait = {o: min((b for b in begins if b >= first + o + period), default=last) - o for o in equals}
        start = first + min(equals, key=lambda offset: (rearranged(offset), wait[offset]))
    count = (last - start) // period
    if count < 3 and _feeds_rounds(graph, start, period):
        return None  # the two stages of a midpoint step, x + h/2 f(x) and then x + h f of that
    left, made = (carried(start + k * period) for k in (count, count - 1))
    older = {(graph.rank[value.node] + period, value.output) for value in made}
    if not made or not {(graph.rank[value.node], value.output) for value in left} <= older:
        return None  # what earlier rounds made is kept: these are the stages of one step, not steps
    states = [tuple(left), tuple(made)]
    for k in range(count - 2, -1, -1):
        states.append(_before(graph, start + k * period, run, states[-1]))
        if not set(carried(start + k * period)) <= set(states[-1]):
            return None
    return Loop(start, period, tuple(states[::-1]))


def _before(graph: Graph, start: int, run: _Run, after: Sequence[Value]) -> tuple[Value, ...]:
    """The values in whose places the round after this one, or a later one, takes up what this one hands to it.

    What waits at the end for a reader behind the loop is in the place of what its like made one round before.
    """
    found: dict[Value, Value] = {}
    nodes = graph.nodes[start : run.last]
    for node, like in zip(nodes, nodes[run.period :], strict=False):
        if len(found) == len(after):
            break
        for old, new in zip(graph.inputs[node], graph.inputs[like], strict=True):
            if new in after and old != new:
                found.setdefault(new, old)
    for value in after:
        made = graph.rank.get(value.node, -1) - run.period
        if value not in found and made >= run.first:
            found[value] = Value(graph.nodes[made], value.output)
    return tuple(found[value] for value in after if value in found)


def _feeds_rounds(graph: Graph, start: int, period: int) -> bool:
    """Whether what the first round takes up as its state is held fixed besides, and read again by the next one."""
    rounds = [graph.nodes[a : a + period] for a in (start, start + period)]
    entered: set[Value] = set()
    for node, like in zip(*rounds, strict=True):
        pairs = zip(graph.inputs[node], graph.inputs[like], strict=True)
        entered.update(old for old, new in pairs if old.node is not new.node and graph.rank.get(old.node, -1) < start)
    return any(value in entered for node in rounds[1] for value in graph.inputs[node])


def _carried(graph: Graph, frontiers: Frontiers, first: int, last: int) -> Callable[[int], list[Value]]:
    """For a position between two others the values that were made after the first, and that the loop goes on with.

    Not those that only wait to be put together: what a recurrent network returns of every round.
    """
    born: list[list[Value]] = [[] for _ in range(last - first + 1)]
    dies: list[list[Value]] = [[] for _ in range(last - first + 2)]
    for node in graph.nodes[first:last]:
        for value in outputs_of(node):
            if value not in frontiers.last_use:
                continue
            later = {graph.rank[n]: operation(n) in _JOINS for n in frontiers.consumers.get(value, ())}
            readers = [rank for rank, joins in later.items() if rank < last or not joins]
            end = len(graph.nodes) if value in graph.targets else max(readers, default=-1)
            if end >= frontiers.born[value]:
                born[frontiers.born[value] - first].append(value)
                dies[min(end - first, last - first) + 1].append(value)
    alive: dict[Value, None] = {}
    at: list[list[Value]] = []
    for arriving, leaving in zip(born, dies, strict=False):
        for value in leaving:
            del alive[value]
        alive.update(dict.fromkeys(arriving))
        at.append(list(alive))
    return lambda position: at[position - first]
