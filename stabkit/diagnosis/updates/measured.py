"""What the coming updates of an optimizer do: curvature against its threshold, the update's own rate, real updates.

Everything is of one Hessian: the gradient on its graph is made once, for the products of the curvature and for the
update. Real updates are made on copies, of the optimizer as well, and only where the rate is in doubt.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from stabkit.curvature.batches import Batches
from stabkit.curvature.critical_rate import CriticalRate, along_update
from stabkit.curvature.hessian import Hessian, refuse_randomness
from stabkit.curvature.sharpness import Sharpness, of_hessian
from stabkit.curvature.twin import Twin
from stabkit.curvature.updates import NoThresholdError, read_update, trained_by
from stabkit.diagnosis.remedies.learning import left_by_a_constant
from stabkit.diagnosis.updates.idle import Idle, idle_updates
from stabkit.errors import StabkitError
from stabkit.tracing.recording.forward_pass import ForwardPass
from stabkit.tracing.recording.untouched_model import unchanged

STEPS = 20  # of real updates
#: Full-batch training hovers at a ratio of 1 and up to 1.2 of it (J. Cohen et al., 2021), where the loss falls all the
#: same: below, no updates are tried
EDGE = 1.2
_END = 5  # losses at the end of a run, of which the median counts: one alone may be a spike, or a trough
SHARES = (0.5, 0.1)  # of the largest stable rate that are proposed, the first that lowers the loss
_LOWER = 1e-3  # of the first loss, by which a run has lowered it
LOWER_RATES = (0.5, 0.25, 0.05)  # of the present one, that are tried where it does not raise the loss
# Of what the best of the lower rates gains on a constant output. Of 40 settings of 10 models whose losses after 100
# updates on fresh batches are known, those at the constant gained .27 of it or less, those that trained .67 or more
_RUINED = 1 / 3
# Times the first loss, and that of the constant output, that a loss may rise to on its way: a batch is learnt by heart
# after that as well, others are not. Adam at .3 and .15 takes a small convolutional network to 430 and 85, at .015 to 3
_SPIKE, _CALM = 10.0, 3.0
_SAME = 1e-7  # of a loss, which is rounding
_WORTH = 0.3  # of the loss of the constant output, that the best of the lower rates must gain on it
_WHOLE = (
    "updates here are of the whole gradient, whose norm is {:.3g}; what a training loop does to it before the step is "
    "not seen: clipping to a smaller norm shortens the update, and the ratio, in proportion"
)
_NOT_THE_RATE = "updates raise the loss, and those at the lower rates that were tried do not lower it: see the findings"


@dataclass(frozen=True)
class UpdateRun:
    """Some real updates on one batch.

    Attributes:
        rate: the learning rate, of the group with the largest one.
        losses: before each update and after the last; it ends where one is not finite.
    """

    rate: float
    losses: tuple[float, ...]

    @property
    def end(self) -> float:
        """Where the loss ends, spikes and troughs aside; infinite where it is not finite."""
        return statistics.median(self.losses[-_END:]) if all(map(math.isfinite, self.losses)) else math.inf

    @property
    def stands_still(self) -> bool:
        """Whether the last losses are the same: no unit is left that passes anything back."""
        last = self.losses[-_END:]
        return len(last) == _END and max(last) - min(last) <= _SAME * abs(last[-1])

    @property
    def raises(self) -> bool:
        """Whether the loss ends above where it began, or not finite."""
        return self.end > self.losses[0]

    @property
    def lowers(self) -> bool:
        """Whether the loss ends below where it began."""
        return not self.raises and self.losses[-1] < self.losses[0] - _LOWER * abs(self.losses[0])

    def __str__(self) -> str:
        first, last = self.losses[0], self.losses[-1]
        end = f"to {last:.3g}" if math.isfinite(last) else "beyond every bound"
        return f"from {first:.3g} {end}"


@dataclass(frozen=True, eq=False)
class UpdateMeasurement:
    """What was measured of the coming updates.

    Attributes:
        optimizer: its class.
        learning_rate: the present one, of the group with the largest.
        sharpness: curvature and threshold; None where there is no threshold, or no second derivative.
        critical: the critical rate along the coming update; None where there is no such update.
        present: real updates at the present rate; None where nothing made it doubtful.
        proposed: real updates at the rate that is proposed; None unless those at the present rate raise the loss and
            these lower it, or those end at the loss of a constant output and these far below.
        lower: real updates at shares of the present rate; none unless it is in doubt and does not raise the loss.
        constant: what the best constant output leaves of the loss, or where none is known, where a fresh training
            begins; None where neither is known, or no lower rates were tried.
        idle: what makes the updates learn nothing; None where they do, or the rate is too high.
        notes: what could not be had, and how it was measured.
    """

    optimizer: str
    learning_rate: float
    sharpness: Sharpness | None = None
    critical: CriticalRate | None = None
    present: UpdateRun | None = None
    proposed: UpdateRun | None = None
    lower: tuple[UpdateRun, ...] = ()
    constant: float | None = None
    idle: Idle | None = None
    notes: tuple[str, ...] = ()

    @property
    def excess(self) -> float | None:
        """By how much the present rate exceeds the largest stable one, or the critical one where there is no such."""
        if self.sharpness is not None:
            return self.sharpness.ratio
        if self.critical is None:
            return None
        return 1 / self.critical.factor if self.critical.factor else math.inf

    @property
    def bound(self) -> float:
        """The largest stable rate, or the critical one where there is no such; ``inf`` where there is neither."""
        if self.sharpness is not None:
            return math.inf if self.sharpness.largest_stable_lr is None else self.sharpness.largest_stable_lr
        return math.inf if self.critical is None else self.critical.rate


def measure_update(
    model: nn.Module,
    inputs: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    loss: Any,
    optimizer: torch.optim.Optimizer,
    seed: int,
    blocks: Sequence[str] | None,
) -> UpdateMeasurement:
    """Measure the coming updates of an optimizer on one batch; model, optimizer and random state stay as they are.

    Updates are made while training: a model that is not in training mode is measured in it, if it runs in it.

    Args:
        model: the model.
        inputs: what it is called with.
        kwargs: keyword arguments of the call.
        loss: a callable on the output that returns a scalar.
        optimizer: any torch optimizer of its parameters, with its state.
        seed: of what the model draws.
        blocks: paths of modules that the curvature is shared out to; None for those that hold parameters.

    Raises:
        ArgumentError: the optimizer trains none of the model's parameters, or others.
    """
    trained = trained_by(optimizer, model)
    found = UpdateMeasurement(type(optimizer).__name__, max(float(g["lr"]) for g in optimizer.param_groups))
    with unchanged(model):
        try:
            hessian = Hessian(model, trained, Batches(inputs, kwargs, loss, None), seed)
            notes = _in_training_mode(hessian)
            refuse_randomness(hessian)
            found = replace(found, notes=notes)
            found = _curvature(found, hessian, optimizer, blocks)
        except (StabkitError, torch.OutOfMemoryError) as error:
            return replace(found, notes=(*found.notes, f"no critical rate: {_short(error)}"))
        try:
            found = replace(found, critical=along_update(hessian, optimizer))
        except (StabkitError, torch.OutOfMemoryError) as error:  # an update too short for any difference is one
            found = replace(found, notes=(*found.notes, f"no critical rate: {_short(error)}"))
        found = _tried(found, hessian, optimizer)
        if found.present is not None:
            return found
        idle = idle_updates(hessian, optimizer, found.bound, lambda: _left_by_a_constant(hessian))
        return replace(found, idle=idle)


def _in_training_mode(hessian: Hessian) -> tuple[str, ...]:
    """Put a model that is not in training mode into it, where it runs in it; what that changes, in a sentence."""
    model = hessian.module
    if model.training:
        return ()
    modes = [(module, module.training) for module in model.modules()]
    still = hessian.loss()
    try:
        model.train()
        moving = hessian.loss()
    except Exception as error:  # a batch of one sample has no statistics, and anything else that a model raises
        for module, mode in modes:
            module.training = mode
        return (f"measured in eval mode, since the model does not run in training mode: {_short(error)}",)
    if math.isclose(still, moving, rel_tol=1e-6):
        return ()
    return (f"measured in training mode, as updates are made, where the loss is {moving:.4g}; in eval {still:.4g}",)


def _curvature(
    found: UpdateMeasurement, hessian: Hessian, optimizer: torch.optim.Optimizer, blocks: Sequence[str] | None
) -> UpdateMeasurement:
    try:
        sharpness = of_hessian(hessian, read_update(optimizer, hessian.module), blocks=blocks)
    except (StabkitError, torch.OutOfMemoryError) as error:
        why = error.why if isinstance(error, NoThresholdError) else _short(error)
        return replace(found, notes=(*found.notes, f"no threshold: {why}"))
    return replace(found, sharpness=sharpness, notes=(*found.notes, *sharpness.notes))


def _tried(found: UpdateMeasurement, hessian: Hessian, optimizer: torch.optim.Optimizer) -> UpdateMeasurement:
    """With real updates, where the rate is in doubt: at the present rate, and where they raise the loss at lower ones.

    Of 312 measurements at usual rates (SGD, momentum, Nesterov, Adam, AdamW, NAdam, RMSprop, Lion; five small models,
    at first and after 1, 5 and 100 updates) 23 were in doubt, and none raised the loss.
    Of 61 in doubt at rates from 3 for SGD and .3 for Adam, 29 did; the others recover, most under batch norm or Adam.
    """
    excess, bound = found.excess, found.bound
    if excess is None or not excess > EDGE:
        return found
    size = float(torch.linalg.vector_norm(hessian.gradient()))
    found = replace(found, notes=(*found.notes, _WHOLE.format(size)))
    present = UpdateRun(found.learning_rate, tuple(Twin(hessian, optimizer).losses(STEPS)))
    found = replace(found, present=present)
    if not present.raises:
        return _beside_lower_rates(found, hessian, optimizer)
    if not 0 < bound < math.inf:
        return found
    for share in SHARES:
        run = _run(hessian, optimizer, share * bound)
        if run.lowers:
            return replace(found, proposed=run)
    return replace(found, notes=(*found.notes, _NOT_THE_RATE))


def _beside_lower_rates(
    found: UpdateMeasurement, hessian: Hessian, optimizer: torch.optim.Optimizer
) -> UpdateMeasurement:
    """With as many updates at lower rates: a rate does harm where those learn and it ends where a constant output does.

    That a loss ends below its start says little: a network that was thrown into a state in which it answers the same to
    every input ends there too.
    """
    present = found.present
    assert present is not None
    lower = tuple(_run(hessian, optimizer, share * found.learning_rate) for share in LOWER_RATES)
    if 0 < found.bound < LOWER_RATES[-1] * found.learning_rate:  # all of these are as far above what is stable
        lower += (_run(hessian, optimizer, SHARES[0] * found.bound),)
    constant = _left_by_a_constant(hessian)
    if constant is None and not optimizer.state:
        constant = present.losses[0]
    best = min(lower, key=lambda run: run.end)
    found = replace(found, lower=lower, constant=constant)
    if constant is not None:
        gains = constant - best.end
        if gains > _WORTH * abs(constant) and constant - present.end < _RUINED * gains:
            return replace(found, proposed=best)
        if present.stands_still and present.end > constant and best.end < present.end and not best.stands_still:
            return replace(found, proposed=best)
    base = max(abs(present.losses[0]), abs(constant or 0.0))
    calm = [run for run in lower if max(run.losses) < _CALM * base and run.end <= present.end]
    if max(present.losses) > _SPIKE * base and calm:
        return replace(found, proposed=min(calm, key=lambda run: run.end))
    ends = ", ".join(f"{run.end:.3g} at {run.rate:.3g}" for run in lower)
    note = (
        f"the rate is above what is stable on a quadratic, and no harm was measured: {STEPS} updates on this batch end "
        f"at {present.end:.3g}, and at lower rates at {ends}; of other batches and longer training this says nothing"
    )
    return replace(found, notes=(*found.notes, note))


def _run(hessian: Hessian, optimizer: torch.optim.Optimizer, rate: float) -> UpdateRun:
    factor = rate / max(float(g["lr"]) for g in optimizer.param_groups)
    return UpdateRun(rate, tuple(Twin(hessian, optimizer, factor).losses(STEPS)))


def run_with(
    model: nn.Module,
    call: ForwardPass,
    loss: Any,
    optimizer: torch.optim.Optimizer,
    seed: int,
) -> UpdateRun | None:
    """As many updates of an optimizer at its own rate on another call and another loss; None where none can be made.

    Args:
        model: the model.
        call: what it is called with.
        loss: a callable on the output that returns a scalar.
        optimizer: of its parameters; it stays as it is.
        seed: of what the model draws.
    """
    rate = max(float(g["lr"]) for g in optimizer.param_groups)
    with unchanged(model):
        try:
            hessian = Hessian(model, trained_by(optimizer, model), Batches(call.inputs, call.kwargs, loss, None), seed)
            _in_training_mode(hessian)
            return UpdateRun(rate, tuple(Twin(hessian, optimizer).losses(STEPS)))
        except (StabkitError, torch.OutOfMemoryError):
            return None  # the model does not take such inputs


def _left_by_a_constant(hessian: Hessian) -> float | None:
    (batch,) = hessian.own_batches()
    with hessian.running(batch, graph=False) as (output, _):
        left: float | None = left_by_a_constant(batch.loss, output)
    return left


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
