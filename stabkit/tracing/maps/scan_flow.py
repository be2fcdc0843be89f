"""A recurrence inside a step of depth as a flow of its own, over time, with its inputs held fixed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from stabkit.tracing.cutting.samples import Layout
from stabkit.tracing.flow import Flow, State, Step
from stabkit.tracing.graph.scans import FEWEST_ALIKE, Scan, scans_between
from stabkit.tracing.graph.values import operation, random_tensors
from stabkit.tracing.products.step_products import Products


def scans_of(
    flow: Flow, start: int, stop: int, fewest: int = FEWEST_ALIKE, *, in_layers: bool = False
) -> tuple[Scan, ...]:
    """The recurrences over time between two states of a flow.

    Args:
        flow: a traced forward pass.
        start: index of the state before.
        stop: index of the state after.
        fewest: rounds of a recurrence.
        in_layers: whether those inside the recurrent modules of torch are wanted as well.
    """
    first, last = flow.states[start].position, flow.states[stop].position
    graph, recorded = flow.recorded.graph, flow.recorded
    # read only where a state goes round: most steps hold no recurrence, and a deep model has as many tensors as steps
    tensors = itertools.chain(flow.model.parameters(), flow.model.buffers())
    without = () if in_layers else graph.recurrent
    found = scans_between(graph, first, last, tensors, recorded.prefetch(first, last), fewest, without)
    if not found or in_layers:
        return found
    inside = [
        (graph.position(call.start), graph.position(call.stop))
        for call in recorded.recording.calls
        if call.finished and isinstance(call.module, nn.RNNBase)
    ]
    return tuple(s for s in found if not any(low <= s.positions[0] <= high for low, high in inside))


def growth_over(flow: Flow, scan: Scan) -> list[float]:
    """What a random cotangent of the last state gains on its way back over each time step, nats, in the order of time.

    All inputs are held fixed, and the batch is one state. It is scaled to length one after every step, so that nothing
    leaves the range of a float; minus infinity where nothing is passed on.
    """
    parameters = list(flow.model.parameters())
    cotangents = random_tensors(scan.states[-1], seed=0)
    found = []
    for time in range(len(scan) - 1, -1, -1):
        before, after = scan.states[time], scan.states[time + 1]
        segment = flow.recorded.segment(before, after, scan.positions[time], scan.positions[time + 1], parameters)
        size = _length(cotangents)
        cotangents = segment.vjp(cotangents)
        arrived = _length(cotangents)
        found.append(math.log(arrived / size) if arrived > 0 else -math.inf)
        if not 0 < arrived < math.inf:
            break
        cotangents = [tensor / arrived for tensor in cotangents]
    return found[::-1]


def _length(tensors: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float(torch.linalg.vector_norm(tensor)) ** 2 for tensor in tensors))


def over_scan(flow: Flow, scan: Scan, start: int = 0, stop: int | None = None) -> Flow:
    """The flow over time of a recurrence: its states are those of the scan, all else that they read is held fixed.

    Args:
        flow: the flow in which it was found.
        scan: the recurrence.
        start: the time to begin with.
        stop: the time to end with; by default the last.
    """
    stop = len(scan) if stop is None else stop
    whole = Layout(1, None)
    states = [
        State(i, scan.positions[time], scan.states[time], tuple(whole for _ in scan.states[time]), {})
        for i, time in enumerate(range(start, stop + 1))
    ]
    path = flow.recorded.path_of(scan.cycle[-1])
    module = dict(flow.model.named_modules()).get(path)
    parameters: Sequence[nn.Parameter] = list(flow.model.parameters())
    steps = []
    for source, target in itertools.pairwise(states):
        segment = flow.recorded.segment(source.values, target.values, source.position, target.position, parameters)
        steps.append(
            Step(
                index=source.index,
                name=f"time {start + source.index}",
                module_path=path,
                module_class=type(module).__name__ if module is not None else "",
                stack="",
                kind="step",
                source=source,
                target=target,
                operations=tuple(operation(node) for node in segment.nodes),
                notes=(),
                segment=segment,
                products=Products(segment, source.space, target.space),
            )
        )
    return replace(
        flow,
        states=tuple(states),
        steps=tuple(steps),
        source_name="state",
        target_name="state",
        side_inputs=(),
        batch=1,
        chain_error=None,
        notes=(*flow.notes, f"over time in {path or 'the model'}; the input is held fixed, the batch is one state"),
        _retrace=None,
        _by_values=None,
    )
