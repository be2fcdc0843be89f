"""Steps that begin or end a method of several states, a stream or a value for later: what they do to the main state.

The first layer of a stack often hands on a value beside its state: the first values of attention, scores that are added
up from layer to layer, the first evaluation of a multistep method. The last one joins its streams, or drops what no
later step reads. Both change the count of values, so that they are no steps of one method with their neighbours; the
state that goes on makes a step in them all the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from torch.autograd.graph import Node

from stabkit.identification.form.flow_index import Surroundings
from stabkit.identification.form.operations import ADDS, JOINS, MOVES, PRODUCTS
from stabkit.identification.form.slots import Slots, collectors, joined
from stabkit.identification.names.single import NO_STEP
from stabkit.identification.record import Identification
from stabkit.tracing.graph.values import Value, meta_of, operation, outputs_of

Reader = Callable[[Slots, tuple[int, ...]], Identification]

_NO_STEP = (
    "autoregressive", "delayed", "dense", "fork", "general linear method", "gated skip", "iterative", "join", "linear",
    "no branch", "not a step", "part of a step", "plain", "projection shortcut", "skip", "transformed skip",
    "transition", "unknown", "unnamed",
)  # fmt: skip
_FORK, _JOIN = ": a fork", ": a join"
# of the next step's operations: a step of one evaluation is no start of a method of two (0.5), starters of multistep
# methods and first layers do all that the next does (1); missed: a first layer that lacks a third of it
_MOST = 0.7
_WIDE = 4  # new values of which one may be the state that goes on


def step_inside(
    around: Surroundings, found: Slots, steps: tuple[int, ...], record: Identification, read: Reader
) -> Identification:
    """The record of a fork or a join, with the step that the main state makes in it where there is one.

    Args:
        around: the flow.
        found: the states before and after, of other numbers.
        steps: the steps of the flow.
        record: the record that says fork or join, which comes back where no step is told.
        read: the reading of some states before and after some steps.
    """
    if record.name == "fork":
        if not _begins_a_run(around, steps):
            return record
        named = [(one.targets[0], inner) for one in _beginnings(found) if _is_step(inner := read(one, steps))]
        last = _made_of_others(around, [value for value, _ in named], steps)
        if last is None:  # of several none is the state that goes on: two towers
            return record
        inner, more = next(inner for value, inner in named if value == last), len(found.targets) - 1
        values = "value is" if more == 1 else "values are"
        return _inside(inner, f"{more} {values} made beside the state, for later steps{_FORK}")
    if record.name != "join":
        return record
    before = (steps[0] - 1,)
    kind = ""
    for one in _endings(around, found, steps):
        inner = read(one, steps)
        kind = kind or _kind(read(around.slots(before[0], steps[0]), before))
        if _is_step(inner) and _kind(inner) == kind:
            if _is_part(around, steps):
                why = "it has fewer operations than the step before, and may be a part of one: half a kick at the end"
                inner = replace(inner, step_size=None, convention=NO_STEP, notes=(why, *inner.notes))
            rest = len(found.sources) - len(one.sources)
            ends = "then the states are joined" if len(one.targets) > len(found.targets) else (
                f"what {rest} other value(s) were kept for ends here")  # fmt: skip
            return _inside(inner, f"the last step of its kind; {ends}{_JOIN}")
    return record


def _is_part(around: Surroundings, steps: tuple[int, ...]) -> bool:
    """Whether a last step has fewer sums and products than the one before."""
    ours, theirs = (
        sum(operation(node) in ADDS | PRODUCTS for node in around.nodes(index, index + 1))
        for index in (steps[-1], steps[0] - 1)
    )
    return ours < theirs


def changes_count(record: Identification) -> bool:
    """Whether a record is one of a fork or a join, with or without a step inside."""
    return record.name in ("fork", "join") or holds_a_step(record)


def holds_a_step(record: Identification) -> bool:
    """Whether a record is one of a step inside a fork or a join."""
    return any(note.endswith((_FORK, _JOIN)) for note in record.notes)


def _kind(record: Identification) -> str:
    """The name of a record without its numbers."""
    return record.name.partition(" (")[0]


def _is_step(record: Identification) -> bool:
    return record.evidence != "unknown" and not record.name.startswith(_NO_STEP)


def _inside(record: Identification, why: str) -> Identification:
    """A record without what is said of the Jacobian of the whole step, which leads between other spaces."""
    return replace(record, method=None, skip=None, checks=(), recorded=(), notes=(why, *record.notes))


def _beginnings(found: Slots) -> Iterator[Slots]:
    """The ways in which the only old state may go on as one of the new ones."""
    if len(found.sources) != 1 or len(found.targets) > _WIDE:
        return
    for target in found.targets:
        if target not in found.sources and meta_of(target).shape == meta_of(found.sources[0]).shape:
            yield replace(found, targets=(target,), split=False)


def _begins_a_run(around: Surroundings, steps: tuple[int, ...]) -> bool:
    """Whether a step does most of what the next one does, but for sums and products by numbers."""
    start, stop = steps[0], steps[-1] + 1
    if stop >= len(around.flow.steps):
        return False
    ours, theirs = (
        Counter(name for name in map(operation, around.nodes(*span)) if name not in MOVES | ADDS | PRODUCTS)
        for span in ((start, stop), (stop, stop + 1))
    )
    return bool(theirs) and (ours & theirs).total() >= _MOST * theirs.total()


def _made_of_others(around: Surroundings, values: Sequence[Value], steps: tuple[int, ...]) -> Value | None:
    """The one of some values that was made of all the others, as a new state of the values of its field."""
    graph, nodes = around.graph, around.nodes(steps[0], steps[-1] + 1)
    for value in values:
        behind = {value}
        for node in reversed(nodes):
            if any(v in behind for v in outputs_of(node)):
                behind.update(graph.inputs[node])
        if behind.issuperset(values):
            return value
    return None


def _endings(around: Surroundings, found: Slots, steps: tuple[int, ...]) -> Iterator[Slots]:
    """The states of a last step, before what joins them, by those of the step before it.

    They are what the step before made, and the values here that stand where its new states stand among its operations;
    or those that a join at the end puts side by side.
    """
    start, stop = steps[0], steps[-1] + 1
    if start == 0:
        return
    before = around.slots(start - 1, start)
    if before.split or len(before.sources) != len(before.targets) or not set(before.targets) <= set(found.sources):
        return
    sources = before.targets
    others = [v for v in found.sources if v not in sources]
    fixed = [v for v in others if v in before.contexts]
    nodes = around.nodes(start, stop)
    if any(v not in fixed and not _is_only_joined(around, nodes, v) for v in others):
        return
    contexts = (*found.contexts, *(v for v in fixed if v not in found.contexts))
    for targets in _last_states(around, before, nodes, found, start):
        if [meta_of(v).shape for v in targets] == [meta_of(v).shape for v in sources]:
            yield Slots(sources, targets, contexts, split=False)


def _last_states(
    around: Surroundings, before: Slots, nodes: Sequence[Node], found: Slots, start: int
) -> Iterator[tuple[Value, ...]]:
    """What may be the new states of a last step."""
    if len(before.targets) == len(found.targets):
        yield found.targets
    earlier = around.nodes(start - 1, start)
    handed = dict(zip(before.sources, before.targets, strict=True))  # what is only handed on moves up by one
    images = [handed.get(value) or _image(earlier, nodes, value) for value in before.targets]
    known = tuple(v for v in images if v is not None)
    if len(known) == len(images):
        yield known
    for target in found.targets:
        parts = joined(around.graph, nodes, target)
        if parts is not None and len(parts) == len(before.targets):
            yield parts
    last = _collected(around, nodes)
    if len(last) == len(before.targets):
        yield last


def _collected(around: Surroundings, nodes: Sequence[Node]) -> tuple[Value, ...]:
    """The values made by some operations that joins put beside others as the output, in the order they were made."""
    joins, found = [node for node in collectors(around.flow) if node in nodes], set[Value]()
    while joins:
        for value in around.graph.inputs[joins.pop()]:
            if value.node in nodes:
                if operation(value.node) in JOINS:
                    joins.append(value.node)
                else:
                    found.add(value)
    return tuple(sorted(found, key=lambda v: around.graph.rank[v.node]))


def _image(earlier: Sequence[Node], nodes: Sequence[Node], value: Value) -> Value | None:
    """What stands where a value stands among the operations of the step before, and is made alike up to there."""
    if value.node not in earlier:
        return None
    place = list(earlier).index(value.node)
    alike = [operation(node) for node in earlier[: place + 1]] == [operation(node) for node in nodes[: place + 1]]
    if not alike or meta_of(outputs_of(nodes[place])[value.output]).shape != meta_of(value).shape:
        return None
    return Value(nodes[place], value.output)


def _is_only_joined(around: Surroundings, nodes: Sequence[Node], value: Value) -> bool:
    """Whether a value is laid side by side with others, and not read for anything else."""
    readers = [node for node in nodes if value in around.graph.inputs[node]]
    return all(
        operation(node) in JOINS
        or (operation(node) in MOVES and all(_is_only_joined(around, nodes, v) for v in outputs_of(node)))
        for node in readers
    )
