"""Updates that learn nothing though the loss could be lowered: far too short, or taken back by weight decay.

Both are tried on copies of the parameters and of the optimizer: as many updates at a rate that the curvature bears, and
as many without the decay.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from stabkit.curvature.hessian import Hessian
from stabkit.curvature.twin import Twin
from stabkit.diagnosis.finding import Finding, of_training
from stabkit.errors import StabkitError

_ORDINARY = 1e-4  # a rate from which on nobody means too low a one; what keeps a loss from moving there are its scales
_STILL = 1e-3  # of the first loss, that the present rate may move it by: a thousand times as many would be needed
_NOISE = 0.01  # of the first loss, that rounding moves one of tiny numbers by
_OTHERS = (1e-3, 1e-2, 1e-1)  # rates at which the same number of updates is tried
_POWERS = (2, 4, 6)  # of ten, by which an ordinary rate is multiplied where the gradient is next to nothing
_WEAK = 1e-6  # of the size of the weights, below which a first update is next to nothing: it is .001 or so elsewhere
_STEPS = 50
_CLEARLY = 0.9  # of the first loss, below which these must end
_UNTRAINED = 0.9  # of what the best constant output leaves, below which a model has learnt, and its rate has come down
_DECAYED = 100  # updates with weight decay and without, ten times as long as they are where the curvature bears that
_LONGER, _SHARE = 10.0, 0.1  # times as long, up to that share of the largest stable rate
_DOMINATES = 1.0  # pull of the decay over the gradient of the loss, from which it is tried; trained networks come there
_AT_CONSTANT = 0.6  # of what the best constant output leaves, above which little is learnt with the decay
_LEARNS = 0.5  # of what is left with the decay, below which it is without
_DECAY_REFERENCE = "Loshchilov and Hutter, Decoupled weight decay regularization, 2019"
_RATE_REFERENCE = "Smith, Cyclical learning rates for training neural networks, 2017"


@dataclass(frozen=True)
class Idle:
    """Updates that learn nothing, beside others that do.

    Attributes:
        steps: how many were made of each.
        first: the loss before.
        end: the loss after those at the present settings.
        other: the loss after the others.
        rate: the learning rate of both, or of the others.
        decay: the weight decay that the others go without; 0 where the rate is what differs.
        pull: the size of the decay over that of the gradient.
        constant: what the best constant output leaves of the loss, where that was asked.
    """

    steps: int
    first: float
    end: float
    other: float
    rate: float
    decay: float = 0.0
    pull: float = 0.0
    constant: float = math.nan


def idle_updates(
    hessian: Hessian,
    optimizer: torch.optim.Optimizer,
    bound: float,
    left_by_a_constant: Callable[[], float | None],
) -> Idle | None:
    """What makes the updates of an optimizer idle, where that was measured; None where they are not.

    Args:
        hessian: of the loss, at the parameters as they are.
        optimizer: of these parameters; it stays as it is.
        bound: the largest stable rate; infinite where that is not known.
        left_by_a_constant: what the best constant output leaves of the loss, where that is known.
    """
    rate = max(float(g["lr"]) for g in optimizer.param_groups)
    if is_scheduled(optimizer) or not rate > 0:
        return None  # a warm-up begins near zero
    others = _OTHERS if rate < _ORDINARY else tuple(rate * 10.0**power for power in _POWERS)
    weak = rate < _ORDINARY or _is_weak(hessian, optimizer)
    if weak and (idle := _too_short(hessian, optimizer, rate, others, left_by_a_constant)) is not None:
        return idle
    decay, pull = _pull(hessian, optimizer)
    constant = left_by_a_constant() if pull > _DOMINATES else None
    if constant is None:
        return None
    factor = min(_LONGER, max(1.0, _SHARE * bound / rate)) if math.isfinite(bound) else 1.0
    runs = [Twin(hessian, optimizer, factor, change) for change in (None, _without_decay)]
    plain, without = (twin.losses(_DECAYED) for twin in runs)
    if not (plain[-1] >= _AT_CONSTANT * constant and without[-1] < _LEARNS * plain[-1]):
        return None
    return Idle(_DECAYED, plain[0], plain[-1], without[-1], factor * rate, decay, pull, constant)


def _is_weak(hessian: Hessian, optimizer: torch.optim.Optimizer) -> bool:
    """Whether the first update is next to nothing beside the weights, though its rate is an ordinary one."""
    twin = Twin(hessian, optimizer)
    try:
        twin.step()
    except StabkitError:
        return False  # it makes no update by itself, as is noted where that is tried first
    pairs = zip(twin.values(), hessian.parameters, strict=True)
    moved = sum(float((new - p.detach()).double().square().sum()) for new, p in pairs)
    size = sum(float(p.detach().double().square().sum()) for p in hessian.parameters)
    return 0 < moved < _WEAK**2 * size


def _without_decay(group: dict[str, Any]) -> None:
    group["weight_decay"] = 0.0


def is_scheduled(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a schedule sets its rates, as a warm-up from zero does."""
    wrapped = hasattr(optimizer.step, "_wrapped_by_lr_sched")
    return wrapped or any("initial_lr" in group for group in optimizer.param_groups)


