"""Exponential growth told from a power law and a square root, so that slow growth is not called an explosion."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stabkit.arguments import accepts
from stabkit.errors import ArgumentError
from stabkit.results import Result

Array = npt.NDArray[np.float64]

DECISIVE = 10.0  # difference in AIC below which no law is preferred (Burnham and Anderson, 2002)
_NOISE = 1e-9  # residuals below this share of the range are rounding
_SHIFTS = 60


@dataclass(frozen=True)
class RateLaw(Result):
    """Which law log growth follows over depth or time.

    Attributes:
        law: ``"exponential"``, ``"power"``, ``"square root"``, ``"constant"``, or ``"undecided"`` when an exponential
            fits best but not decisively.
        rate: slope of the exponential fit, in nats per step.
        exponent: exponent p of the fit ``(step + shift)^p``.
        shift: its shift, in steps.
        square_root_rate: slope against the square root of the step.
        aic: Akaike's criterion of every law, with the correction for small samples; less is better.
        margin: by how much an exponential is better than the best other law; negative when it is worse.
        points: how many values were fitted.
    """

    law: str
    rate: float
    exponent: float
    shift: float
    square_root_rate: float
    aic: dict[str, float]
    margin: float
    points: int


@accepts
def rate_law(logs: Tensor | Array, *, places: Array | None = None, decisive: float = DECISIVE) -> RateLaw:
    """The law that logs of norms follow over the states, by Akaike's information criterion.

    An exponential is accepted only when it is decisively better than ``(step + shift)^p``, ``exp(sqrt(step))`` and a
    constant: gradients of a normalised residual network grow like a power of depth, over any depth.

    Args:
        logs: natural logs of norms, ``(states,)`` in order from the input, or ``(states, samples)``, averaged.
            For a gradient profile: ``profile.log_gradient_norms``.
        places: depth or time of every value, increasing from 0, in steps; 0, 1, 2, ... by default.
        decisive: the difference in AIC that an exponential must have.

    Raises:
        ArgumentError: fewer than 7 states, or values that are not finite.

    Source:
        Burnham and Anderson, "Model selection and multimodel inference" (2002).

    Example:
        >>> import torch
        >>> depth = torch.arange(64, dtype=torch.float64)
        >>> rate_law(0.1 * depth).law, rate_law(-2 * (depth + 1).log()).law
        ('exponential', 'power')
    """
    values = np.asarray(logs.detach().cpu() if isinstance(logs, Tensor) else logs, dtype=float)
    values = values.mean(axis=1) if values.ndim == 2 else values
    if values.ndim != 1 or len(values) < 7:
        raise ArgumentError(
            f"logs has shape {np.shape(logs)}; expected (states,) or (states, samples), at least 7 states"
        )
    if not np.isfinite(values).all():
        raise ArgumentError("logs has values that are not finite: leave out the steps that pass nothing back")
    depth: Array = np.arange(len(values), dtype=float) if places is None else np.asarray(places, dtype=float)
    if depth.shape != values.shape or depth[0] < 0 or (np.diff(depth) <= 0).any():
        raise ArgumentError(f"places has shape {depth.shape}; expected {len(values)} numbers that increase from 0")
    floor = (_NOISE * max(1.0, float(np.ptp(values)))) ** 2 * len(values)
    constant = float(((values - values.mean()) ** 2).sum())
    _, rate, straight = _line(depth, values)
    _, root_rate, root = _line(np.sqrt(depth), values)
    shifts = np.geomspace(0.05, max(2.0, float(depth[-1]) / 8), _SHIFTS)
    shift = float(min(shifts, key=lambda c: _line(np.log(depth + c), values)[2]))
    _, exponent, power = _line(np.log(depth + shift), values)
    residuals = {
        "constant": (constant, 2),
        "exponential": (straight, 3),
        "square root": (root, 3),
        "power": (power, 4),
    }
    aic = {name: _aic(max(rss, floor), len(values), count) for name, (rss, count) in residuals.items()}
    margin = min(value for name, value in aic.items() if name != "exponential") - aic["exponential"]
    best = min(aic, key=lambda name: aic[name])
    law = "undecided" if best == "exponential" and margin < decisive else best
    return RateLaw(law, rate, exponent, shift, root_rate, aic, margin, len(values))


def _line(x: Array, y: Array) -> tuple[float, float, float]:
    """Intercept, slope and sum of squared residuals of a straight line."""
    dx, dy = x - x.mean(), y - y.mean()
    slope = float(dx @ dy / (dx @ dx))
    return float(y.mean() - slope * x.mean()), slope, float(((dy - slope * dx) ** 2).sum())


def _aic(rss: float, count: int, parameters: int) -> float:
    small = 2 * parameters * (parameters + 1) / (count - parameters - 1)
    return count * math.log(rss / count) + 2 * parameters + small


def cumulative(growth: Tensor) -> Tensor:
    """Sums of growth over the steps so far, ``(steps, ...) -> (steps + 1, ...)``, beginning with 0."""
    return torch.cat([torch.zeros_like(growth[:1]), growth.cumsum(0)])
