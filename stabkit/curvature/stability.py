"""A curvature beside what the next update of an optimizer bears."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from stabkit.curvature.hessian import Hessian, Preconditioned
from stabkit.curvature.updates import Update, flat

Product = Callable[..., Tensor]

# Entries of an adaptive preconditioner count as a tenth of their mean at least. One that is far smaller follows its
# gradient within an update, so that what grows there stops at the size of an update. In the first updates of 7 healthy
# runs of Adam and RMSprop the ratio was 1.5 to 2000 without and at most 2.3 with it, later on nearly the same; in 4
# runs that blew up it was 6 to 5000 with it.
FLOOR = 0.1


@dataclass(frozen=True)
class Stability:
    """What follows from the largest eigenvalue of P^-1 (H + W).

    Attributes:
        learning_rate: the present rate, of the group with the largest one.
        threshold: the largest curvature at which updates stay bounded.
        ratio: the curvature over the threshold.
        largest_stable_lr: the rate at which the ratio is 1; ``inf`` where nothing curves upwards.
    """

    learning_rate: float
    threshold: float
    ratio: float
    largest_stable_lr: float

    @classmethod
    def of(cls, update: Update, curvature: float) -> Stability:
        """That of an update at a curvature."""
        decay = update.decays[0] if update.is_plain else 0.0
        threshold = update.interval(update.rate) / update.rate - decay
        ratio = curvature / threshold if threshold > 0 else math.inf
        return cls(update.rate, threshold, ratio, _largest_rate(update, curvature + decay))


def _largest_rate(update: Update, curvature: float) -> float:
    """The rate at which ``rate * curvature`` is the end of the interval, which decoupled decay makes depend on it."""
    if curvature <= 0:
        return math.inf
    rate = update.interval(update.rate) / curvature
    for _ in range(20):  # the interval hardly moves with the rate: this contracts by a factor of decay / curvature
        rate, before = update.interval(rate) / curvature, rate
        if abs(rate - before) <= 1e-12 * rate:
            break
    return rate


def limiting_product(hessian: Hessian, update: Update, floor: float = 0.0) -> Product:
    """Products with the operator whose largest eigenvalue an update has to bear: P^-1/2 (H + W) P^-1/2, or H.

    Args:
        hessian: H.
        update: what gives P and W.
        floor: entries of P count as at least so many times its mean.
    """
    sign = -1.0 if update.ascends else 1.0
    if update.is_plain:
        return signed(hessian, sign)
    like = torch.empty(hessian.n, dtype=hessian.dtype, device=hessian.device)
    scales = flat(update.scales, hessian.parameters, like)
    if floor:
        raise_small(scales, floor)
    roots = scales.rsqrt_()
    shift = flat(update.decays, hessian.parameters, like) if any(update.decays) else 0.0
    return signed(Preconditioned(hessian, roots, shift), sign)


def raise_small(scales: Tensor, floor: float) -> None:
    """Raise the entries of P, in place, to so many times their mean."""
    mean = scales.masked_fill(scales.isinf(), math.nan).nanmean()  # a group whose rate is 0 has an infinite P
    scales.clamp_(min=floor * mean)


def signed(operator: Hessian | Preconditioned, sign: float) -> Product:
    """Its products, or those of minus it."""
    if sign > 0:
        return operator.matvec
    return lambda v, out=None: operator.matvec(v, out).neg_()
