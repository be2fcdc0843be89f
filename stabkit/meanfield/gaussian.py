"""Expectations over Gaussian variables by adaptive Gauss-Kronrod quadrature, each with its error estimate.

Gauss-Hermite rules are not used: at a variance of 10 and more, 160 nodes still miss the part where tanh' is not zero
(E sech^4 comes out too small, and with it every gradient).
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stabkit.results import Result

Array = NDArray[np.float64]
Function = Callable[[Array], Array]

REACH = 12.0  # standard deviations; beyond them lies 4e-33 of the weight
_TOLERANCE = 1e-12
_MAX_PANELS = 4000


@dataclass(frozen=True)
class Expectation(Result):
    """A number with an estimate of its error and the way in which it was found.

    Attributes:
        value: the number.
        error: estimate of its absolute error; rounding for a closed form.
        method: ``"closed form"`` or ``"quadrature"``.

    Example:
        >>> from stabkit import meanfield
        >>> found = meanfield.variance_map("relu", 3.0, sigma_w=1.0)
        >>> float(found), found.method
        (1.5, 'closed form')
    """

    value: float
    error: float
    method: str

    def __float__(self) -> float:
        return self.value

    def scaled(self, factor: float, shift: float = 0.0) -> Expectation:
        """``factor`` times this number plus ``shift``."""
        return Expectation(factor * self.value + shift, abs(factor) * self.error, self.method)


def exactly(value: float) -> Expectation:
    """The value of a closed form: its error is rounding."""
    return Expectation(value, 8 * float(np.finfo(float).eps) * abs(value), "closed form")


@functools.cache
def _kronrod() -> tuple[Array, Array, Array]:
    """Nodes on [-1, 1], Kronrod weights and Gauss weights of the 10-21 point pair (Piessens et al., QUADPACK, 1983)."""
    half = np.array(
        [
            0.995657163025808080735527280689003,
            0.973906528517171720077964012084452,
            0.930157491355708226001207180059508,
            0.865063366688984510732096688423493,
            0.780817726586416897063717578345042,
            0.679409568299024406234327365114874,
            0.562757134668604683339000099272694,
            0.433395394129247190799265943165784,
            0.294392862701460198131126603103866,
            0.14887433898163121088482600112972,
            0.0,
        ]
    )
    kronrod = np.array(
        [
            0.011694638867371874278064396062192,
            0.03255816230796472747881897245939,
            0.05475589657435199603138130024458,
            0.07503967481091995276704314091619,
            0.093125454583697605535065465083366,
            0.109387158802297641899210590325805,
            0.123491976262065851077958109585166,
            0.134709217311473325928054001771707,
            0.142775938577060080797094273138717,
            0.147739104901338491374841515972068,
            0.149445554002916905664936468389821,
        ]
    )
    gauss = np.zeros(11)
    gauss[1::2] = [
        0.066671344308688137593568809893332,
        0.149451349150580593145863396957658,
        0.219086362515982043995534934228163,
        0.269266719309996355091226921569469,
        0.295524224714752870173815619188769,
    ]
    mirrored = [np.concatenate([sign * part, part[-2::-1]]) for sign, part in ((-1, half), (1, kronrod), (1, gauss))]
    mirrored[0][11:] = half[-2::-1]
    return mirrored[0], mirrored[1], mirrored[2]


def integrate(
    f: Function, edges: Sequence[float] | Array, tolerance: float = _TOLERANCE, *, scale: float | None = None
) -> tuple[Array, Array]:
    """Integral of a function over an interval, by bisection of the panels with the largest errors.

    Args:
        f: takes nodes ``(m,)`` and returns ``(..., m)``.
        edges: ends of the interval, with the points between them where ``f`` is not smooth.
        tolerance: the tolerance of the error, relative to the integral of the absolute value, or absolute where that is
            below 1e-30.
        scale: what the tolerance is relative to instead.

    Returns:
        The integrals and the estimates of their errors, both of shape ``(...)``.
    """
    nodes, kronrod, gauss = _kronrod()
    ends = np.unique(np.asarray(edges, dtype=float))
    low, high = ends[:-1], ends[1:]
    done: Array | float = 0.0
    spent: Array | float = 0.0
    weight: Array | float = 0.0
    panels = 0
    while True:
        half, middle = (high - low) / 2, (high + low) / 2
        x = middle[:, None] + half[:, None] * nodes
        flat = f(x.reshape(-1))
        values = flat.reshape(*flat.shape[:-1], *x.shape)
        integral = (values @ kronrod) * half
        error = np.abs((values @ (kronrod - gauss)) * half)
        absolute = (np.abs(values) @ kronrod) * half
        # the difference of the two rules is the error of the poorer one (QUADPACK's rescaling, for smooth panels)
        with np.errstate(divide="ignore", invalid="ignore"):
            error = np.where(absolute > 0, absolute * np.minimum(1, (200 * error / absolute) ** 1.5), 0.0)
        rounding = 50 * float(np.finfo(float).eps) * absolute
        size = weight + absolute.sum(-1) if scale is None else np.full(absolute.shape[:-1], scale)
        allowed = tolerance * np.maximum(size, 1e-30)[..., None] / (len(ends) - 1)
        bad = (error > np.maximum(allowed, rounding)).reshape(-1, len(low)).any(0)
        panels += len(low)
        if panels > _MAX_PANELS:
            bad[:] = False
        done = done + integral[..., ~bad].sum(-1)
        spent = spent + np.maximum(error, rounding / 50)[..., ~bad].sum(-1)
        weight = weight + absolute[..., ~bad].sum(-1)
        if not bad.any():
            return np.asarray(done), np.asarray(spent)
        low, high = np.concatenate([low[bad], middle[bad]]), np.concatenate([middle[bad], high[bad]])


def density(z: Array) -> Array:
    """The standard normal density."""
    return np.exp(-z * z / 2) / math.sqrt(2 * math.pi)


def mean(f: Function, q: float | Array, kinks: Sequence[float] = ()) -> tuple[Array, Array]:
    """``E f(h)`` for h ~ N(0, q), with an error estimate, for every q.

    Args:
        f: takes and returns arrays of any shape, element by element.
        q: variances ``(...)``, not negative.
        kinks: points h where f is not smooth. With several q they are found by bisection unless they are at 0.

    Returns:
        Values and error estimates of the shape of ``q``.
    """
    q = np.asarray(q, dtype=float)
    sd = np.sqrt(q)
    widest = float(sd.max(initial=0.0))
    positive = sd[sd > 0]
    # the function lives on scales of h about 1, the density on scales of sd
    marks = [0.0, *(m / s for m in (-8, -2, -0.5, 0.5, 2, 8) for s in {widest} if s > 1)]
    marks += [k / s for k in kinks for s in (np.unique(positive) if positive.size <= 4 else ())]
    marks += [-5.0, -2.0, 2.0, 5.0]
    edges = [-REACH, *(m for m in marks if abs(m) < REACH), REACH]
    return integrate(lambda z: f(sd[..., None] * z) * density(z), edges)


def pair_mean(f: Function, q: tuple[float, float], c: float, kinks: Sequence[float] = ()) -> tuple[float, float]:
    """``E f(h_1) f(h_2)`` for zero-mean Gaussians of variances q and correlation c, with an error estimate.

    The inner integral, over h_2 given h_1, is split at every kink of f; the outer one where the inner changes fastest.

    Args:
        f: takes and returns arrays, element by element.
        q: the two variances.
        c: the correlation, from -1 to 1.
        kinks: points where f is not smooth.
    """
    first, second = math.sqrt(q[0]), math.sqrt(q[1])
    s = math.sqrt(max(0.0, 1.0 - c * c))
    features = [0.0, *kinks]
    marks = [h / first for h in (*features, *kinks) if first > 0]
    if second > 0 and abs(c) > 1e-3:
        # the inner mean follows f(second * c * z), smoothed over z by s / c
        marks += [h / (second * c) + m * s / abs(c) for h in features for m in (-6, -2, 0, 2, 6)]
    marks += [m / first for m in (-8, -2, 2, 8) if first > 1]
    edges = [-REACH, *(m for m in marks if abs(m) < REACH), -3.0, 3.0, REACH]

    scale = math.sqrt(math.prod(float(mean(lambda h: f(h) ** 2, variance, kinks)[0]) for variance in q))

    def outer(z: Array) -> Array:
        return np.stack(_inner(f, f(first * z) * density(z), second, c, s, z, features, scale))

    parts, errors = integrate(outer, edges, 1e-11, scale=scale)
    return float(parts[0]), float(errors[0] + parts[1])


def _inner(
    f: Function, weight: Array, sd: float, c: float, s: float, z: Array, features: Sequence[float], scale: float
) -> tuple[Array, Array]:
    """``weight * E f(sd (c z + s y))`` over y ~ N(0, 1) for every z, split where the argument passes a feature of f."""
    center = sd * c * z
    if s * sd < 1e-12:
        value = weight * f(center)
        return value, np.zeros_like(value)
    splits = [np.clip((h - center) / (sd * s), -REACH, REACH) for h in sorted(set(features))]
    ends = [np.full_like(z, -REACH), *splits, np.full_like(z, REACH)]
    total, spent = np.zeros_like(z), np.zeros_like(z)
    for low, high in itertools.pairwise(ends):
        width = (high - low)[:, None]

        def piece(t: Array, low: Array = low, width: Array = width) -> Array:
            y = low[:, None] + width * t
            return weight[:, None] * f(center[:, None] + sd * s * y) * density(y) * width

        value, error = integrate(piece, [0.0, 0.1, 0.3, 0.7, 0.9, 1.0], 1e-12, scale=scale)
        total, spent = total + value, spent + error
    return total, spent