def _too_short(
    hessian: Hessian,
    optimizer: torch.optim.Optimizer,
    rate: float,
    others: Sequence[float],
    left_by_a_constant: Callable[[], float | None],
) -> Idle | None:
    plain = Twin(hessian, optimizer).losses(_STEPS)
    first, constant = plain[0], left_by_a_constant()
    learnt = constant is not None and first < _UNTRAINED * constant
    if (
        learnt
        or not math.isfinite(plain[-1])
        or abs(plain[-1] - first) > (_STILL if rate < _ORDINARY else _NOISE) * abs(first)
    ):
        return None
    ends = {other: Twin(hessian, optimizer, other / rate).losses(_STEPS)[-1] for other in others}
    best = min(ends, key=lambda other: ends[other] if math.isfinite(ends[other]) else math.inf)
    if not ends[best] < first - (1 - _CLEARLY) * abs(first):
        return None
    return Idle(_STEPS, first, plain[-1], ends[best], best)


def _pull(hessian: Hessian, optimizer: torch.optim.Optimizer) -> tuple[float, float]:
    """The largest weight decay that is added to gradients, and the size of what it adds over that of the gradient."""
    decays: dict[int, float] = {}
    for group in optimizer.param_groups:
        if not group.get("decoupled_weight_decay", isinstance(optimizer, torch.optim.AdamW)):
            decays |= {id(p): float(group.get("weight_decay", 0.0)) for p in group["params"]}
    if not any(decays.values()):
        return 0.0, 0.0
    pulled = sum(float((decays.get(id(p), 0.0) * p.detach().double()).square().sum()) for p in hessian.parameters)
    size = float(torch.linalg.vector_norm(hessian.gradient()))
    return max(decays.values()), math.sqrt(pulled) / size if size > 0 else math.inf


def idle_finding(idle: Idle, name: str, rate: float) -> Finding:
    """It, told.

    Args:
        idle: what was measured.
        name: the class of the optimizer.
        rate: its learning rate.
    """
    if idle.decay:
        evidence = (
            f"the weight decay {idle.decay:.3g} of {name} pulls at the weights {idle.pull:.3g} times as much as the "
            f"gradient of the loss does; on a copy, {idle.steps} updates at a rate of {idle.rate:.3g} take the loss "
            f"from {idle.first:.3g} to {idle.end:.3g}, where an output that is the same for every input leaves "
            f"{idle.constant:.3g}, and without the decay to {idle.other:.3g}"
        )
        remedy = (
            f"lower weight_decay from {idle.decay:.3g} to 1e-4 or so; or take AdamW, whose decay is a share of the "
            "rate and not a part of the gradient (0.01 there)"
        )
    elif rate >= _ORDINARY:
        times = idle.rate / rate
        evidence = (
            f"the gradient of the loss is so small that {idle.steps} updates of {name} at a rate of {rate:.3g} move "
            f"it on this batch from {idle.first:.6g} to {idle.end:.6g} alone; on a copy, as many at {times:.0e} times "
            f"that rate take it to {idle.other:.3g}"
        )
        remedy = (
            f"multiply the loss by about {times:.0e} (where logits are divided by a temperature, by its square), or "
            "take an optimizer that divides a gradient by its size, such as Adam"
        )
    else:
        evidence = (
            f"the learning rate {rate:.3g} of {name} is so low that {idle.steps} updates on this batch move the loss "
            f"from {idle.first:.6g} to {idle.end:.6g} alone; on a copy, as many at {idle.rate:.3g} take it to "
            f"{idle.other:.3g}"
        )
        remedy = f"raise the learning rate from {rate:.3g} to about {idle.rate:.2g}, with a warm-up if it is to rise on"
    return of_training(
        kind="idle_update",
        severity="warning",
        evidence=evidence,
        remedy=remedy,
        reference=_DECAY_REFERENCE if idle.decay else _RATE_REFERENCE,
        numbers={"learning_rate": rate, "loss": idle.first, "end": idle.end, "other": idle.other},
    )
