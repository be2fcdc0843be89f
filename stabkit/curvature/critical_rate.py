"""The rate at which the coming update would raise the loss, by forward passes alone.

Along an update p the loss is L(theta - t p) = L - t g.p + t^2/2 p.Hp + ...: it rises beyond t = 2 g.p / p.Hp. This is
not the threshold of stability: it belongs to one direction and one update, and any optimizer has it (J. Gilmer et al.,
A loss curvature perspective on training instability, ICLR 2022).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stabkit.arguments import accepts
from stabkit.curvature.batches import Batches
from stabkit.curvature.hessian import Hessian, refuse_randomness
from stabkit.curvature.setting_aside import refuse_unusable
from stabkit.curvature.summing import ALONE, Summing, agreed
from stabkit.curvature.twin import Twin, standing_at
from stabkit.curvature.updates import trained_by
from stabkit.errors import ArgumentError
from stabkit.results import Result
from stabkit.tracing.recording.randomness import unchanged_randomness
from stabkit.tracing.recording.wrappers import unwrap

_DOUBLINGS = 24
_HALVINGS = 12
_ROUNDING = 16  # times the rounding of a loss, by which it moves by chance


@dataclass(frozen=True)
class CriticalRate(Result):
    """Where the loss along an update comes back to where it was.

    Attributes:
        factor: by how much the update could be longer, or has to be shorter, before the loss is no lower than it is
            now; ``inf`` where it still falls at 2^24 times the update, 0 where the update rises at any length tried.
        rate: the learning rate at which it would be so, of the group with the largest one.
        learning_rate: the present rate.
        loss: the present loss.
        loss_after: the loss after the update at the present rate, on the same batches.
        slope: g.p, the fall of the loss per unit of the update, by differences; negative where the update climbs.
        n_losses: how many times the loss was computed.
    """

    factor: float
    rate: float
    learning_rate: float
    loss: float
    loss_after: float
    slope: float
    n_losses: int


@accepts
def critical_rate(
    model: nn.Module,
    *inputs: Any,
    loss: Any,
    optimizer: Any,
    batches: Iterable[Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    seed: int = 0,
    ranks: Summing | None = None,
) -> CriticalRate:
    """How long the coming update of an optimizer may be before it raises the loss.

    The update is made by the optimizer itself, on copies of the parameters and of its state: any torch optimizer will
    do, also one whose update is no gradient step. The loss is then computed at multiples of it, doubled or halved until
    the point is enclosed and then bisected to 1 percent.

    Args:
        model: the model; it and the optimizer come back as they were.
        *inputs: what it is called with.
        loss: a callable on the output that returns a scalar; with ``batches``, on the output and the targets.
        optimizer: any torch optimizer of its parameters.
        batches: pairs of inputs and targets in place of ``inputs``, over which the loss is the mean.
        kwargs: keyword arguments of the call.
        seed: of what the model draws.
        ranks: who shares the batches, as of `sharpness`.

    Raises:
        ArgumentError: the loss is random or not finite, the update is zero, or the optimizer needs a closure or trains
            other parameters.
        ArgumentTypeError: ``optimizer`` is no torch optimizer.

    Example:
        >>> torch.manual_seed(0) and None
        >>> model, x = nn.Linear(1, 1, bias=False), torch.ones(1, 1)
        >>> sgd = torch.optim.SGD(model.parameters(), lr=0.5)
        >>> found = critical_rate(model, x, loss=lambda out: out.square().sum() / 2, optimizer=sgd)
        >>> round(found.rate, 1)
        2.0
    """
    shared = ranks or ALONE
    with agreed(shared):
        module = unwrap(model)
        trained = trained_by(optimizer, module)
        refuse_unusable(trained)
        if any(p.is_inference() for p in trained):
            raise ArgumentError(
                "parameters were made in inference_mode and cannot be trained; build the model outside it"
            )
    with torch.inference_mode(False), unchanged_randomness():
        with agreed(shared):
            hessian = Hessian(module, trained, Batches(inputs, kwargs, loss, batches), seed, shared)
        with hessian.casting.off():
            refuse_randomness(hessian)
            return along_update(hessian, optimizer)


def along_update(hessian: Hessian, optimizer: torch.optim.Optimizer) -> CriticalRate:
    """The critical rate of an optimizer's coming update; a gradient that the Hessian keeps is used, and let go of.

    Raises:
        ArgumentError: the loss is not finite, or the optimizer makes no update by itself, or one that is zero, not
            finite, or too short for the loss to move at any multiple of it.
    """
    twin = Twin(hessian, optimizer)
    twin.step()
    hessian.release()
    update = [new - p.detach() for new, p in zip(twin.values(), hessian.parameters, strict=True)]
    if not all(bool(part.isfinite().all()) for part in update):
        finite = bool(hessian.gradient().isfinite().all())
        raise ArgumentError(
            f"the coming update of optimizer {type(optimizer).__name__} is not finite, though the loss "
            f"({hessian.loss():.4g}) {'and its gradient are' if finite else 'is: its gradient is not'}"
        )
    if not any(bool(part.any()) for part in update):
        raise ArgumentError(f"the coming update of optimizer {type(optimizer).__name__} is zero; it has no direction")
    return _searched(hessian, update, max(float(g["lr"]) for g in optimizer.param_groups))


def _searched(hessian: Hessian, update: list[Tensor], rate: float) -> CriticalRate:
    made = 0

    def at(factor: float) -> float:
        nonlocal made
        made += 1
        points = [torch.add(p.detach(), part, alpha=factor) for p, part in zip(hessian.parameters, update, strict=True)]
        with standing_at(hessian.parameters, points):
            return hessian.loss()

    here, after = at(0.0), at(1.0)
    if not math.isfinite(here):
        raise ArgumentError(f"the loss is {here}; nothing can be said of the update")
    low, high = 0.0, math.inf
    factor, there = 1.0, after
    noise = _ROUNDING * torch.finfo(hessian.dtype).eps * abs(here)
    while (
        abs(there - here) <= noise and factor < 2.0**_DOUBLINGS
    ):  # an update that moves the loss by less than it is rounded by
        factor *= 2.0
        there = at(factor)
    if abs(there - here) <= noise:
        raise ArgumentError(f"the coming update moves the loss by less than rounding, and so do 2^{_DOUBLINGS} of it")
    if there < here:
        low = factor
        for _ in range(_DOUBLINGS):
            factor *= 2.0
            if not at(factor) < here:
                high = factor
                break
            low = factor
    else:
        high = factor
        for _ in range(_DOUBLINGS):
            factor /= 2.0
            if at(factor) < here:
                low = factor
                break
            high = factor
    if low and math.isfinite(high):
        for _ in range(_HALVINGS):
            if high <= 1.01 * low:
                break
            middle = math.sqrt(low * high)
            low, high = (middle, high) if at(middle) < here else (low, middle)
    found = math.sqrt(low * high) if low and math.isfinite(high) else (math.inf if low else 0.0)
    step = (low or 1.0) * 1e-2 if math.isfinite(low) else 1.0
    return CriticalRate(found, found * rate, rate, here, after, (here - at(step)) / step, made)
