"""The facts of an activation that is in no table, by evaluating it."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from stabkit.errors import ArgumentError
from stabkit.vocabulary.facts import ActivationFacts, Function

_PIECES = 8  # derivatives that a measured function takes at most where it is called piecewise linear


def measure(function: Function, name: str, known: Iterable[ActivationFacts] = ()) -> ActivationFacts | None:
    """The facts of a function of a tensor, by evaluating it; None if it does not act on every number alone.

    Its derivative is sampled between -30 and 30, and again around its least and its largest value; its limits are read
    off at 10^4. Kinks are found where it is piecewise linear. One that computes what a ``known`` one does is that.

    Example:
        >>> facts = measure(lambda x: torch.relu(x) - 0.1 * torch.relu(-x), "mine")
        >>> facts.name, [round(slope, 6) for slope in facts.slope], facts.kinks
        ('mine', [0.1, 1.0], (0.0,))
    """
    grid = torch.linspace(-30.0, 30.0, 6001, dtype=torch.float64)
    some = torch.arange(6000, -1, -7)
    try:
        with torch.random.fork_rng(devices=[]):
            y, slopes = _sampled(function, grid)
            if not torch.allclose(_sampled(function, grid[some])[0], y[some], 1e-9, 1e-12, equal_nan=True):
                return None
            far, steep = _sampled(function, grid.new_tensor([-2e4, -1e4, 2e4, 1e4]))
            near = [_sampled(function, grid[i] + grid / 3000)[1] for i in (slopes.argmin(), slopes.argmax())]
    except Exception:  # whatever it raises on a plain vector, it is no function of single numbers
        return None
    if bool(torch.stack([slopes, *near]).isnan().any() or steep.isnan().any()):
        return None  # it has no derivative somewhere, as a root has none below zero
    for facts in known:
        if facts.function is not None and torch.allclose(facts.function(grid), y, 1e-9, 1e-12):
            return facts
    if any(bool(found.isnan().any()) for found in (slopes, steep, *near)):
        return None  # a root or a logarithm has no derivative at all numbers
    limits = _limit(*far[:2].tolist()), _limit(*far[2:].tolist())
    flat = [0.0] if any(map(math.isfinite, limits)) else []
    low, high = (sign * max([_bound(sign * torch.cat([slopes, *near]), sign * steep), *flat]) for sign in (-1, 1))
    kinks: tuple[float, ...] = ()
    pieces = len(set(slopes.round(decimals=9).tolist())) <= _PIECES
    if pieces:
        bends = ((slopes[1:] - slopes[:-1]).abs() > 1e-9).nonzero().flatten()
        offsets = y - slopes * grid
        meet = (offsets[bends] - offsets[bends + 1]) / (slopes[bends + 1] - slopes[bends])
        kinks = tuple(sorted(set(meet.clamp(grid[bends], grid[bends + 1]).round(decimals=9).tolist())))
    return ActivationFacts(name, (low, high), limits, kinks, pieces, {}, function)


def _sampled(function: Function, x: Tensor) -> tuple[Tensor, Tensor]:
    """A function and its derivative at some points."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        y = function(x * 1.0)  # it may write into its argument
        if y.shape != x.shape:
            raise ArgumentError(f"shape={tuple(y.shape)}; expected that of the argument, {tuple(x.shape)}")
        (slopes,) = torch.autograd.grad(y.sum(), x)
    return y.detach(), slopes


def _bound(slopes: Tensor, outer: Tensor) -> float:
    """The largest derivative; infinite if it still grows far out."""
    best, far, near = float(slopes.max()), float(outer[::2].max()), float(outer[1::2].max())
    return math.inf if far > 1.5 * max(best, near, 0.0) else max(best, far, near)


def _limit(far: float, near: float) -> float:
    """A limit from values at two distances, one twice the other; exact for tails like 1 / x."""
    if abs(far - near) <= 1e-3:
        return 2 * far - near
    return math.copysign(math.inf, far - near) if abs(far) > max(abs(near), 2.0) else math.nan
