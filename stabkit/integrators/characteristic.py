"""The characteristic polynomial p(zeta, z) of a general linear method, with exact coefficients.

    p(zeta, z) = det(I - z A) det(zeta I - M(z)) = sum_kj c_kj zeta^k z^j,   M(z) = V + z B (I - z A)^-1 U.

Its roots zeta at fixed z are the eigenvalues of M(z); its roots z at zeta = exp(i theta) are the boundary locus.
Source: J. C. Butcher, Numerical Methods for Ordinary Differential Equations, 3rd ed. 2016, sections 520 to 523.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, reduce

import numpy as np
import numpy.typing as npt

from stabkit.errors import ArgumentError
from stabkit.integrators import rational_polynomials as poly
from stabkit.integrators.rational_matrices import Matrix, determinant, matmul

# A coefficient within this relative distance of a simple rational is read as that rational.
_RECOGNITION = Fraction(4, 10**15)
# A coefficient this far below the terms that it is a sum of is what rounding left of zero.
_NOISE = 1e-15


@dataclass(frozen=True)
class Characteristic:
    """p(zeta, z) as polynomials in z, one for each power of zeta, lowest first.

    Attributes:
        rows: ``rows[k][j]`` is the coefficient of zeta^k z^j.

    Example:
        >>> backward_euler = Characteristic(((Fraction(-1),), (Fraction(1), Fraction(-1))))
        >>> backward_euler.at_infinity()  # |R(z)| -> 0
        0.0
    """

    rows: tuple[tuple[Fraction, ...], ...]

    @property
    def states(self) -> int:
        """The degree in zeta, which is the number of states r."""
        return len(self.rows) - 1

    @cached_property
    def degree(self) -> int:
        """The degree in z."""
        return max(len(row) for row in self.rows) - 1

    @cached_property
    def coefficients(self) -> npt.NDArray[np.float64]:
        """The coefficients as floats, ``(states + 1, degree + 1)``."""
        table = np.zeros((self.states + 1, self.degree + 1))
        for k, row in enumerate(self.rows):
            table[k, : len(row)] = [float(c) for c in row]
        return table

    @property
    def numerator(self) -> tuple[Fraction, ...]:
        """N of R(z) = N(z) / D(z), constant term first; for one state only.

        Raises:
            ArgumentError: the method has several states.
        """
        if self.states != 1:
            raise ArgumentError(f"the method has {self.states} states; R(z) = N(z)/D(z) exists for one state only")
        return tuple(-c for c in self.rows[0])

    @property
    def denominator(self) -> tuple[Fraction, ...]:
        """D(z), the coefficient of the highest power of zeta, constant term first."""
        return self.rows[-1]

    def at(self, re: Fraction, im: Fraction = Fraction(0)) -> list[tuple[Fraction, Fraction]]:
        """The coefficients in zeta at z = re + i im, lowest first, as pairs (real part, imaginary part)."""
        out = []
        for row in self.rows:
            x, y = Fraction(0), Fraction(0)
            for c in reversed(row):
                x, y = x * re - y * im + c, x * im + y * re
            out.append((x, y))
        return out

    def roots(self, z: npt.ArrayLike) -> npt.NDArray[np.complex128]:
        """The roots z' of p(zeta, z') = 0 for each given zeta: the points of the locus.

        Args:
            z: the values of zeta, any shape ``(...)``.

        Returns:
            ``(..., degree)``, complex; a root that moved to infinity is ``inf``.
        """
        zeta = np.asarray(z, dtype=complex)
        powers = zeta[..., None] ** np.arange(self.states + 1)
        return polynomial_roots(np.asarray(powers @ self.coefficients, dtype=complex))

    def at_infinity(self) -> float:
        """The limit of the spectral radius of M(z) as |z| -> inf; ``inf`` where a root escapes."""
        leading = self.degree
        top = [row[leading] if len(row) > leading else Fraction(0) for row in self.rows]
        if top[-1] == 0:
            return float("inf")
        return float(max(np.abs(np.roots([float(c) for c in reversed(top)])), default=0.0))

    def recognised(self) -> Characteristic:
        """The same polynomial with each coefficient that is a simple rational up to rounding replaced by it.

        Example:
            >>> Characteristic(((Fraction(-1 / 3),), (Fraction(1),))).recognised().rows[0]
            (Fraction(-1, 3),)
        """
        size = [max(abs(row[j]) for row in self.rows if len(row) > j) for j in range(self.degree + 1)]
        return Characteristic(
            tuple(tuple(poly.trimmed([recognise_fraction(c, size[j]) for j, c in enumerate(row)])) for row in self.rows)
        )

    def without_noise(self, sizes: Sequence[float]) -> Characteristic:
        """The same polynomial without the coefficients of z^j that lie below rounding error beside ``sizes[j]``."""
        kept = ([Fraction(0) if abs(c) <= _NOISE * sizes[j] else c for j, c in enumerate(row)] for row in self.rows)
        return Characteristic(tuple(tuple(poly.trimmed(row)) for row in kept))

    def reduced(self) -> Characteristic:
        """The same polynomial without the common factors in z, scaled so that D(0) = 1 where D(0) is not 0."""
        common: Sequence[Fraction] = reduce(poly.greatest_common_divisor, self.rows, poly.Polynomial())
        rows = [poly.divide(row, common)[0] if len(common) > 1 else list(row) for row in self.rows]
        unit = rows[-1][0] if rows[-1] and rows[-1][0] else Fraction(1)
        return Characteristic(tuple(tuple(poly.scale(row, 1 / unit)) for row in rows))


def recognise_fraction(value: Fraction, size: Fraction = Fraction(0)) -> Fraction:
    """The simple rational that ``value`` is up to rounding, or ``value`` itself.

    Args:
        value: the number as it is stored.
        size: the size of the terms that it was computed from; a value below rounding error beside it is 0.

    Example:
        >>> recognise_fraction(Fraction(0.1))
        Fraction(1, 10)
    """
    if abs(value) <= _RECOGNITION * size:
        return Fraction(0)
    inverted = abs(value) < 1
    number = 1 / value if inverted else value
    # Numerator times denominator stays below about 1e4, so that a chance hit has odds of about 1e-7.
    simple = number.limit_denominator(1 + int(10**4 / abs(number)))
    candidate = 1 / simple if inverted else simple
    return candidate if abs(candidate - value) <= _RECOGNITION * abs(value) else value


def characteristic(A: Matrix, U: Matrix, B: Matrix, V: Matrix) -> Characteristic:
    """p(zeta, z) of the tableau, exactly; common factors in z are divided out.

    Args:
        A: ``(s, s)``.
        U: ``(s, r)``.
        B: ``(r, s)``.
        V: ``(r, r)``.
    """
    s, r = len(A), len(V)
    if r == 1 and all(A[i][j] == 0 for i in range(s) for j in range(i, s)):
        return Characteristic((tuple(-c for c in _explicit_numerator(A, U, B, V)), (Fraction(1),)))
    degree = min(s, sum(any(row) for row in [*A, *B]))
    nodes_z = [Fraction((j + 1) // 2 * (-1) ** j) for j in range(degree + 1)]
    nodes_zeta = [Fraction(k) for k in range(r + 1)]
    columns = [
        poly.interpolate(nodes_zeta, [determinant(_pencil(A, U, B, V, z, zeta)) for zeta in nodes_zeta])
        for z in nodes_z
    ]
    rows = tuple(
        tuple(poly.interpolate(nodes_z, [p[k] if len(p) > k else Fraction(0) for p in columns])) for k in range(r + 1)
    )
    return Characteristic(rows).reduced()


def polynomial_roots(p: npt.NDArray[np.complex128]) -> npt.NDArray[np.complex128]:
    """The roots of many polynomials at once, from their companion matrices.

    Args:
        p: ``(..., n + 1)``, constant term first.

    Returns:
        ``(..., n)``; ``inf`` stands for the roots lost to a vanishing leading coefficient.
    """
    n = p.shape[-1] - 1
    if n == 0:
        return np.zeros(p.shape, dtype=complex)[..., :0]
    size = np.abs(p).max(axis=-1, keepdims=True)
    leads = np.abs(p[..., -1:]) > 1e-14 * size
    if n == 1:
        out = np.full((*p.shape[:-1], 1), np.inf, dtype=complex)
        np.divide(-p[..., :1], p[..., 1:], out=out, where=leads)
        return out
    # Reversed, the roots are reciprocals and a vanishing leading coefficient only gives a zero eigenvalue.
    flip = np.abs(p[..., -1]) < np.abs(p[..., 0])
    q = np.where(flip[..., None], p[..., ::-1], p)
    lead = np.where(q[..., -1:] == 0, 1, q[..., -1:])
    companion = np.zeros((*p.shape[:-1], n, n), dtype=complex)
    companion[..., np.arange(1, n), np.arange(n - 1)] = 1
    companion[..., :, -1] = -q[..., :-1] / lead
    roots = np.linalg.eigvals(companion)
    with np.errstate(divide="ignore", invalid="ignore"):
        inverse = np.where(np.abs(roots) > 1e-14, 1 / roots, np.inf)
    return np.where(flip[..., None], inverse, roots)


def _explicit_numerator(A: Matrix, U: Matrix, B: Matrix, V: Matrix) -> poly.Polynomial:
    p, X = [V[0][0]], U
    for _ in A:
        p.append(matmul(B, X)[0][0])
        X = matmul(A, X)
    return poly.trimmed(p)


def _pencil(A: Matrix, U: Matrix, B: Matrix, V: Matrix, z: Fraction, zeta: Fraction) -> Matrix:
    s, r = len(A), len(V)
    top = [[(i == j) - z * A[i][j] for j in range(s)] + [-u for u in U[i]] for i in range(s)]
    bottom = [[-z * b for b in B[i]] + [(i == j) * zeta - V[i][j] for j in range(r)] for i in range(r)]
    return top + bottom
