"""Fixed points, depth scales and the edge of chaos of random networks.

Poole et al., NeurIPS 2016; Schoenholz et al., ICLR 2017; Hayou et al., "On the impact of the activation function on
deep neural networks training", ICML 2019.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from stabkit.arguments import accepts
from stabkit.errors import ArgumentError
from stabkit.meanfield.activations import Activation, activation
from stabkit.meanfield.maps import (
    Phi,
    check,
    chi_1,
    chi_c,
    chi_parallel,
    correlation_map,
    second_moment,
    slope_moment,
    variance_map,
)
from stabkit.results import Result

SMALLEST, LARGEST = 1e-12, 1e10  # variances that are searched
_RATIO = 1.3  # between neighbours of the search
_AT_REST = 1e-13  # relative change of a variance that already is a fixed point


@dataclass(frozen=True)
class FixedPoint(Result):
    """Where variance and correlation of a deep random network settle, and how fast.

    Attributes:
        activation: its name.
        sigma_w: standard deviation of the weights times the root of their fan-in.
        sigma_b: standard deviation of the biases.
        q: the variance q* reached from ``q_start``; 0 or inf where it dies out or grows without end.
        c: the correlation c* that two different inputs approach.
        chi_1: growth of the squared gradient per layer at q*.
        chi_parallel: slope of the variance map at q*.
        chi_c: slope of the correlation map at c*.
        xi_q: depth scale of the variance in layers, -1 / log chi_parallel; inf where it does not settle.
        xi_c: depth scale of the correlation in layers, -1 / log chi_c. A network deeper than about 6 xi_c does not
            train (Schoenholz et al., ICLR 2017).
        phase: ``"ordered"`` (chi_1 < 1, gradients vanish), ``"critical"`` or ``"chaotic"`` (gradients explode).
        residual: relative change of q* and change of c* under their maps; NaN for a q* of 0 or inf.
        error: estimate of the error of chi_1 from quadrature.
    """

    activation: str
    sigma_w: float
    sigma_b: float
    q: float
    c: float
    chi_1: float
    chi_parallel: float
    chi_c: float
    xi_q: float
    xi_c: float
    phase: str
    residual: float
    error: float

    @property
    def exponent(self) -> float:
        """Growth of a perturbation or gradient, in nats per layer: log(chi_1) / 2."""
        return 0.5 * math.log(self.chi_1) if self.chi_1 > 0 else -math.inf


@dataclass(frozen=True)
class CriticalPoint(Result):
    """A point of the edge of chaos, chi_1 = 1 at a fixed point of the variance.

    Attributes:
        sigma_w: standard deviation of the weights times the root of their fan-in.
        sigma_b: standard deviation of the biases.
        q: the variance there.
        chi_parallel: slope of the variance map; the variance comes back to q only where it is at most 1.
        error: estimate of the error of sigma_w.
    """

    sigma_w: float
    sigma_b: float
    q: float
    chi_parallel: float
    error: float


@accepts
def fixed_point(phi: Phi, *, sigma_w: float, sigma_b: float = 0.0, q_start: float = 1.0) -> FixedPoint:
    """The fixed point that a deep random network approaches, with its depth scales and its phase.

    Args:
        phi: an activation (see `activation`).
        sigma_w: weights have the variance sigma_w^2 / fan-in.
        sigma_b: biases have the variance sigma_b^2.
        q_start: variance of the first pre-activations; decides which fixed point is reached where there are several.

    Raises:
        ArgumentError: an argument is out of its range.

    Example:
        >>> found = fixed_point("tanh", sigma_w=1.3**0.5, sigma_b=0.05**0.5)
        >>> found.phase, round(found.chi_1, 4), round(found.xi_c, 2)
        ('ordered', 0.8802, 7.83)
    """
    check(sigma_w=sigma_w, sigma_b=sigma_b, q_start=q_start)
    function = activation(phi)
    q, where = _settled_variance(function, sigma_w, sigma_b, q_start)
    gradient = chi_1(function, where, sigma_w=sigma_w)
    parallel = chi_parallel(function, where, sigma_w=sigma_w).value
    near = max(1e-9, 4 * gradient.error)
    phase = "critical" if abs(gradient.value - 1) <= near else "ordered" if gradient.value < 1 else "chaotic"
    c = _settled_correlation(function, where, sigma_w, sigma_b) if phase == "chaotic" else 1.0
    slope = gradient.value if c == 1.0 else chi_c(function, c, where, sigma_w=sigma_w).value
    residual = math.nan
    if 0 < q < math.inf:
        moved = variance_map(function, q, sigma_w=sigma_w, sigma_b=sigma_b).value
        turned = correlation_map(function, c, q, sigma_w=sigma_w, sigma_b=sigma_b).value
        residual = max(abs(moved / q - 1), abs(turned - c))
    return FixedPoint(
        activation=function.name,
        sigma_w=sigma_w,
        sigma_b=sigma_b,
        q=q,
        c=c,
        chi_1=gradient.value,
        chi_parallel=parallel,
        chi_c=slope,
        xi_q=depth_scale(parallel),
        xi_c=math.inf if phase == "critical" else depth_scale(slope),
        phase=phase,
        residual=residual,
        error=gradient.error,
    )


@accepts
def depth_scale(chi: float) -> float:
    """Layers over which a deviation shrinks to 1/e of itself, -1 / log chi; inf where it does not shrink.

    Example:
        >>> round(depth_scale(0.5), 4), depth_scale(1.2)
        (1.4427, inf)
    """
    if chi <= 0:
        return 0.0
    return -1 / math.log(chi) if chi < 1 - 1e-10 else math.inf


@accepts
def critical_points(
    phi: Phi, *, sigma_w: float | None = None, sigma_b: float | None = None
) -> tuple[CriticalPoint, ...]:
    """All points of the edge of chaos with the given sigma_w or the given sigma_b, by growing variance.

    Along the edge, sigma_w^2 = 1 / E phi'(h)^2 and sigma_b^2 = q - sigma_w^2 E phi(h)^2: one equation for q.

    Args:
        phi: an activation.
        sigma_w: standard deviation of the weights, to find that of the biases.
        sigma_b: standard deviation of the biases, to find that of the weights. Give one of the two.

    Raises:
        ArgumentError: both or none were given, or one is out of its range.

    Example:
        >>> [round(point.sigma_w**2, 4) for point in critical_points("tanh", sigma_b=0.05**0.5)]
        [1.761]
    """
    if (sigma_w is None) == (sigma_b is None):
        raise ArgumentError(f"sigma_w={sigma_w}, sigma_b={sigma_b}; expected exactly one of the two")
    check(**{name: value for name, value in (("sigma_w", sigma_w), ("sigma_b", sigma_b)) if value is not None})
    function = activation(phi)

    def on_edge(q: float) -> tuple[float, float]:
        weight = 1 / slope_moment(function, q).value
        return weight, q - weight * second_moment(function, q).value

    def off(q: float) -> float:
        weight, bias = on_edge(q)
        return (weight - sigma_w**2) / sigma_w**2 if sigma_w is not None else (bias - (sigma_b or 0.0) ** 2) / q

    grid = np.geomspace(SMALLEST, 1e6, 140)
    values = np.array([off(float(q)) for q in grid])
    zero = np.abs(values) <= 1e-10  # at vanishing variance, or everywhere for a ReLU
    found = [float(grid[0])] if zero[0] and (sigma_w is None or abs(on_edge(SMALLEST)[1]) <= 1e-9) else []
    changes = np.flatnonzero((values[:-1] * values[1:] < 0) & ~zero[:-1] & ~zero[1:])
    found.extend(_root(off, float(grid[i]), float(grid[i + 1])) for i in changes)
    points = [_critical_point(function, q, on_edge(q)) for q in found]
    return tuple(p for p in points if p is not None)


@accepts
def critical_sigma_w(phi: Phi, sigma_b: float = 0.0) -> float:
    """The sigma_w at which a network with biases of that deviation neither shrinks nor grows gradients.

    Where the edge has several such points, that of the smallest variance to which the network returns.

    A lesson with a picture: ``examples/trainability_map.py``.

    Raises:
        ArgumentError: there is none, or sigma_b is out of its range.

    Example:
        >>> round(critical_sigma_w("tanh", 0.1), 9), round(critical_sigma_w("relu") ** 2, 9)
        (1.193400725, 2.0)
    """
    points = critical_points(phi, sigma_b=sigma_b)
    for point in points:
        if point.chi_parallel <= 1 + 1e-6:
            return point.sigma_w
    raise ArgumentError(
        f"no edge of chaos with a stable variance at sigma_b={sigma_b} for variances of {SMALLEST:g} to 1e6 "
        f"({len(points)} without); look at critical_points, or at fixed_point over a range"
    )


def _critical_point(function: Activation, q: float, edge: tuple[float, float]) -> CriticalPoint | None:
    weight, bias = edge
    if bias < -1e-9 * max(1.0, q):
        return None  # it would take biases of negative variance
    sigma_w = math.sqrt(weight)
    slope = slope_moment(function, q)
    parallel = chi_parallel(function, q, sigma_w=sigma_w).value
    q_error = 1e-13 * q
    shift = abs(slope_moment(function, q * (1 + 1e-4)).value - slope.value) / (1e-4 * q) * q_error
    return CriticalPoint(
        sigma_w=sigma_w,
        sigma_b=math.sqrt(max(bias, 0.0)),
        q=0.0 if q <= SMALLEST else q,
        chi_parallel=parallel,
        error=0.5 * sigma_w * (slope.error + shift) / slope.value,
    )


def _settled_variance(function: Activation, sigma_w: float, sigma_b: float, start: float) -> tuple[float, float]:
    """q* and a positive, finite variance at which to evaluate the slopes there."""

    def gain(q: float) -> float:
        return variance_map(function, q, sigma_w=sigma_w, sigma_b=sigma_b).value / q - 1

    here = max(start, SMALLEST)
    first = gain(here)
    if abs(first) <= _AT_REST:
        return here, here
    ratio = _RATIO if first > 0 else 1 / _RATIO
    while SMALLEST <= here * ratio <= LARGEST:
        there = here * ratio
        if gain(there) * first <= 0:
            root = _root(gain, min(here, there), max(here, there))
            return root, root
        here = there
    return (math.inf, LARGEST) if first > 0 else (0.0, SMALLEST)


def _settled_correlation(function: Activation, q: float, sigma_w: float, sigma_b: float) -> float:
    """The stable c* of the chaotic phase; on [0, 1] the map is convex and 1 is its other fixed point."""

    def gain(c: float) -> float:
        return correlation_map(function, c, q, sigma_w=sigma_w, sigma_b=sigma_b).value - c

    if gain(0.0) <= 1e-14:
        return 0.0
    for gap in (1e-2, 1e-4, 1e-6, 1e-8):
        if gain(1 - gap) < 0:
            return _root(gain, 0.0, 1 - gap)
    return 1.0


def _root(f: Callable[[float], float], low: float, high: float) -> float:
    from scipy.optimize import brentq

    return float(brentq(f, low, high, xtol=1e-300 if low > 0 else 1e-14, rtol=1e-13, maxiter=200))
