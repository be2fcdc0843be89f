"""Steps that make a value for later beside their state: what they do to the state.

The first layer of a stack often hands on a value beside its state: the first values of attention, scores that are added
up from layer to layer, the first evaluation of a multistep method. It changes the count of values, so that it is no
step of one method with its neighbours; the state that goes on makes a step in it all the same.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from stabkit.identification.form.flow_index import Surroundings
from stabkit.identification.form.operations import ADDS, MOVES, PRODUCTS
from stabkit.identification.form.pieces import pull
from stabkit.identification.form.slots import Slots
from stabkit.identification.names.single import EXPONENTIAL
from stabkit.identification.record import Identification, nothing
from stabkit.integrators import GeneralLinearMethod
from stabkit.tracing.graph.values import Value, meta_of, operation, outputs_of, random_tensors

Reader = Callable[[Surroundings, Slots, tuple[int, ...]], Identification]

_NO_STEP = (
    "autoregressive", "delayed", "dense", "fork", "general linear method", "gated skip", "iterative", "join", "linear",
    "no branch", "not a step", "part of a step", "plain", "skip", "transformed skip", "transition", "unknown",
    "unnamed",
)  # fmt: skip
_UNNAMED = "unnamed"
_FORK, _JOIN = ": a fork", ": a join"
# of the next step's operations: a step of one evaluation is no start of a method of two (0.5), starters of multistep
# methods and first layers do all that the next does (1); missed: a first layer that lacks a third of it
_MOST = 0.7
_WITH_KEPT = "what was kept beside the state, for a first stage, is read and not made again"
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
    if record.name == "join" and (kept := _of_kept_values(around, found, steps)) is not None:
        nodes = around.nodes(steps[0] - 1, steps[-1] + 1)
        inner = read(around.holding({n for n in nodes if meta_of(Value(n, 0)).numel == 1}), kept, steps)
        return inside(inner, f"{_WITH_KEPT}{_JOIN}") if _is_step(inner) and inner.shared_weights else record
    if record.name == "join":
        return _last_use(around, found, steps, read) or record
    if not _begins_a_run(around, steps):
        return record
    read_as = [(one.targets[0], read(around, one, steps)) for one in _beginnings(found)]
    named = [(value, inner) for value, inner in read_as if _is_step(inner) or inner.name.startswith(_UNNAMED)]
    last = _made_of_others(around, [value for value, _ in named], steps)
    if last is None:  # of several none is the state that goes on: two towers
        return record
    inner, more = next(inner for value, inner in named if value == last), len(found.targets) - 1
    if not _is_step(inner):  # a state whose method has no name: what it was made of are values of its field
        return record
    values = "value is" if more == 1 else "values are"
    why = f"{more} {values} made beside the state, for later steps{_FORK}"
    if 1 < more == _stages(inner) and inner.name.startswith(EXPONENTIAL):
        # every stage is kept: each was evaluated at a new state, and the weights of all steps together make no method
        name = f"{more} starting steps of a method that remembers (a = {inner.skip:.3g})"
        inner = replace(inner, name=name, step_size=None, convention="none for all: every step has its own")
    return inside(inner, why)


def made_beside(around: Surroundings, found: Slots, start: int, stop: int) -> Identification | None:
    """The record of steps that make something for later steps of a state which stays as it is; None for others."""
    before, after = (around.flow.states[i].values for i in (start, stop))
    made = [v for v in after if v not in before]
    if not made or not found.sources or not set(found.targets) <= set(found.sources):
        return None
    why = f"the state stays as it is; made beside it for later steps: {len(made)}"
    return nothing(tuple(range(start, stop)), "fork", why, "proven")


def _stages(record: Identification) -> int:
    return record.method.stages if isinstance(record.method, GeneralLinearMethod) else 0


def _last_use(around: Surroundings, found: Slots, steps: tuple[int, ...], read: Reader) -> Identification | None:
    """The step of the youngest of several states, in which the older ones are read for the last time; None elsewhere.

    An encoder's result that every layer of a decoder reads is no state of it. A decoder of images joins what was kept
    to what it made since: there nothing of the youngest goes on by itself.
    """
    rank = around.graph.rank
    *held, state = sorted(found.sources, key=lambda v: (rank.get(v.node, -1), v.output))
    if len(found.targets) != 1 or meta_of(state).shape != meta_of(found.targets[0]).shape or found.split:
        return None
    if any(meta_of(v).shape == meta_of(state).shape for v in held):
        return None  # as likely another stream
    inner = read(around, replace(found, sources=(state,), contexts=(*found.contexts, *held)), steps)
    if not _is_step(inner) or inner.step_size is None:
        return None
    values = "value is" if len(held) == 1 else "values are"
    return inside(inner, f"{len(held)} {values} held from before and read for the last time{_JOIN}")


def changes_count(record: Identification) -> bool:
    """Whether a record is one of a fork or a join, with or without a step inside."""
    return record.name in ("fork", "join") or holds_a_step(record)


def holds_a_step(record: Identification) -> bool:
    """Whether a record is one of a step inside a fork or a join."""
    return any(note.endswith((_FORK, _JOIN)) for note in record.notes)


def without_doubtful(records: Sequence[Identification]) -> list[Identification]:
    """Records, those of forks without the step inside where the step behind has no name.

    That a fork is a step at all was told by its likeness to the step behind it. An iteration that begins at a constant,
    in a function of its input, looks like a step of that input.
    """
    found = list(records)
    for i, (record, behind) in enumerate(itertools.pairwise(records)):
        if behind.name.startswith(_UNNAMED) and any(note.endswith(_FORK) for note in record.notes):
            found[i] = nothing(record.steps, "fork", record.notes[0], "proven")
    return found


def kind_of(record: Identification) -> str:
    """The name of a record without its numbers."""
    return record.name.partition(" (")[0]


def _is_step(record: Identification) -> bool:
    return record.evidence != "unknown" and not record.name.startswith(_NO_STEP)


def inside(record: Identification, why: str) -> Identification:
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


def _of_kept_values(around: Surroundings, found: Slots, steps: tuple[int, ...]) -> Slots | None:
    """The one state of a join whose other old values the step before made of it: of its field, kept for a first stage.

    Single numbers beside states of many are a time, and held fixed. None where the others are made of something else.
    """
    start = steps[0]
    states = [v for v in found.sources if meta_of(v).numel > 1]
    if start == 0 or len(states) < 2 or len(found.targets) != 1:
        return None
    shapes = {meta_of(v).shape for v in (*states, *found.targets)}
    for state in states if len(shapes) == 1 else ():
        nodes = [node for node in around.nodes(start - 1, start) if node is not state.node]
        others = [v for v in states if v != state]
        drawn = dict(zip(others, random_tensors(others, seed=0), strict=True))
        arrived = pull(around.graph, nodes, {node: around.graph.inputs[node] for node in nodes}, drawn)
        if all(v == state or meta_of(v).numel == 1 or not bool(grad.any()) for v, grad in arrived.items()):
            contexts = (*found.contexts, *(v for v in found.sources if v not in states))
            return replace(found, sources=(state,), contexts=contexts, split=False, earlier=found.earlier + 1)
    return None


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
