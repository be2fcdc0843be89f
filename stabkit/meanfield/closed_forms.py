"""Gaussian moments of activations that are known in closed form.

Sources: Cho and Saul, NeurIPS 2009 (ReLU); Williams, Neural Computation 1998 (erf); the GELU by Stein's lemma. Each is
checked against quadrature in the tests.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

Moment = Callable[[float], float]  # of q
PairMoment = Callable[[float, float, float], float]  # of q_1, q_2 and the correlation c


@dataclass(frozen=True)
class ClosedForms:
    """Moments over h ~ N(0, q), or over pairs of variances q_1, q_2 and correlation c; None where none is known.

    Attributes:
        square: E phi(h)^2.
        slope_square: E phi'(h)^2.
        slope_fourth: E phi'(h)^4.
        product: E phi(h_1) phi(h_2).
        slope_product: E phi'(h_1) phi'(h_2).
        chi_parallel: the derivative of E phi(h)^2 with respect to q.
    """

    square: Moment | None = None
    slope_square: Moment | None = None
    slope_fourth: Moment | None = None
    product: PairMoment | None = None
    slope_product: PairMoment | None = None
    chi_parallel: Moment | None = None


def leaky(a: float) -> ClosedForms:
    """max(h, 0) + a min(h, 0) = (1 + a)/2 h + (1 - a)/2 |h|."""
    even, odd = (1 - a) ** 2 / 4, (1 + a) ** 2 / 4

    def product(first: float, second: float, c: float) -> float:
        absolute = 2 / math.pi * (math.sqrt(max(0.0, 1 - c * c)) + c * math.asin(c))
        return math.sqrt(first * second) * (odd * c + even * absolute)

    half = (1 + a * a) / 2
    return ClosedForms(
        square=lambda q: half * q,
        slope_square=lambda q: half,
        slope_fourth=lambda q: (1 + a**4) / 2,
        product=product,
        slope_product=lambda first, second, c: odd + even * 2 / math.pi * math.asin(c),
        chi_parallel=lambda q: half,
    )


def _erf_slopes(first: float, second: float, c: float) -> float:
    return 4 / math.pi / math.sqrt((1 + 2 * first) * (1 + 2 * second) - 4 * first * second * c * c)


def _erf_product(first: float, second: float, c: float) -> float:
    return 2 / math.pi * math.asin(2 * math.sqrt(first * second) * c / math.sqrt((1 + 2 * first) * (1 + 2 * second)))


def _gelu_square(q: float) -> float:
    tail = q * q / (math.pi * (1 + q) * math.sqrt(1 + 2 * q))
    return q / 4 + q / (2 * math.pi) * math.asin(q / (1 + q)) + tail


def _gelu_slope(q: float) -> float:
    tail = q * (3 + 5 * q) / (2 * math.pi * (1 + q) * math.sqrt(1 + 2 * q) ** 3)
    return 0.25 + math.asin(q / (1 + q)) / (2 * math.pi) + tail


UNKNOWN = ClosedForms()
LINEAR = leaky(1.0)
ERF = ClosedForms(
    square=lambda q: _erf_product(q, q, 1.0),
    slope_square=lambda q: _erf_slopes(q, q, 1.0),
    slope_fourth=lambda q: 16 / math.pi**2 / math.sqrt(1 + 8 * q),
    product=_erf_product,
    slope_product=_erf_slopes,
    chi_parallel=lambda q: 4 / math.pi / ((1 + 2 * q) * math.sqrt(1 + 4 * q)),
)
GELU = ClosedForms(square=_gelu_square, slope_square=_gelu_slope)
SIN = ClosedForms(
    square=lambda q: -math.expm1(-2 * q) / 2,
    slope_square=lambda q: (1 + math.exp(-2 * q)) / 2,
    slope_fourth=lambda q: (3 + 4 * math.exp(-2 * q) + math.exp(-8 * q)) / 8,
    product=lambda first, second, c: math.exp(-(first + second) / 2) * math.sinh(math.sqrt(first * second) * c),
    slope_product=lambda first, second, c: math.exp(-(first + second) / 2) * math.cosh(math.sqrt(first * second) * c),
    chi_parallel=lambda q: math.exp(-2 * q),
)
