"""Which values of a recorded state are the states of the method, and which old one a new one follows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch.autograd.graph import Node

from stabkit.identification.form.accumulated import moves_in_turn
from stabkit.identification.form.operations import ADDS, JOINS, MOVES, SCALES
from stabkit.tracing import Flow
from stabkit.tracing.graph.graph import Graph
from stabkit.tracing.graph.loops import Loop
from stabkit.tracing.graph.values import Value, meta_of, operation, outputs_of
from stabkit.tracing.products.node_derivatives import apply_node
from stabkit.vocabulary import is_activation, moves

_SPLITS = moves("select")
_REARRANGE = moves("reshape") | moves("permute")
_FEW_MOVES = 4
_COLLECTED = 3  # values that a join puts side by side: two are a skip and what it leads around


@dataclass(frozen=True, eq=False)
class Slots:
    """States of a method before and after some steps.

    Attributes:
        sources: old states; the parts of one tensor where the code splits it at once.
        targets: new states, in the same order.
        contexts: values held fixed: the input of a recurrent network.
        split: whether the states are parts of one tensor.
        earlier: how many steps of the flow before the first one the old states were made.
    """

    sources: tuple[Value, ...]
    targets: tuple[Value, ...]
    contexts: tuple[Value, ...]
    split: bool
    earlier: int = 0


def slots(flow: Flow, start: int, stop: int, loops: Sequence[Loop] = ()) -> Slots:
    """The states of the method that leads from ``states[start]`` to ``states[stop]``.

    Values that only wait for the output (the hidden states that a recurrent network returns) are none. A value that
    passes unchanged while a younger one is replaced is a context, unless values take turns in its place: these are the
    history of a multistep method. What was a context before stays one where the method ends. Of rounds of a loop the
    states are known: what is alive beside them is a context.
    """
    graph = flow.recorded.graph
    before, after = flow.states[start], flow.states[stop]
    nodes = graph.nodes[before.position : after.position]
    used = {v for node in nodes for v in graph.inputs[node]}
    rounds = next(filter(None, (loop.states_at(before.position, after.position) for loop in loops)), None)
    if rounds is not None:
        old, new = [v for v in rounds[0] if v in before.values], [v for v in rounds[1] if v in after.values]
        return _arranged(graph, nodes, old, new, tuple(v for v in before.values if v in used and v not in old))
    if stop < len(flow.steps):
        end = flow.states[stop + 1].position
        last = collectors(flow)
        later = {v for node in graph.nodes[after.position : end] if node not in last for v in graph.inputs[node]}
        new = [v for v in after.values if v in later]
    else:
        new = list(after.values)
    new = [v for v in new if v in used or v not in before.values]  # the others only pass by, on their way to the output
    new = _without_collected(flow, new, start, stop)
    old = [v for v in before.values if v in used]
    if stop < len(flow.steps) and len(new) < len(old):
        new = _with_waiting(flow, nodes, [v for v in old if v not in after.values], stop, new)
    waiting = _queued(flow, before.values, after.values, old, new)
    if waiting is not None and moves_in_turn(flow, start, stop, *waiting):
        return _arranged(graph, nodes, *waiting, ())
    fed = (*_read_ahead(flow, nodes, old, new), *_held_for_later(flow, old, new, stop))
    old, new = [v for v in old if v not in fed], [v for v in new if v not in fed]
    contexts = _contexts(flow, start, old, new)
    if not contexts and not moves_in_turn(flow, start, stop, old, new):
        contexts = [v for v in old if v in new]
    old, new = [v for v in old if v not in contexts], [v for v in new if v not in contexts]
    return _arranged(graph, nodes, old, new, (*contexts, *(v for v in fed if v in before.values)))


def beside_outputs(flow: Flow, start: int, stop: int) -> Slots | None:
    """The states of a step whose new one is put beside outputs of the steps before at once; None for other steps.

    What only passes into that join is no state: outputs of a model that are collected and stacked.
    """
    graph, before, after = flow.recorded.graph, flow.states[start].values, flow.states[stop].values
    nodes = graph.nodes[flow.states[start].position : flow.states[stop].position]
    parts = joined(graph, nodes, after[0]) if len(after) == 1 else None
    made = [part for part in parts or () if part not in before]
    if parts is None or len(made) != 1 or len(parts) <= _COLLECTED:
        return None
    last = {n for n in nodes if operation(n) in JOINS and set(parts) == set(graph.inputs[n])}
    read = {v for node in nodes if node not in last for v in graph.inputs[node]}
    old = [v for v in before if v in read]
    return Slots(tuple(sorted(old, key=lambda v: _born(graph, v))), (made[0],), (), False) if len(old) > 1 else None


def collectors(flow: Flow) -> set[Node]:
    """The joins, if any, that put what was kept for it side by side as the output, which may be moved after that."""
    values = list(flow.states[-1].values)
    found: set[Node] = set()
    while values:
        value = values.pop()
        if operation(value.node) in JOINS:
            found.add(value.node)
        elif operation(value.node) in _REARRANGE:
            values.extend(flow.recorded.graph.inputs.get(value.node, ()))
    return found


def _held_for_later(flow: Flow, old: list[Value], new: list[Value], stop: int) -> tuple[Value, ...]:
    """Old values that are read, pass unchanged, and are read again later than in the next step: data of every other."""
    after = flow.states[stop]
    passing = [v for v in old if v in after.values and v not in new]
    later = {v for node in flow.recorded.graph.nodes[after.position :] for v in flow.recorded.graph.inputs[node]}
    held = tuple(v for v in passing if v in later and not _is_collected(flow, v, stop))
    return held if len(held) < len(old) else ()


def _without_collected(flow: Flow, new: list[Value], start: int, stop: int) -> list[Value]:
    """New values without those of earlier steps that are only kept for the one join of what all steps made."""
    made = [v for v in new if v not in flow.states[start].values]
    if not made:
        return new
    shape = meta_of(made[-1]).shape
    return [v for v in new if v in made or meta_of(v).shape != shape or not _is_collected(flow, v, stop)]


def _is_collected(flow: Flow, value: Value, stop: int) -> bool:
    """Whether nothing behind a state reads a value but one join, of several states."""
    graph = flow.recorded.graph
    readers = [node for node in graph.nodes[flow.states[stop].position :] if value in graph.inputs[node]]
    if len(readers) != 1 or operation(readers[0]) not in JOINS:
        return False
    states = {v for state in flow.states for v in state.values}
    return len(states.intersection(graph.inputs[readers[0]])) >= _COLLECTED


def _with_waiting(flow: Flow, nodes: Sequence[Node], dropped: list[Value], stop: int, new: list[Value]) -> list[Value]:
    """New values with those that wait for a later step than the next one: an encoder's result, a sum beside the state.

    Where there are others, those alone that follow an old one along additions and numbers; what is collected for the
    output, by a join at the end, does not count as read.
    """
    graph, after = flow.recorded.graph, flow.states[stop]
    last = collectors(flow)
    read = {v for node in graph.nodes[after.position :] if node not in last for v in graph.inputs[node]}
    made, follows = set(nodes), set(dropped)
    for node in nodes:
        passes = operation(node) in ADDS | MOVES or (operation(node) in SCALES and len(graph.inputs[node]) == 1)
        passes = passes or is_activation(node)
        if passes and not follows.isdisjoint(graph.inputs[node]):
            follows.update(outputs_of(node))
    waiting = [v for v in after.values if v.node in made and v in read and (not new or v in follows)]
    return [*new, *(v for v in waiting if v not in new)]


def _queued(
    flow: Flow, before: Sequence[Value], after: Sequence[Value], old: list[Value], new: list[Value]
) -> tuple[list[Value], list[Value]] | None:
    """Old and new states with those that wait in a queue, x_(n-k), ..., x_n; None where no values queue up.

    All of them are of one shape, each lives as long as the others, and every step takes one out and puts one in.
    """
    dropped, made = [v for v in before if v not in after], [v for v in after if v not in before]
    if len(before) != len(after) or len(dropped) != 1 or len(made) != 1 or len(before) <= max(len(old), len(new)):
        return None
    shapes = {meta_of(v).shape for v in (*before, *after)}
    lives = {_span(flow, v) for v in (*dropped, *made)}
    whole = len(shapes) == 1 and lives == {len(before)}
    return (list(before), list(after)) if whole else None


def _arranged(
    graph: Graph, nodes: Sequence[Node], old: list[Value], new: list[Value], contexts: tuple[Value, ...]
) -> Slots:
    """States in the order in which they were made, or the parts of them."""
    sources, targets = (sorted(values, key=lambda v: (_born(graph, v), v.output)) for values in (old, new))
    targets = _by_shape(sources, targets)
    parted = _parted(graph, nodes, sources, targets)
    if parted is not None:
        return Slots(*parted, contexts, True)
    return Slots(tuple(sources), tuple(targets), contexts, False)


def laid_out_alike(graph: Graph, nodes: Sequence[Node], found: Slots) -> Slots:
    """One state behind moves that it alone passes at once, or before such that end the step, where shapes then agree.

    A batch that comes first between layers, and time first inside of one, is one state.
    """
    source, target = found.sources[0], found.targets[0]
    starts, ends = [source], [target]
    while (after := _moved_on(graph, nodes, starts[-1])) is not None and len(starts) <= _FEW_MOVES:
        starts.append(after)
    while operation(ends[-1].node) in _REARRANGE and len(ends) <= _FEW_MOVES and ends[-1].node in nodes:
        ends.append(graph.inputs[ends[-1].node][0])
    for a in starts:
        for b in ends:
            if meta_of(a).shape == meta_of(b).shape and a != b:
                return replace(found, sources=(a,), targets=(b,))
    return found


def _moved_on(graph: Graph, nodes: Sequence[Node], value: Value) -> Value | None:
    """What a value is after the one operation that reads it, when that puts its entries into another order."""
    readers = [node for node in nodes if value in graph.inputs[node]]
    if len(readers) != 1 or operation(readers[0]) not in _REARRANGE or len(graph.inputs[readers[0]]) != 1:
        return None
    return Value(readers[0], 0)


def _by_shape(sources: list[Value], targets: list[Value]) -> list[Value]:
    """Targets with those of one shape where the sources of that shape are, in the order in which they were made."""
    shapes, left = [meta_of(v).shape for v in sources], list(targets)
    if sorted(shapes) != sorted(meta_of(v).shape for v in targets):
        return targets
    found = []
    for shape in shapes:
        target = next(v for v in left if meta_of(v).shape == shape)
        left.remove(target)
        found.append(target)
    return found


def _contexts(flow: Flow, start: int, old: list[Value], new: list[Value]) -> list[Value]:
    """Which of the old values are held fixed."""
    graph = flow.recorded.graph
    dropped = [v for v in old if v not in new]
    passing = [v for v in old if v in new]
    found = [v for v in passing if _takes_no_turn(flow, v) and
             (_span(flow, v) > len(old) or any(_born(graph, d) > _born(graph, v) for d in dropped))]  # fmt: skip
    if not passing and len(old) > len(new):  # the last step of a method: a context is read, and not needed any more
        found = [v for v in old if _span(flow, v) > len(old) and _takes_no_turn(flow, v)]
        found = found if len(old) - len(found) == len(new) else []
    if not found and len(old) > len(new):
        found = [v for v in dropped if _is_one_of_a_sequence(flow, v)]
        found = found if len(old) - len(found) == len(new) else []
    return found if len(found) < len(old) else []


def _is_one_of_a_sequence(flow: Flow, value: Value) -> bool:
    """Whether a value was taken from one tensor together with others that are read at other times: an input."""
    if operation(value.node) not in _SPLITS:
        return False
    siblings = [{v for v in state.values if v.node is value.node} for state in flow.states]
    return any(others and value not in others for others in siblings)


def _span(flow: Flow, value: Value) -> int:
    """In how many states of the flow a value is alive."""
    return sum(value in state.values for state in flow.states)


def _takes_no_turn(flow: Flow, value: Value) -> bool:
    """Whether no other value of its shape lives as long as this one, earlier or later, as in a shift register."""
    lives: dict[Value, list[int]] = {}
    for state in flow.states:
        for v in state.values:
            if meta_of(v).shape == meta_of(value).shape:
                lives.setdefault(v, []).append(state.index)
    first, last = lives[value][0], lives[value][-1]
    return not any(life[0] - first == life[-1] - last != 0 for life in lives.values())


def _born(graph: Graph, value: Value) -> int:
    return graph.rank.get(value.node, -1)


def _read_ahead(flow: Flow, nodes: Sequence[Node], old: list[Value], new: list[Value]) -> tuple[Value, ...]:
    """The input of a recurrent network, and what of it is prepared for the next step: read, but no state.

    Inputs are what came unchanged from the beginning of the flow, when some of the new values depend on nothing else
    while others do.
    """
    first = flow.states[0].values
    inputs = {v for v in old if v in first}
    if not inputs or len(inputs) == len(old):
        return ()
    only: dict[Node, bool] = {}
    for node in nodes:
        taken = flow.recorded.graph.inputs[node]
        only[node] = all(v in inputs or only.get(v.node, False) for v in taken)
    ahead = [v for v in new if v not in old and only.get(v.node, False)]
    return (*inputs, *ahead) if ahead else ()


def _parted(
    graph: Graph, nodes: Sequence[Node], sources: list[Value], targets: list[Value]
) -> tuple[tuple[Value, ...], tuple[Value, ...]] | None:
    """The parts of a source that is split at once, and of a target that was just joined; None unless they match."""
    begin = parts_of(graph, nodes, sources[0]) if len(sources) == 1 else tuple(sources)
    end = joined(graph, nodes, targets[0]) if len(targets) == 1 else tuple(targets)
    if begin is None or end is None or len(begin) != len(end) or len(begin) < 2:
        return None
    if len(sources) == len(begin) and len(targets) == len(end):
        return None
    if 2 * len(set(sources).intersection(end)) >= len(end) >= _COLLECTED:
        return None  # what earlier steps put out, stacked for the output with what this one does
    if [meta_of(v).numel for v in begin] != [meta_of(v).numel for v in end]:
        return None
    return begin, end


def parts_of(graph: Graph, nodes: Sequence[Node], value: Value) -> tuple[Value, ...] | None:
    """The parts that a value is split into at once; None when something reads it whole."""
    while (whole := taken_whole(graph, nodes, value)) is not None:
        value = whole
    readers = [node for node in nodes if value in graph.inputs[node]]
    if not readers or any(operation(node) not in _SPLITS for node in readers):
        return None
    taken = {v for node in nodes for v in graph.inputs[node]}
    parts = [part for reader in readers for part in outputs_of(reader) if part in taken]
    covered = torch.zeros(meta_of(value).shape, dtype=torch.float64)
    with torch.no_grad():
        for part in parts:
            meta = meta_of(part)
            ones = torch.ones(meta.shape, dtype=meta.dtype, device=meta.device)
            given = [ones if made == part else None for made in outputs_of(part.node)]
            for _, mask in apply_node(part.node, given, [value]):
                covered += mask.double().cpu()
    return tuple(parts) if len(parts) > 1 and bool((covered == 1).all()) else None


def taken_whole(graph: Graph, nodes: Sequence[Node], value: Value) -> Value | None:
    """What a value is beside a constant, which is then cut off again: of ``cat([x, h])[..., :-1]`` that is x."""
    node = _only_reader(graph, nodes, value)
    if node is None or operation(node) not in JOINS or len(node.next_functions) == len(graph.inputs[node]):
        return None
    cut = _only_reader(graph, nodes, Value(node, 0))
    if (
        cut is None
        or operation(cut) not in _SPLITS
        or len(outputs_of(cut)) > 1
        or meta_of(Value(cut, 0)).shape != meta_of(value).shape
    ):
        return None
    meta = meta_of(value)
    ones = torch.ones(meta.shape, dtype=meta.dtype, device=meta.device)
    with torch.no_grad():
        ((_, beside),) = apply_node(cut, [ones], [Value(node, 0)])
        ((_, mask),) = apply_node(node, [beside], [value])
    return Value(cut, 0) if bool((mask == 1).all()) else None


def _only_reader(graph: Graph, nodes: Sequence[Node], value: Value) -> Node | None:
    readers = [node for node in nodes if value in graph.inputs[node]]
    return readers[0] if len(readers) == 1 else None


def joined(graph: Graph, nodes: Sequence[Node], value: Value) -> tuple[Value, ...] | None:
    """The values that a value is a concatenation of; None when it is none of values that depend on the source.

    A constant that was added since, such as a bias of all parts, is no part.
    """
    inside = set(nodes)
    while operation(value.node) in ADDS and value.node in inside and len(graph.inputs[value.node]) == 1:
        inner = graph.inputs[value.node][0]
        if meta_of(inner).shape != meta_of(value).shape:
            return None
        value = inner
    if operation(value.node) not in JOINS or value.node not in inside:
        return None
    parts = tuple(graph.inputs[value.node])
    complete = sum(meta_of(v).numel for v in parts) == meta_of(value).numel
    return parts if complete and len(set(parts)) == len(parts) > 1 else None
