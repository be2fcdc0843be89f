"""The gradient at every time step of a recurrence, whatever it is written as."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from stabkit.tracing.graph.values import Meta, random_of

Array = npt.NDArray[np.float64]
_PAST = 1e-4  # of a gradient that may get past what is held for all of a state, for roundings
_AROUND = 0.5  # of the squares of a gradient: more of it passes around a module than through it
FEWEST = 8  #: time steps from which one speaks of time


@dataclass
class TimeProfile:
    """The gradient at every time step of one recurrent module.

    Attributes:
        path: the path of the module.
        module: itself.
        log_gradient: ``(time,)``, log of the gradient norm there; -inf where nothing arrives.
        loop: whether it is called in a loop of the model, and no recurrent module of torch.
        width: size of the last axis of the states of such a loop.
        place: which of the recurrences that run inside the module without a module of their own; -1 for others.
        fed: whether gates, or other numbers that are made of the input, multiply the state.
        step: the step of depth that it runs in; -1 where that is told by its module.
        method: the method of its steps, where it was read.
        own: what a random cotangent gains on its way back over all its states alone, nats; NaN where not measured.
        unit: what is counted, ``"time steps"``; ``"calls"`` where several calls in a row are given the same input.
    """

    path: str
    module: nn.Module
    log_gradient: Array
    loop: bool = False
    width: int = 0
    place: int = -1
    fed: bool = False
    step: int = -1
    method: str = ""
    own: float = math.nan
    unit: str = "time steps"

    @property
    def growth(self) -> float:
        """What the gradient gains on its way back over time, nats: from the newest step that it reaches to the oldest.

        Means of the first and last eighths, so that one step counts little; NaN where too few steps are reached.
        """
        reached = np.flatnonzero(self.log_gradient > -math.inf)
        logs = self.log_gradient[: reached[-1] + 1] if reached.size else self.log_gradient[:0]
        if len(logs) < FEWEST:
            return math.nan
        width = max(1, len(logs) // 8)
        with np.errstate(invalid="ignore"):
            return float(_log_mean(logs[:width]) - _log_mean(logs[-width:]))


def _log_mean(logs: Array) -> float:
    top = logs.max()
    return float(top + 0.5 * np.log(np.exp(2 * (logs - top)).mean())) if np.isfinite(top) else float(top)


def logs_of(sizes: Tensor) -> Array:
    """Logs of norms; -inf of zero."""
    with np.errstate(divide="ignore"):
        logs: Array = np.log(sizes.double().numpy())
    return logs


def logs_at(loss: Tensor, states: Sequence[list[Tensor]]) -> Array:
    """Log of the size of the gradient of a loss at every state."""
    flat = [tensor for state in states for tensor in state]
    gradients = torch.autograd.grad(loss, flat, retain_graph=True, allow_unused=True)
    squares = iter([0.0 if g is None else float(g.detach().double().square().sum()) for g in gradients])
    return logs_of(torch.tensor([math.sqrt(sum(next(squares) for _ in state)) for state in states]))


def is_whole_state(states: Sequence[list[Tensor]]) -> bool:
    """Whether what some calls gave out is all that is carried on: nothing comes back past the states in between.

    What a gate of a cell gives out, or a layer in it, is no state: most of the gradient gets around it.
    """
    if len(states) < 3:
        return False
    before, between, last = states[-3:]
    total = torch.stack([tensor.sum() for tensor in last]).sum()
    whole = torch.autograd.grad(total, before, retain_graph=True, allow_unused=True)
    handles = [tensor.register_hook(torch.zeros_like) for tensor in between]  # type: ignore[no-untyped-call]
    try:
        around = torch.autograd.grad(total, before, retain_graph=True, allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    arrived, past = (sum(float(g.norm()) ** 2 for g in found if g is not None) for found in (whole, around))
    return arrived > 0 and past <= _PAST**2 * arrived


def along_states(states: Sequence[list[Tensor]]) -> float:
    """What a random cotangent of the last of some states gains on its way to the first, nats; inputs are held fixed."""
    given = random_of([Meta(tuple(t.shape), t.dtype, t.device) for t in states[-1]], seed=0)
    found = 0.0
    for one in states[0]:  # each by itself: what one is made into another of the same time counts there
        others = [other for other in states[0] if other is not one]
        handles = [other.register_hook(torch.zeros_like) for other in others]  # type: ignore[no-untyped-call]
        try:
            (gradient,) = torch.autograd.grad(states[-1], [one], given, retain_graph=True, allow_unused=True)
        finally:
            for handle in handles:
                handle.remove()
        found += 0.0 if gradient is None else float(gradient.double().norm()) ** 2
    size = sum(float(t.double().norm()) ** 2 for t in given)
    return 0.5 * math.log(found / size) if found > 0 else -math.inf


def unit_of(entered: Sequence[list[Tensor]]) -> str:
    """What the calls of a module count: times, but where some of them are given what the call before was given."""
    for column in zip(*entered, strict=False):
        again = [a.shape == b.shape and bool((a == b).all()) for a, b in itertools.pairwise(column)]
        if any(again) and not all(again):
            return "calls"
    return "time steps"


def of_loop(states: list[list[Tensor]], entered: list[list[Tensor]]) -> tuple[bool, list[list[Tensor]]]:
    """Whether a loop's module is no head beside it, and what its calls are given where most of the state passes around.

    A cell puts out the next state. A network that a solver or a sampler calls puts out the change of a state, or a
    guess at its end, and the state is carried on around it: what comes back is then seen at what it is given.
    """
    last = torch.stack([tensor.sum() for tensor in states[-1]]).sum()
    every = {id(tensor) for tensor in entered[-1]}  # what every call is given is no state
    given = [[t for t in tensors if t.requires_grad and id(t) not in every] for tensors in entered[:-1]]
    found = torch.autograd.grad(last, [*states[-2], *given[-1]], retain_graph=True, allow_unused=True)
    through = [(state, g) for state, g in zip(states[-2], found, strict=False) if g is not None]
    if not through:
        return False, []
    outputs, sent = [state for state, _ in through], [g for _, g in through]
    inside = torch.autograd.grad(outputs, given[-1], sent, retain_graph=True, allow_unused=True) if given[-1] else ()
    pairs = [(w, i) for w, i in zip(found[len(states[-2]) :], inside, strict=True) if w is not None]
    around = sum(float((w if i is None else w - i).norm()) ** 2 for w, i in pairs)
    carried = around > _AROUND * sum(float(w.norm()) ** 2 for w, _ in pairs)
    return True, [tensors for tensors in given if tensors] if carried else []
