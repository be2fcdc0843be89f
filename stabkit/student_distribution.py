"""Student's distribution, in plain Python: to load ``scipy.special`` for it would delay every verdict by a second."""

from __future__ import annotations

import math
import sys
from functools import lru_cache

_EPSILON = sys.float_info.epsilon
_TERMS = 100_000  # of a continued fraction; about the root of the degrees of freedom are needed
_ROUNDS = 200  # of Newton's method; at infinite variance every one doubles the quantile at first
_ASYMPTOTIC = 40.0  # from which the ratio of two gamma functions is told by its series to the last digit


def upper_tail(t: float, degrees: int) -> float:
    """The probability that Student's variable with some degrees of freedom is larger than ``t``.

    Source: Abramowitz and Stegun (1964), 26.7.1 with 26.5.8.

    Example:
        >>> upper_tail(0.0, 3), round(upper_tail(1.0, 1), 12)
        (0.5, 0.25)
    """
    if math.isnan(t) or t < 0:
        return 1.0 - upper_tail(-t, degrees) if t < 0 else math.nan
    if math.isinf(t):
        return 0.0
    return 0.5 * _incomplete_beta(degrees, t)


@lru_cache(maxsize=1024)
def quantile(tail: float, degrees: int) -> float:
    """The ``t`` that Student's variable exceeds with probability ``tail``, at most one half.

    By Newton's method from zero, which cannot overshoot: the tail is convex there.

    Example:
        >>> round(quantile(0.025, 4), 3)
        2.776
    """
    t = 0.0
    for _ in range(_ROUNDS):
        change = (upper_tail(t, degrees) - tail) / _density(t, degrees)
        t += change
        if abs(change) <= 2 * _EPSILON * t:
            break
    return t


def _density(t: float, degrees: int) -> float:
    power = -0.5 * (degrees + 1) * math.log1p(t * t / degrees)
    return math.exp(_log_gamma_ratio(0.5 * degrees) + power) / math.sqrt(math.pi * degrees)


def _incomplete_beta(degrees: int, t: float) -> float:
    """I_x(degrees / 2, 1 / 2) at x = degrees / (degrees + t^2): both tails."""
    a, b, square = 0.5 * degrees, 0.5, t * t
    x, y = degrees / (degrees + square), square / (degrees + square)
    # log of x^a y^b / B(a, b)
    front = -a * math.log1p(square / degrees) + (b * math.log(y) if y else -math.inf)
    front = math.exp(front + _log_gamma_ratio(a)) / math.sqrt(math.pi)
    if x < (a + 1) / (a + b + 2):
        return front * _fraction(a, b, x) / a
    return 1.0 - front * _fraction(b, a, y) / b


def _log_gamma_ratio(a: float) -> float:
    """Log of gamma(a + 1/2) / gamma(a)."""
    if a < _ASYMPTOTIC:
        return math.lgamma(a + 0.5) - math.lgamma(a)
    return 0.5 * math.log(a) - 1 / (8 * a) + 1 / (192 * a**3) - 1 / (640 * a**5) + 17 / (14336 * a**7)


def _fraction(a: float, b: float, x: float) -> float:
    """The continued fraction of the incomplete beta function, by Lentz's method."""
    tiny = sys.float_info.min
    c, d = 1.0, 1.0 / (1.0 - (a + b) * x / (a + 1.0) or tiny)
    value = d
    for m in range(1, _TERMS):
        for factor in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1.0 / (1.0 + factor * d or tiny)
            c = 1.0 + factor / c or tiny
            value *= d * c
        if abs(d * c - 1.0) <= _EPSILON:
            break
    return value
