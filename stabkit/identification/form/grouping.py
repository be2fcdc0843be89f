"""Which steps belong together, because one method spans them."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence

from stabkit.identification.form.accumulated import is_renewed_beside_sum
from stabkit.identification.form.operations import ADDS, JOINS, MOVES, SCALES, WRITES
from stabkit.identification.form.pieces import Piece
from stabkit.identification.form.slots import parts_of
from stabkit.tracing import Flow
from stabkit.tracing.graph.graph import element_of
from stabkit.tracing.graph.loops import Loop
from stabkit.tracing.graph.values import Value, meta_of, operation
from stabkit.vocabulary import NormFacts

_STREAMS = (
    3  # two that are renewed by turns are told by other marks: they may be one state and what is made ahead of it
)
_PARTS = 8  # into which a layer of several states is cut at most


def groups(flow: Flow, loops: Sequence[Loop] = ()) -> tuple[tuple[int, int], ...]:
    """Half-open ranges of steps, each one method.

    Single steps, rounds of loops that were cut, cut branches, pairs of reversible half-steps, sweeps over several
    streams, a state and a sum beside it that are renewed by turns, the last of a run of like steps where it was cut
    before its end, and additions with the norm behind each.
    """
    found: list[tuple[int, int]] = []
    start = 0
    while start < len(flow.steps):
        stop = _round(flow, start, loops) or _branch(flow, start) or _filled(flow, start) or _of_several(flow, start)
        stop = stop or _half_steps(flow, start) or _sweep(flow, start) or _cut_short(flow, start)
        stop = stop or _normed(flow, start) or start + 1
        found.append((start, stop))
        start = stop
    return tuple(found)


def _round(flow: Flow, start: int, loops: Sequence[Loop]) -> int | None:
    """The end of a round of a loop that was cut: between stages, or between the parts of a splitting."""
    begin = flow.states[start].position
    loop = next((loop for loop in loops if begin in loop.boundaries and begin < loop.stop), None)
    if loop is None:
        return None
    return next((i for i in range(start + 1, len(flow.states)) if flow.states[i].position in loop.boundaries), None)


def is_round(flow: Flow, start: int, stop: int, loops: Sequence[Loop]) -> bool:
    """Whether some steps are a round of a loop that was cut."""
    return _round(flow, start, loops) == stop


def is_divided(flow: Flow, start: int, stop: int, loops: Sequence[Loop]) -> bool:
    """Whether some steps are a round of a loop, and each of them leads from one tensor to one: a splitting."""
    begin = flow.states[start].position
    loop = next((loop for loop in loops if begin in loop.boundaries and begin < loop.stop), None)
    inside = range(start + 1, stop)
    return loop is not None and bool(inside) and all(_made(flow, loop, index) == 1 for index in inside)


def is_part_of_round(flow: Flow, start: int, stop: int, loops: Sequence[Loop]) -> bool:
    """Whether some steps begin or end within a round of a loop, where more is alive than the one tensor of its state.

    As many operations as a round has are one, wherever it is divided.
    """
    begin, end = flow.states[start].position, flow.states[stop].position
    for loop in loops:
        ends = {index: flow.states[index].position for index in (start, stop)}
        cut = [i for i, p in ends.items() if loop.start < p < loop.stop and p not in loop.boundaries]
        if not cut or begin >= loop.stop or end <= loop.start:
            continue
        alive = {_made(flow, loop, index) for index in cut}
        whole = (end - begin) % loop.period == 0 and len(cut) == 2 and alive == {loop.carried}
        if not whole and not (loop.carried == 1 and alive == {1}):
            return True
    return False


def _made(flow: Flow, loop: Loop, index: int) -> int:
    """How many of the values of a state a loop has made, or taken up at its beginning."""
    rank = flow.recorded.graph.rank
    return sum(rank.get(v.node, -1) >= loop.start or v in loop.states[0] for v in flow.states[index].values)


def _branch(flow: Flow, start: int) -> int | None:
    """The end of a step that was cut inside its branch: the state at its start stays alive in all states between.

    None in a history that every step before has added to: that one is not read again is no sign that it was cut.
    """
    source = flow.states[start].values
    if start and set(flow.states[start - 1].values) < set(source):
        return None
    return next((stop for old in source if (stop := _end_of(flow, start, old)) is not None), None)


def _end_of(flow: Flow, start: int, old: Value) -> int | None:
    """Where one value has replaced an old one, after two steps or more that had the old one at hand.

    Values beside it, such as the source of an equation, stay alive to the end, or were alive before.
    """
    beside = {v for v in flow.states[start].values if v != old}
    for stop in range(start + 1, len(flow.states)):
        values = flow.states[stop].values
        if old in values:
            if not beside <= set(values) or (beside and not _reads(flow, stop - 1, old)):
                return None
            continue
        new = [v for v in values if v not in beside]
        if stop == start + 1 or len(new) != 1 or meta_of(new[0]).shape != meta_of(old).shape:
            return None
        stays = beside <= set(values) or (start > 0 and beside <= set(flow.states[start - 1].values))
        fed = _feeds_steps(flow, start, stop) or _feeds_systems(flow, start, stop, old)
        return stop if stays and not fed else None
    return None


def _of_several(flow: Flow, start: int) -> int | None:
    """The end of a layer of several states that was cut between their renewals, as its neighbour of the same cuts was.

    A stack whose layers are no modules is cut at every convolution: x + r(z) beside a sum of s(z), z a gated map of x.
    """
    old = flow.states[start].values
    shapes = {i: sorted(flow.states[i].sample_shapes) for i in range(start, min(start + _PARTS, len(flow.steps)) + 1)}
    for stop in range(start + 2, min(start + _PARTS, len(flow.steps)) + 1):
        new, size = flow.states[stop].values, stop - start
        if set(old) & set(new):
            continue
        alike = [_operations(flow, start, stop) == _operations(flow, i, i + size) for i in (stop, start - size)]
        # as many values of these shapes would be a state by themselves, as those of methods that remember are
        between = all(
            set(old) & set(flow.states[i].values) and shapes[i] != shapes[stop] for i in range(start + 1, stop)
        )
        if not any(alike) or not between or len(new) < 2:
            continue
        if len(old) != len(new) and not (len(old) == 1 and alike[0]):
            return None
        graph = flow.recorded.graph
        nodes = graph.nodes[flow.states[start].position : flow.states[stop].position]
        carrying = Piece(graph, nodes, old, new).carrying
        return stop if sum(v in carrying for v in new) == len(old) else None
    return _last_of_several(flow, start)


def _last_of_several(flow: Flow, start: int) -> int | None:
    """The end of the last such layer, of which a part is left out and the rest may go on into what follows."""
    for size in range(2, _PARTS + 1):
        before = _operations(flow, start - size, start)
        if before is None or before != _operations(flow, start - 2 * size, start - size):
            continue
        steps = [step.operations for step in flow.steps[start : start + size]]
        same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(before, steps, strict=False)))
        begun = 0 < same < len(steps) and steps[same][: len(before[same])] == before[same]
        kept = set(flow.states[start].values) & set(flow.states[min(start + same, len(flow.states) - 1)].values)
        return start + same + 1 if begun and kept and len(flow.states[start].values) > 1 else None
    return None


def _operations(flow: Flow, start: int, stop: int) -> list[tuple[str, ...]] | None:
    return [step.operations for step in flow.steps[start:stop]] if 0 <= start < stop <= len(flow.steps) else None


def _filled(flow: Flow, start: int) -> int | None:
    """The end of steps that were cut while the values of a field are written into one tensor, which holds all stages.

    Between them the state is alive, and beside it a tensor of several times its size that is read and written again.
    """
    graph, shape = flow.recorded.graph, meta_of(flow.states[start].values[0]).shape
    if len(flow.states[start].values) > 1:
        return None
    for stop in range(start + 1, len(flow.states)):
        values, nodes = flow.states[stop].values, graph.nodes[flow.states[stop].position :]
        written = [v for v in values if operation(v.node) in WRITES and meta_of(v).shape != shape]
        readers = [{operation(n) for n in nodes if v in graph.inputs[n]} for v in written]
        filled = any(names & WRITES and names - WRITES for names in readers)
        if not filled or len(values) != len(written) + 1:
            return stop if stop > start + 1 and len(values) == 1 else None
    return None


def _reads(flow: Flow, step: int, value: Value) -> bool:
    graph = flow.recorded.graph
    nodes = graph.nodes[flow.states[step].position : flow.states[step + 1].position]
    return any(value in graph.inputs[node] for node in nodes)


def _feeds_steps(flow: Flow, start: int, stop: int) -> bool:
    """Whether the state at the start stays alive because steps of their own read it, each of which has a skip (x0)."""
    if stop - start < 4:
        return False
    graph, fed = flow.recorded.graph, flow.states[start].values[0]
    for before, after in itertools.pairwise(flow.states[start + 1 : stop]):
        nodes = graph.nodes[before.position : after.position]
        new = [v for v in after.values if v not in before.values]
        old = max((v for v in before.values if v != fed), key=lambda v: graph.rank.get(v.node, -1), default=fed)
        if len(new) != 1 or not any(fed in graph.inputs[node] for node in nodes):
            return False
        others = [v for v in before.values if v != old]
        if new[0] not in Piece(graph, nodes, [old], new, contexts=others).carrying:
            return False
    return True


def _feeds_systems(flow: Flow, start: int, stop: int, fed: Value) -> bool:
    """Whether the state at the start stays alive because steps read it that renew three others or more each."""
    count = 0
    for index in range(start + 1, stop):
        before, after = ([v for v in flow.states[i].values if v != fed] for i in (index, index + 1))
        renewed = set(after) - set(before)
        count += len(before) == len(after) and len(renewed) >= _STREAMS and _reads(flow, index, fed)
    return count > 1


def _cut_short(flow: Flow, start: int) -> int | None:
    """The end of a step and the rest of it, which together repeat the step before."""
    if not 0 < start < len(flow.steps) - 1:
        return None
    before, first, rest = (flow.steps[i].operations for i in range(start - 1, start + 2))
    same = flow.states[start].sample_shapes == flow.states[start + 2].sample_shapes
    return start + 2 if same and first + rest == before else None


def with_norms(flow: Flow, start: int, stop: int) -> list[tuple[int, int]]:
    """Single steps, each with the norm behind its addition where that is a step of its own."""
    found = list[tuple[int, int]]()
    while start < stop:
        end = _normed(flow, start)
        found.append((start, end if end is not None and end <= stop else start + 1))
        start = found[-1][1]
    return found


def _normed(flow: Flow, start: int) -> int | None:
    """The end of an addition and of the norm behind it, as there are others: post-norm layers that are cut in two.

    Behind the last layer alone a norm belongs to what follows, as in a network with norms inside its branches.
    """
    steps, norm = flow.steps, start + 1
    if norm == len(steps) or not _is_norm(flow, norm) or not _is_addition(flow, start):
        return None
    pair = steps[start].operations, steps[norm].operations
    others = (i for i in range(1, len(steps)) if i != norm and (steps[i - 1].operations, steps[i].operations) == pair)
    return start + 2 if any(_is_norm(flow, i) for i in others) else None


def _is_norm(flow: Flow, step: int) -> bool:
    """Whether a step from one tensor to another does nothing but norm it."""
    before, after = flow.states[step], flow.states[step + 1]
    graph, nodes = flow.recorded.graph, flow.recorded.graph.nodes[before.position : after.position]
    norm = element_of(graph, nodes[0]) if nodes else None
    if norm is None or not isinstance(norm.facts, NormFacts):
        return False
    whole = before.values == (norm.source,) and after.values == (norm.target,)
    return whole and all(element_of(graph, node) == norm for node in nodes[1:])


def _is_addition(flow: Flow, step: int) -> bool:
    """Whether a step from one tensor to another ends with a sum of it, by numbers, and something else."""
    before, after = flow.states[step], flow.states[step + 1]
    if len(before.values) != 1 or len(after.values) != 1 or operation(after.values[0].node) not in ADDS:
        return False
    graph, stack = flow.recorded.graph, list(after.values)
    while stack:
        value = stack.pop()
        if value in before.values:
            return True
        if operation(value.node) in ADDS | MOVES | SCALES and graph.rank.get(value.node, -1) >= before.position:
            stack.extend(graph.inputs[value.node])
    return False


def _half_steps(flow: Flow, start: int) -> int | None:
    """The end of a pair of half-steps of two streams, y_1 = x_1 + F(x_2) and then y_2 = x_2 + G(y_1).

    Seen one by one these are two-step methods s_{n+1} = s_{n-1} + F(s_n). That the streams are parts of one tensor
    tells them apart; or that every other step renews both streams, as when velocity Verlet is cut between its kicks.
    """
    if start + 1 >= len(flow.steps):
        return None
    if is_renewed_beside_sum(flow, start):
        return start + 2
    if _alternates(flow, start) and (_alternates(flow, start + 2) or _alternates(flow, start - 2)):
        return start + 2
    if not split_before(flow, start):
        return None
    return start + 2 if _is_shift(flow, start) and _is_shift(flow, start + 1) else None


def _sweep(flow: Flow, start: int) -> int | None:
    """The end of one call of a block, of which there are others, that renews three or more streams one by one."""
    graph, before = flow.recorded.graph, flow.states[start]
    count = len(before.values)
    if count < _STREAMS:
        return None
    calls = [call for call in graph.calls if call.finished]
    often = Counter(type(call.module) for call in calls)
    children: dict[int, int] = {}  # where the first part of every call begins
    for call in calls:
        children.setdefault(call.parent, graph.position(call.start))
    begins = {c.index: (graph.position(c.start), children.get(c.index, -1)) for c in calls if often[type(c.module)] > 1}
    ends = {graph.position(c.stop) for c in calls if _lies(before.position, begins.get(c.index))}
    for stop in range(start + 2, len(flow.steps) if ends else 0):
        after = flow.states[stop]
        passed = {end for end in ends if end <= after.position}
        if not passed:
            continue
        whole = after.position in passed or any(_lies(after.position, begin) for begin in begins.values())
        between = {len(state.values) for state in flow.states[start:stop]}
        renewed = after.sample_shapes == before.sample_shapes and not set(before.values) & set(after.values)
        pairs = itertools.pairwise(set(state.values) for state in flow.states[start : stop + 1])
        renewed = renewed and all(a & b for a, b in pairs)  # a step that renews all of them is one by itself
        # a decoder joins what was kept for it, which no step before has renewed
        left = set(before.values) & set(flow.states[stop - 1].values)
        joined = len(after.values) == 1 and operation(after.values[0].node) in JOINS and len(left) < 2
        return stop if between == {count} and ((whole and renewed) or joined) else None
    return None


def _lies(position: int, begin: tuple[int, int] | None) -> bool:
    """Whether a position lies between the beginning of a call and that of its first part."""
    return begin is not None and begin[0] <= position <= begin[1]


def split_before(flow: Flow, start: int) -> bool:
    """Whether the two streams before a step were split off one tensor."""
    for index in range(start, -1, -1):
        state = flow.states[index]
        if len(state.values) == 1:
            parts = parts_of(flow.recorded.graph, flow.recorded.graph.nodes[state.position :], state.values[0])
            return parts is not None and len(parts) == 2
        if len(state.values) != 2:
            return False
    return False


def _alternates(flow: Flow, start: int) -> bool:
    """Whether a step renews one of two streams, and the next one both."""
    if not 0 <= start < len(flow.steps) - 1:
        return False
    a, b, c = (set(flow.states[i].values) for i in range(start, start + 3))
    return len(a) == len(b) == len(c) == 2 and len(a & b) == 1 and not b & c


def _is_shift(flow: Flow, index: int) -> bool:
    """Whether a step replaces the older of two streams and keeps the younger; streams may just be split or joined."""
    graph = flow.recorded.graph
    before, after = flow.states[index], flow.states[index + 1]
    nodes = graph.nodes[before.position : after.position]
    old = list(before.values)
    if len(old) == 1:
        parts = parts_of(graph, graph.nodes[before.position :], old[0])
        old = list(parts) if parts else old
    new = list(after.values)
    if len(new) == 1:
        inputs = graph.inputs.get(new[0].node, [])
        new = [v for v in inputs if v not in old or v in before.values]
        return len(new) == 2 and any(v in before.values for v in inputs) and bool(nodes)
    kept = [v for v in new if v in old]
    return len(old) == 2 and len(new) == 2 and len(kept) == 1


def is_repeated(flow: Flow, start: int, stop: int) -> bool:
    """Whether the step before a single one, or the one behind it, does the same operations."""
    near = [i for i in (start - 1, stop) if 0 <= i < len(flow.steps)]
    return stop == start + 1 and any(flow.steps[i].operations == flow.steps[start].operations for i in near)
