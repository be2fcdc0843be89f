"""States and events that a model takes off the graph at every step: what the steps are by their values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

from stabkit.errors import TraceError
from stabkit.identification.form.flow_index import Surroundings
from stabkit.identification.record import Identification
from stabkit.tracing import Flow
from stabkit.tracing.graph.values import meta_of

_DETACH = "aten.detach.default"
_FEWEST = 2  # steps with something detached: a state that is carried on is detached in all of them
_NOTHING_SAID = ("unknown", "not a step", "part of a step", "plain", "transition", "transformed skip", "unnamed",
                 "fork", "join")  # fmt: skip
_Calls = tuple[tuple[str, int], ...]
Read = Callable[[Flow], Sequence[Identification]]


def with_values(records: Sequence[Identification], flow: Flow, read: Read) -> list[Identification]:
    """Records of the steps of gradients, which say besides what the steps are by their values.

    A flow network that moves its coordinates by what it has read there detaches them, and a spiking one its reset:
    neither is on the graph that trains. So the model is traced once more, with all that on it. Where that cannot be
    done, as where a model writes to what it has detached, the records say so.

    Args:
        records: the readings of a flow.
        flow: the flow.
        read: reads another flow.
    """
    places = [i for i, record in enumerate(records) if _detaches(flow, record)]
    if len(places) < _FEWEST or any(step.segment.recomputes for step in flow.steps):  # to save memory, no second trace
        return list(records)
    found = list(records)
    try:
        whole = flow.by_values()
        by_calls = {} if whole is None else {_calls(whole, record): record for record in read(whole)}
    except TraceError as error:
        why = f"something is detached, and by its values the step was not read: {str(error)[:100]}"
        return [replace(r, notes=(*r.notes, why)) if i in places else r for i, r in enumerate(found)]
    if whole is None:
        return found
    ours, theirs = Surroundings(flow, checks=False), Surroundings(whole, checks=False)
    for i in places:
        record, other = records[i], by_calls.get(_calls(flow, records[i]))
        if other is None or not _calls(whole, other):
            continue
        if other.name.startswith(_NOTHING_SAID) or other.name == record.name or not other.system:
            continue
        kept, known = _shapes(ours, record), _shapes(theirs, other)
        if not kept or kept - known:
            continue  # which of them is which cannot be said
        more = known - kept
        shapes = ", ".join("x".join(map(str, shape)) for shape in more.elements())
        cut = f"{shapes}: a state that carries no gradient" if shapes else "what is detached lies inside the step"
        why = f"by values {other.name}, {other.evidence}; {other.system} ({cut}); gradients see the rest alone"
        found[i] = replace(record, notes=(why, *record.notes))
    return found


def _calls(flow: Flow, record: Identification) -> _Calls:
    """The calls that name its steps, each as the path of a module and how often that was called before."""
    recording, found = flow.recorded.recording, list[tuple[str, int]]()
    for i in record.steps:
        path, (first, last) = flow.steps[i].module_path, _interval(flow, i, i + 1)
        made = [call for call in recording.calls if call.path == path]
        shared = [min(call.stop, last) - max(call.start, first) for call in made]  # of time with the step
        if not path or not shared or max(shared) <= 0:
            return ()
        found.append((path, shared.index(max(shared))))
    return tuple(found)


def _interval(flow: Flow, start: int, stop: int) -> tuple[float, float]:
    """The time between two states, by the clock of the recording."""
    clock = flow.recorded.graph.clock
    before, after = (flow.states[i].position for i in (start, stop))
    return clock[before - 1] if before else -1, clock[after] if after < len(clock) else float("inf")


def _shapes(around: Surroundings, record: Identification) -> Counter[tuple[int, ...]]:
    """The shapes of the states after a record's steps."""
    targets = around.slots(record.steps[0], record.steps[-1] + 1).targets
    return Counter(tuple(meta_of(value).shape) for value in targets)


def _detaches(flow: Flow, record: Identification) -> bool:
    """Whether something that depends on the input is detached while a step runs."""
    first, last = _interval(flow, record.steps[0], record.steps[-1] + 1)
    return any(s.operation == _DETACH and first < s.time <= last for s in flow.recorded.recording.stopped)
