"""A few steps of the usual optimizers at the usual rates, on a copy: what the units of a loss do to them.

A rate that is measured by the weights, as in `stabkit.diagnosis.remedies.short_training`, is blind to units; the
rates that people type in are not.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from stabkit.diagnosis.finding import Action
from stabkit.diagnosis.remedies import computed as remedies
from stabkit.diagnosis.remedies.applying import may_train, stood_in, trainable
from stabkit.diagnosis.remedies.made_once import once
from stabkit.diagnosis.remedies.short_training import STEPS, ShortTraining
from stabkit.errors import StabkitError
from stabkit.tracing.recording.forward_pass import ForwardPass
from stabkit.tracing.recording.training_pass import training_pass

RATES = (1e-2, 1e-3)  # from the usual 0.01 of SGD down to the default of Adam
#: in words, with what is needed to take the same steps
ADAM = f"Adam (rate {' or '.join(f'{rate:g}' for rate in RATES)}, whichever ends lower)"
EPSILON = 1e-8  # the default of Adam
_FIRST, _SECOND = 0.9, 0.999  # the decays of its moments
#: shares of the first loss, and a factor. Affine models of tasks that ask for more kept .81 and above, their ReLUs
#: gained .61 and above and fell 5 times as far, positions alike; what suffices kept .34 at most. Of labels that nothing
#: tells, which are learnt by heart in the end, ReLUs gained .14
_ORDINARY = 1e-3  # of a loss: gradients are then some powers of ten above eps
_KEPT = 0.5  # what a model that learns what it can keeps less of, be it by heart
_GAINED = 0.2  # what a remedy must bring beside the model as it is
_TIMES = 1.5  # by how much the fall of the loss must be larger with it

Update = Callable[[int, Tensor, Tensor, list[Tensor]], None]


@functools.cache  # the same rate is the same update, by which a training is told
def sgd(rate: float) -> Update:
    """Plain gradient descent."""

    def update(_step: int, weight: Tensor, gradient: Tensor, _state: list[Tensor]) -> None:
        weight.sub_(gradient, alpha=rate)

    return update


@functools.cache
def adam(rate: float, factor: float = 1.0, eps: float = EPSILON) -> Update:
    """Adam with its default constants but for its eps, on gradients that are multiplied by a factor."""

    def update(step: int, weight: Tensor, gradient: Tensor, state: list[Tensor]) -> None:
        gradient = factor * gradient
        if not state:
            state += [torch.zeros_like(weight), torch.zeros_like(weight)]
        mean, square = state
        mean.lerp_(gradient, 1 - _FIRST)
        square.lerp_(gradient.square(), 1 - _SECOND)
        size = (square / (1 - _SECOND**step)).sqrt_().add_(eps)
        weight.addcdiv_(mean, size, value=-rate / (1 - _FIRST**step))

    return update


def adams(size: float) -> list[Update]:
    """Adam at the usual rates for a loss of this size, whose eps (1e-8) is not to be the largest part of its steps.

    Of a loss of ordinary size the gradients are taken as they are, as every other training of the diagnosis takes them.
    """
    factor = 1.0 / size if 0 < size < _ORDINARY else 1.0
    return [adam(rate, factor) for rate in RATES]


def left_after(
    call: ForwardPass,
    loss: Any,
    updates: Sequence[Update],
    actions: Sequence[Action] = (),
    *,
    steps: int = STEPS,
    within: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> float | None:
    """What is left of a loss after a few steps, over what it was, at the best of some updates; None where not tried.

    Infinite where all of them diverge. The model, its buffers and the random state stay as they were.

    Args:
        call: the pass as training makes it.
        loss: a callable on the output that returns a scalar.
        updates: ways to move the weights, each of which is tried from the beginning.
        actions: a remedy that is carried out before each.
        steps: how many of each.
        within: makes what each training runs in.
    """
    left = left_on_the_way(call, loss, updates, actions, steps=steps, within=within)
    return None if left is None else left[-1]


def left_on_the_way(
    call: ForwardPass,
    loss: Any,
    updates: Sequence[Update],
    actions: Sequence[Action] = (),
    *,
    steps: int,
    within: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> list[float] | None:
    """The same after every number of steps from none on, each at the best of the updates; None where not tried."""
    runs: list[list[float]] = []
    for update in updates:
        held, words = (loss, update, within), ("usual training", repr(actions), steps)
        run = once(functools.partial(_left, call, loss, update, actions, steps, within), call, held, words)
        if run is None:
            return None
        runs.append(run)
    return [min(shares) for shares in zip(*runs, strict=True)]


def ends_of_adam(
    call: ForwardPass, loss: Any, remedy: remedies.Remedy, treated: ShortTraining, plain: ShortTraining
) -> tuple[ShortTraining, ShortTraining] | None:
    """A few steps of Adam with a remedy and without, each at the better of the usual rates; None where not tried.

    Nor is it where a loss begins at zero or below, of which nothing is a share.

    Args:
        call: the pass as training makes it.
        loss: a callable on the output that returns a scalar.
        remedy: one of the model or of its code.
        treated: a short training with it, of which the first loss is taken.
        plain: the same without.
    """
    if min(treated.first, plain.first) <= 0:
        return None
    updates = adams(min(treated.first, plain.first))
    ends = []
    for run, done in ((treated, remedy), (plain, remedies.Remedy(""))):
        left = [left_after(call, loss, [update], done.actions, within=done.within) for update in updates]
        known = [(share, rate) for share, rate in zip(left, RATES, strict=True) if share is not None]
        if len(known) < len(left):
            return None
        share, rate = min(known)
        ends.append(ShortTraining(run.first, share * run.first, optimizer="Adam", rate=rate))
    return ends[0], ends[1]


def learns_only_treated(first: float, plain: float, treated: float) -> bool:
    """Whether a training learns with a remedy what it does not as the model is.

    Args:
        first: the loss of the model as it is.
        plain: after a training as it is.
        treated: after the same with the remedy.

    Example:
        >>> learns_only_treated(0.7, 0.68, 0.1), learns_only_treated(0.7, 0.2, 0.1), learns_only_treated(0.7, 0.6, 0.55)
        (True, False, False)
    """
    by_itself, by_remedy = first - plain, first - treated
    return plain > _KEPT * first and by_remedy - by_itself > _GAINED * first and by_remedy > _TIMES * by_itself


def left_only_treated(
    call: ForwardPass,
    loss: Any,
    actions: Sequence[Action],
    steps: int,
    within: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> tuple[float, float] | None:
    """What a few steps of Adam leave of a loss as it is, and with a remedy, where only that learns; None elsewhere.

    The remedy is carried out on the model, and trained ``within`` what stands for one of its code.
    """
    begun = training_pass(call, loss, differentiate=False).loss
    first = 0.0 if begun is None else float(begun.detach())
    updates = [adam(rate) for rate in RATES]
    plain = left_after(call, loss, updates, steps=steps)
    treated = left_after(call, loss, updates, actions, steps=steps, within=within)
    if plain is None or treated is None or not first > 0:
        return None
    return (plain, treated) if learns_only_treated(first, plain * first, treated * first) else None


def _left(
    call: ForwardPass,
    loss: Any,
    update: Update,
    actions: Sequence[Action],
    steps: int,
    within: Callable[[], AbstractContextManager[Any]],
) -> list[float] | None:
    if not may_train(call.module):
        return None
    try:
        with stood_in(call.module, actions, within):
            return _run(call, loss, update, steps)
    except (StabkitError, RuntimeError):
        return None


def _run(call: ForwardPass, loss: Any, update: Update, steps: int) -> list[float]:
    """What is left after every number of steps; infinite where the loss is not finite any more, or begins at zero."""
    losses: list[float] = []
    with call.kept(loss), torch.enable_grad():
        weights = list(trainable(call.module).values())
        states: list[list[Tensor]] = [[] for _ in weights]
        for step in range(steps + 1):
            scalar = loss(call.called())
            value = float(scalar.detach())
            if not math.isfinite(value):
                break
            losses.append(value)
            if step < steps:
                moved_by(scalar, weights, states, update, step + 1)
    known = losses if losses and losses[0] > 0 else []
    return [value / losses[0] for value in known] + [math.inf] * (steps + 1 - len(known))


@contextlib.contextmanager
def after_steps(
    call: ForwardPass,
    loss: Any,
    update: Update,
    steps: int,
    altered: Callable[[Tensor], None] | None = None,
    enough: Callable[[], bool] | None = None,
) -> Iterator[bool]:
    """A model after some steps on a copy of its parameters, for a while; whether the loss stayed finite.

    Args:
        call: the pass as training makes it.
        loss: a callable on the output that returns a scalar.
        update: the optimizer.
        steps: how many.
        altered: is called with each loss before its gradients are taken, to hang hooks on its graph.
        enough: asked after each loss whether to end here.
    """
    with stood_in(call.module), call.kept(loss), torch.enable_grad():
        weights = list(trainable(call.module).values())
        states: list[list[Tensor]] = [[] for _ in weights]
        finite = True
        for step in range(1, steps + 1):
            scalar = loss(call.called())
            finite = math.isfinite(float(scalar.detach()))
            if not finite or (enough is not None and enough()):
                break
            if altered is not None:
                altered(scalar)
            moved_by(scalar, weights, states, update, step)
        yield finite


def moved_by(
    scalar: Tensor, weights: Sequence[Tensor], states: Sequence[list[Tensor]], update: Update, step: int
) -> None:
    """Move weights by one step of an optimizer down a loss.

    Args:
        scalar: the loss, on the graph.
        weights: what is moved, in place.
        states: what the optimizer keeps of each.
        update: the optimizer.
        step: counted from 1.
    """
    gradients = torch.autograd.grad(scalar, weights, allow_unused=True)
    with torch.no_grad():
        for weight, gradient, state in zip(weights, gradients, states, strict=True):
            if gradient is not None:
                update(step, weight, gradient, state)
