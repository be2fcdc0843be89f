"""The law by which squared gradients grow over depth: an exponential, a power, or not to be told apart."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from stabkit.errors import ArgumentError
from stabkit.meanfield.gaussian import Array
from stabkit.meanfield.phase import depth_scale
from stabkit.results import Result
from stabkit.statistics import jackknife_reach

AIC_MARGIN = 10.0  # by which one law must beat the other
FEWEST = 4  # points of depth that a law is fitted to


@dataclass(frozen=True)
class Rate(Result):
    """Growth of the squared gradient over depth, fitted to a measured profile.

    Attributes:
        start: the first state of the fit.
        stop: the last.
        chi: growth of the squared gradient per step towards the input, exp of the slope over depth.
        interval: 95 % interval of chi, by leaving out one network, or one sample and probe, at a time.
        covers: what the interval covers, in words.
        depth_scale: steps over which the squared gradient changes by a factor e, 1 / |log chi|.
        exponent: p of E ||g_l||^2 ~ (L / l)^p, minus the slope over the log of depth.
        law: ``"exponential"``, ``"power"`` or ``"undecided"``: the one whose AIC is lower by at least 10.
        aic_difference: AIC of the power law minus that of the exponential.
    """

    start: int
    stop: int
    chi: float
    interval: tuple[float, float]
    covers: str
    depth_scale: float
    exponent: float
    law: str
    aic_difference: float


def fit_rate(squares: Array, start: int) -> Rate:
    """Fit both laws to squared gradient norms over depth.

    Args:
        squares: ``(networks, states, draws)``, squared gradient norms at consecutive states of one size, positive.
        start: index of the first of these states in the flow.

    Raises:
        ArgumentError: there are fewer than 4 states.
    """
    networks, states, _ = squares.shape
    if states < FEWEST:
        raise ArgumentError(f"squares has {states} states; expected at least {FEWEST}")
    depth = np.arange(1, states + 1, dtype=float)
    profile = np.log(squares.mean(axis=(0, 2)))
    slope, exponential = _line(depth, profile)
    power_slope, power = _line(np.log(depth), profile)
    difference = power - exponential
    # one network or, where there is only one, one draw left out at a time
    units = squares if networks > 1 else squares[0].T[:, :, None]
    rest = [np.log(np.delete(units, unit, axis=0).mean(axis=(0, 2))) for unit in range(len(units)) if len(units) > 1]
    reach = jackknife_reach(np.array([_line(depth, logs)[0] for logs in rest]))
    low, high = math.exp(-slope - reach), math.exp(-slope + reach)
    chi = math.exp(-slope)
    settled = abs(difference) >= AIC_MARGIN
    return Rate(
        start=start,
        stop=start + states - 1,
        chi=chi,
        interval=(low, high),
        covers=f"{networks} networks, their samples and probes"
        if networks > 1
        else "samples and probes of one network",
        depth_scale=depth_scale(min(chi, 1 / chi)),
        exponent=-power_slope,
        law="undecided" if not settled else "exponential" if difference > 0 else "power",
        aic_difference=difference,
    )


def _line(x: Array, y: Array) -> tuple[float, float]:
    """Slope of a least-squares line and its AIC."""
    slope, intercept = np.polyfit(x, y, 1)
    rest = float(np.mean((y - slope * x - intercept) ** 2))
    floor = (1e-12 * max(1.0, float(np.abs(y).max()))) ** 2  # an exact line has no meaningful likelihood
    return float(slope), len(x) * math.log(max(rest, floor)) + 2 * 3
