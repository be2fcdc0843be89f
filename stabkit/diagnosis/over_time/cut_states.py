"""States of a recurrence that are taken off the graph between its time steps, so that each step learns from itself.

``h = h.detach()`` belongs between the batches of truncated backpropagation; within the loop over time it leaves the
gradient of one step. What is taken off the graph again and again is passed on instead, on trial: where every state then
leads back to the one before, of which it kept nothing, and later ones read later parts of the input, the gradient over
time was cut.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.utils._pytree import tree_leaves

from stabkit.diagnosis.blocks.weights import step_of
from stabkit.diagnosis.finding import Finding
from stabkit.diagnosis.over_time.profile import FEWEST
from stabkit.diagnosis.remedies.learning import left_by_a_constant
from stabkit.diagnosis.remedies.usual_training import ADAM, adams, left_after
from stabkit.diagnosis.states.sample_meetings import differing
from stabkit.diagnosis.training_run import TrainingRun
from stabkit.tracing.derivatives.lost_gradient import listed
from stabkit.tracing.recording.evaluation import evaluated
from stabkit.tracing.recording.function_calls import FunctionCalls
from stabkit.tracing.recording.hooks import hooked
from stabkit.tracing.recording.inputs import differentiable
from stabkit.tracing.recording.training_pass import (
    Observer,
    TrainingPass,
    calling_line,
    nodes_above,
    nodes_from,
    path_of,
    training_pass,
)
from stabkit.tracing.recording.transparency import DETACHING

CUT = "cut over time"  #: among the numbers of such a finding: how many time steps there are
_EACH = 0.75  # cuts for each position along time, from which it is every step: truncation cuts after several on purpose
_BURNT_IN = 2  # steps that keep their gradient behind others under no_grad, up to which these are no burn-in
_MOST = 4  # places that are tried
_STEPS = 50  # of Adam: what a sequence asks for takes longer to learn than what its last step does
_BETTER = 0.8  # of what is left of the loss as it is, under which it is clearly less with the states passed on
_LEARNS = 0.5  # of the loss of the best constant, under which a model learns as it is
_REFERENCE = (
    "Williams and Peng, An efficient gradient-based algorithm for on-line training of recurrent network trajectories, "
    "1990; Werbos, Backpropagation through time, 1990"
)

Place = tuple[str, str]  # an operation, and the line that calls it
_NO_GRAD = "no_grad"


@dataclass(frozen=True)
class _State:
    """What was taken off the graph: the node that made it, None where it had none, its values, and its module."""

    node: Node | None
    values: Tensor
    path: str


class _Cuts(FunctionCalls):
    """Notes what is taken off the graph, by place; what is taken at one of them is passed on instead.

    Args:
        through: that place.
        observer: says whether the model runs, or its loss, in which targets are taken off the graph on purpose.
    """

    def __init__(self, through: Place | None = None) -> None:
        super().__init__()
        self.states: dict[Place, list[_State]] = {}
        self.observer: Observer | None = None
        self.off: Place | None = None  # what has gradients switched off now
        self._through = through

    def note(self, place: Place, tensor: Tensor, path: str = "") -> None:
        """Something is taken off the graph, or made off it by a module."""
        self.states.setdefault(place, []).append(_State(tensor.grad_fn, tensor.detach().clone(), path))

    def _called(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.observer is not None and self.observer.part != "model":
            return func(*args, **kwargs)
        if func is torch._C._set_grad_enabled:
            place = _NO_GRAD, calling_line()
            self.off = None if args[0] or not place[1] else place
            return None if place == self._through else func(*args)
        name = DETACHING.get(func)
        place = name or "", calling_line() if name else ""
        if not place[1] or not isinstance(args[0], Tensor) or not differentiable(args[0]):
            return func(*args, **kwargs)
        self.note(place, args[0])
        if place != self._through:
            return func(*args, **kwargs)
        return args[0] if name == "detach_" else args[0].view_as(args[0])


def cut_state_findings(run: TrainingRun) -> list[Finding]:
    """A finding where every time step of a recurrence is cut off from the one before, with what that costs."""
    if run.done.detached < FEWEST and not run.done.without_graph:
        return []
    done, found = _watched(run)
    places = [p for p, states in found.items() if len(states) >= FEWEST and (p[0] == _NO_GRAD or _kept_nothing(states))]
    for place in places[:_MOST]:
        _, passed = _watched(run, place)
        whole = passed.get(place, [])
        if len(whole) < FEWEST or not _leads_back(whole) or not (length := _reads_on(run, place)):
            continue
        if place[0] == _NO_GRAD and _goes_on_briefly(run, whole):
            return [_of_no_grad(run, place, done, whole, length)]
        if place[0] != _NO_GRAD and len(whole) >= _EACH * length:
            return [_of_each(run, place, done, found[place], length)]
    return []


def _goes_on_briefly(run: TrainingRun, states: list[_State]) -> bool:
    """Whether what runs under ``no_grad`` goes on with gradients, for a step or two: a teacher never does."""
    path = states[-1].path
    calls = sum(call.path == path for call in run.done.calls)
    return 0 < calls - sum(state.path == path for state in states) <= _BURNT_IN


def _watched(run: TrainingRun, through: Place | None = None) -> tuple[TrainingPass, dict[Place, list[_State]]]:
    """A pass in which what is taken at one place is passed on, and what was taken off the graph in it."""
    cuts = _Cuts(through)
    cuts.observer = Observer(cuts)
    with hooked(_hooks(run, cuts)):
        done = training_pass(run.call, run.loss, cuts.observer, differentiate=False)
    return done, cuts.states


def _hooks(run: TrainingRun, cuts: _Cuts) -> list[Any]:
    """Modules that are called again and again, whose results are noted where they run under ``no_grad``."""
    calls = Counter(call.path for call in run.done.calls)

    def hook_of(path: str) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            leaves = [each for each in tree_leaves(output) if isinstance(each, Tensor) and differentiable(each)]
            if cuts.off is not None and leaves:
                cuts.note(cuts.off, leaves[-1], path)

        return hook

    modules = dict(run.call.module.named_modules())
    often = [path for path, count in calls.items() if count >= FEWEST and path in modules]
    outer = [path for path in often if path and not any(path.startswith(f"{other}.") for other in often if other)]
    return [modules[path].register_forward_hook(hook_of(path)) for path in outer]


def _kept_nothing(states: list[_State]) -> bool:
    """Whether the last state shares nothing with one half way that it does not share with the first as well."""
    on_graph = [state.node for state in states if state.node is not None]
    if len(on_graph) < FEWEST - 1:
        return False
    first, middle, last = (set(nodes_from(on_graph[i])) for i in (0, len(on_graph) // 2, -1))
    return not any(not hasattr(node, "variable") for node in (last & middle) - first)


def _leads_back(states: list[_State]) -> bool:
    """Whether the last state of a pass is made of most of those before it."""
    on_graph = [state.node for state in states if state.node is not None]
    above = set(nodes_from(on_graph[-1])) if len(on_graph) >= FEWEST - 1 else set()
    return 2 * sum(node in above for node in on_graph) > len(on_graph)


def _reads_on(run: TrainingRun, place: Place) -> int:
    """The length of the axis of an input of which later states read later parts; 0 where none does."""
    plain = _values(run, place, None)
    for _, tensor in run.call.given:
        for axis in (1, 0):
            if tensor.dim() < 2 or tensor.shape[axis] < FEWEST or tensor.shape[1 - axis] < 2:
                continue
            moved = _values(run, place, _with_another_end(tensor, axis))
            if len(moved) != len(plain) or len(plain) < FEWEST:
                continue
            changed = [a.shape == b.shape and bool(differing(b, a).any()) for a, b in zip(plain, moved, strict=True)]
            quarter = len(changed) // 4
            if any(changed[-quarter:]) and not any(changed[:quarter]):
                return int(tensor.shape[axis])
    return 0


def _with_another_end(given: Tensor, axis: int) -> Callable[[Tensor], Tensor]:
    """Puts that of other samples in the place of the second half of an input along an axis."""

    def change(tensor: Tensor) -> Tensor:
        if tensor is not given:
            return tensor
        half = given.shape[axis] // 2
        rest = given.shape[axis] - half
        return torch.cat([given.narrow(axis, 0, half), given.roll(1, 1 - axis).narrow(axis, half, rest)], axis)

    return change


def _values(run: TrainingRun, place: Place, change: Callable[[Tensor], Tensor] | None) -> list[Tensor]:
    """What is taken off the graph at a place, in eval mode, of the inputs as they are or of others."""
    cuts = _Cuts()
    with hooked(_hooks(run, cuts)):
        evaluated(run.call, change, lambda _: cuts)
    return [state.values for state in cuts.states.get(place, [])]


def _of_each(run: TrainingRun, place: Place, done: TrainingPass, states: list[_State], length: int) -> Finding:
    first, last = (next(s.node for s in order if s.node is not None) for order in (states, states[::-1]))
    inside = {id(node.variable) for node in nodes_from(last) if hasattr(node, "variable")}
    names = tuple(path for path, p in done.parameters.items() if id(p) in inside)
    read = done.loss is not None and first in nodes_above(done.loss)
    evidence = (
        f"the gradient over time is cut: at each of {length} time steps the state is taken off the graph by {place[0]} "
        f"({place[1]}), and none gets from a step to the one before it; {len(names)} of {len(done.parameters)} "
        f"parameters ({listed(names)}) learn from {'every step by itself' if read else 'the last step'} alone"
    )
    remedy = (
        f"take {place[0]} at {place[1]} away: a state is detached between batches, or once in many steps (truncated "
        "backpropagation), and not at every step"
    )
    return _finding(run, place, path_of(done, last), evidence, remedy, length)


def _of_no_grad(run: TrainingRun, place: Place, done: TrainingPass, states: list[_State], length: int) -> Finding:
    path, steps = states[-1].path, sum(state.path == states[-1].path for state in states)
    names = tuple(name for name in done.parameters if name.startswith(f"{path}."))
    evidence = (
        f"the gradient over time is cut: {steps} of {length} time steps run under no_grad ({place[1]}), and none gets "
        f"back behind the step after them; {len(names)} of {len(done.parameters)} parameters ({listed(names)}) learn "
        "from what comes after these steps alone"
    )
    remedy = (
        f"take no_grad at {place[1]} away; it is for a burn-in that many steps with a gradient follow, and for "
        "evaluation"
    )
    return _finding(run, place, path, evidence, remedy, length)


def _finding(run: TrainingRun, place: Place, path: str, evidence: str, remedy: str, length: int) -> Finding:
    """With what Adam leaves of the loss as it is, and with the states passed on."""
    severity = "warning"
    first = float(run.done.loss.detach()) if run.done.loss is not None else 0.0
    updates = adams(first)
    plain = left_after(run.call, run.loss, updates, steps=_STEPS)
    passed = left_after(run.call, run.loss, updates, steps=_STEPS, within=lambda: _Cuts(place))
    if plain is not None and passed is not None and first > 0:
        evidence += (
            f"; tried on a copy: {_STEPS} steps of {ADAM} take the loss from {first:.3g} to {plain * first:.3g} as it "
            f"is, and to {passed * first:.3g} with the gradient passed on there"
        )
        floor = left_by_a_constant(run.loss, run.done.output)
        learns = floor is not None and plain * first < _LEARNS * floor
        if learns and not passed < _BETTER * plain:
            severity, remedy = "info", f"none is needed for these samples; for a longer memory, {remedy}"
    return Finding(
        kind="no_gradient",
        severity=severity,
        steps=(step_of(run.flow, path),),
        module_path=path,
        confidence=1.0,
        evidence=evidence,
        remedy=remedy,
        reference=_REFERENCE,
        numbers={CUT: float(length), f"closed:{place[0]}": 1.0},
    )
