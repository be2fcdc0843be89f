"""How far along an axis, or in which wedge, a method stays stable: decided by exact arithmetic.

On an axis the modulus condition is a polynomial inequality. A curve that touches the unit circle without crossing it
is a root of even order, which has no sign change and so does not end the interval; a sampled root finder steps over
such roots or stops at them. Sources: E. Hairer and G. Wanner, Solving Ordinary Differential Equations II, 2nd ed. 1996,
IV.2 to IV.3 (one-step) and V.1 to V.2 (multistep, A(alpha)); I. Schur, J. reine angew. Math. 147 (1917) and 148 (1918).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import numpy as np

from stabkit.integrators import rational_polynomials as poly
from stabkit.integrators.characteristic import Characteristic
from stabkit.integrators.rational_matrices import Gaussian, gaussian_determinant, hermitian_pivots

if TYPE_CHECKING:
    from typing_extensions import Self

Axis = Literal["real", "imaginary"]

#: The tolerance on the spectral radius at which the second value of an interval is computed.
TOLERANCE = 1e-12

# Where roots lie on the unit circle identically (conservative methods), the circle is widened by this much instead.
_CONSERVATIVE = Fraction(1, 10**200)
_NEGLIGIBLE = 1e-20
_SAMPLES = 4096  # points of the locus from which the least angle is refined


class AxisInterval(float):
    """The length b of a stability interval, [-b, 0] or i[-b, b]: a float with its other readings.

    The float itself is the limit of the intended method: coefficients that are simple rationals up to rounding are
    taken as such, and terms that only rounding produced are dropped. It equals ``strict`` for an exact tableau.

    Attributes:
        strict: the limit with the coefficients exactly as they are stored and no tolerance.
        within: the limit with spectral radius at most ``1 + tolerance``.
        tolerance: the tolerance of ``within``.
        axis: ``"real"`` or ``"imaginary"``.

    Example:
        >>> rk4 = Characteristic((tuple(Fraction(-1, d) for d in (1, 1, 2, 6, 24)), (Fraction(1),)))
        >>> AxisInterval(rk4, "real", precision=0.0)
        2.785293563405282
    """

    axis: Axis
    tolerance: float
    _polynomial: Characteristic
    _precision: float

    def __new__(cls, p: Characteristic, axis: Axis, *, precision: float) -> Self:  # noqa: D102
        self = super().__new__(cls, axis_limit(p, axis, precision=precision))
        self.axis, self.tolerance, self._polynomial, self._precision = axis, TOLERANCE, p, precision
        return self

    def __getnewargs_ex__(self) -> tuple[tuple[Characteristic, Axis], dict[str, float]]:
        return (self._polynomial, self.axis), {"precision": self._precision}

    @cached_property
    def strict(self) -> float:
        """The limit with the coefficients exactly as they are stored."""
        return float(self) if self._precision == 0 else axis_limit(self._polynomial, self.axis)

    @cached_property
    def within(self) -> float:
        """The limit at ``tolerance`` on the spectral radius."""
        return self.at(self.tolerance)

    def at(self, tolerance: float) -> float:
        """The limit with spectral radius at most ``1 + tolerance``; 0 gives ``strict``."""
        if tolerance == 0:
            return self.strict
        return axis_limit(self._polynomial, self.axis, tolerance=Fraction(repr(float(tolerance))))


def axis_limit(p: Characteristic, axis: Axis, *, tolerance: Fraction = Fraction(0), precision: float = 0.0) -> float:
    """The largest b with spectral radius at most 1 + tolerance on [-b, 0] or on i[-b, b]; ``inf`` where true.

    Args:
        p: the characteristic polynomial.
        axis: which axis.
        tolerance: how far the spectral radius may exceed 1.
        precision: the relative accuracy of the coefficients. Terms of the inequality that it explains are dropped
            (one state), or coefficients that it explains are read as simple rationals (several states).
    """
    if p.states == 1:
        t = first_sign_change(modulus_margin(p, axis, tolerance, precision))
        return t if axis == "real" else math.sqrt(t)
    return _multivalue_limit(p.recognised() if precision else p, axis, tolerance)


def modulus_margin(
    p: Characteristic, axis: Axis, tolerance: Fraction = Fraction(0), precision: float = 0.0
) -> poly.Polynomial:
    """(1 + tolerance)^2 |D|^2 - |N|^2 on an axis: in t at z = -t, or in t = y^2 at z = i y.

    Stable where it is not negative; identically zero where |R| = 1 all along.
    """
    square = _squared_modulus_real if axis == "real" else _squared_modulus_imaginary
    outer = poly.scale(square(p.denominator), (1 + tolerance) ** 2)
    inner = square(p.numerator)
    margin = poly.add(outer, poly.scale(inner, Fraction(-1)))
    if precision == 0:
        return margin
    # The sizes of the terms that cancel in each coefficient.
    sizes = poly.add(square(p.denominator, absolute=True), square(p.numerator, absolute=True))
    return poly.trimmed([Fraction(0) if abs(c) <= precision * s else c for c, s in zip(margin, sizes, strict=False)])


def _squared_modulus_real(p: Sequence[Fraction], absolute: bool = False) -> poly.Polynomial:
    mirrored = [abs(c) if absolute else c * (-1) ** k for k, c in enumerate(p)]
    return poly.multiply(mirrored, mirrored)


def _squared_modulus_imaginary(p: Sequence[Fraction], absolute: bool = False) -> poly.Polynomial:
    signed = [abs(c) if absolute else c * (-1) ** (k // 2) for k, c in enumerate(p)]
    even, odd = signed[::2], signed[1::2]
    return poly.add(poly.multiply(even, even), [Fraction(0), *poly.multiply(odd, odd)])


def first_sign_change(margin: Sequence[Fraction]) -> float:
    """The smallest t >= 0 after which a polynomial is negative; ``inf`` when there is none."""
    sign = poly.sign_near_zero(margin)
    if sign <= 0:
        return 0.0 if sign < 0 else math.inf
    root = poly.PositiveRoots(poly.odd_part(margin)).first()
    return math.inf if root is None else float(root)


def schur_cohn_matrix(
    p: Characteristic, re: Fraction, im: Fraction = Fraction(0), tolerance: Fraction = Fraction(0)
) -> tuple[list[list[Gaussian]], int]:
    """The Schur-Cohn matrix of p(., re + i im), Hermitian, and the integer that the coefficients were scaled with.

    It is positive definite if and only if every root has modulus below 1 + tolerance, and singular if and only if
    two roots (or one root with itself) satisfy zeta_i conj(zeta_j) = (1 + tolerance)^2.
    """
    n = p.states
    a = [(x * (1 + tolerance) ** k, y * (1 + tolerance) ** k) for k, (x, y) in enumerate(p.at(re, im))]
    scale = math.lcm(*(c.denominator for pair in a for c in pair))
    g = [(int(x * scale), int(y * scale)) for x, y in a]

    def entry(i: int, j: int) -> Gaussian:
        X = Y = 0
        for k in range(min(i, j) + 1):
            (b, c), (d, e) = g[n - i + k], g[n - j + k]
            (f, h), (u, v) = g[i - k], g[j - k]
            X += b * d + c * e - f * u - h * v
            Y += c * d - b * e + h * u - f * v
        return X, Y

    upper = [[entry(i, j) if j >= i else (0, 0) for j in range(n)] for i in range(n)]
    H = [[upper[i][j] if j >= i else (upper[j][i][0], -upper[j][i][1]) for j in range(n)] for i in range(n)]
    return H, scale


def is_inside_disc(
    p: Characteristic, re: Fraction, im: Fraction = Fraction(0), tolerance: Fraction = Fraction(0)
) -> bool:
    """Whether every eigenvalue of M(re + i im) has modulus strictly below 1 + tolerance, decided exactly."""
    minors = hermitian_pivots(schur_cohn_matrix(p, re, im, tolerance)[0])
    return all(minor > 0 for minor in minors)


def _multivalue_limit(p: Characteristic, axis: Axis, tolerance: Fraction) -> float:
    """The first t at which a root leaves the unit disc, among the roots of the Schur-Cohn determinant in t."""
    # On the imaginary axis the determinant is even in y, so it is interpolated as a polynomial in y^2.
    degree = p.degree * p.states * (2 if axis == "real" else 1)
    nodes = [Fraction(k) for k in range(degree + 1)]
    values = []
    for t in nodes:
        H, scale = schur_cohn_matrix(p, *_axis_point(axis, t), tolerance)
        values.append(Fraction(gaussian_determinant(H)[0], scale ** (2 * p.states)))
    margin = poly.interpolate(nodes if axis == "real" else [t * t for t in nodes], values)
    if not margin:
        limit = _multivalue_limit(p, axis, _CONSERVATIVE) if tolerance == 0 else 0.0
        return 0.0 if limit < _NEGLIGIBLE else limit
    roots = poly.PositiveRoots(poly.square_free(margin)).all()
    start = 0.0
    for end in [*(float(t) if axis == "real" else math.sqrt(t) for t in roots), math.inf]:
        middle = 2 * start + 1 if math.isinf(end) else (start + end) / 2
        if start < middle < end and not is_inside_disc(p, *_axis_point(axis, Fraction(middle)), tolerance):
            return start
        start = end
    return math.inf


def _axis_point(axis: Axis, t: Fraction) -> tuple[Fraction, Fraction]:
    return (-t, Fraction(0)) if axis == "real" else (Fraction(0), t)


def has_left_poles(p: Characteristic) -> bool:
    """Whether M(z) has a pole with Re z <= 0."""
    poles = np.roots([float(c) for c in reversed(p.denominator)])
    return bool(np.any(poles.real <= 0))


def is_A_stable(p: Characteristic, imaginary: float) -> bool:
    """Whether the closed left half plane is stable.

    No pole lies there and the imaginary axis is stable, so the maximum principle for the spectral radius decides
    (Hairer and Wanner II, IV.3 and V.4).

    Args:
        p: the characteristic polynomial.
        imaginary: the imaginary stability limit of the method.
    """
    return math.isinf(imaginary) and not has_left_poles(p) and p.at_infinity() <= 1 + TOLERANCE


def wedge_angle(p: Characteristic, real: float) -> float:
    """The largest alpha, in degrees, with the wedge |arg(-z)| < alpha stable; 0 when no wedge is.

    An open wedge that meets no locus point has a constant number of roots outside the unit disc, and a locus point
    always has unstable neighbours (open mapping). So alpha is the least angle of a locus point in Re z < 0.

    Args:
        p: the characteristic polynomial of a method that is not A-stable.
        real: its real stability limit.
    """
    from scipy.optimize import minimize_scalar

    if not math.isinf(real):
        return 0.0

    def angle(theta: float) -> float:
        z = p.roots(np.exp(1j * np.array(theta)))
        z = z[np.isfinite(z) & (np.abs(z) > 1e-6) & (z.real < -1e-9 * np.abs(z))]  # near 0 the angle is noise
        return float(np.degrees(np.min(np.arctan2(np.abs(z.imag), -z.real), initial=np.pi / 2)))

    grid = np.linspace(0, np.pi, _SAMPLES + 1)
    values = np.array([angle(t) for t in grid])
    best = 90.0
    for k in np.argsort(values, kind="stable")[:3]:
        low, high = grid[max(k - 1, 0)], grid[min(k + 1, _SAMPLES)]
        found = minimize_scalar(angle, bounds=(low, high), method="bounded", options={"xatol": 1e-12})
        best = min(best, float(found.fun), float(values[k]))
    return best
