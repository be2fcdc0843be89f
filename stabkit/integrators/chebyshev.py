"""Runge-Kutta-Chebyshev methods of order 1 and 2, with damping, for any number of stages; exact coefficients.

Sources: P. J. van der Houwen, B. P. Sommeijer, Z. Angew. Math. Mech. 60 (1980) 479-485; J. G. Verwer, Appl. Numer.
Math. 22 (1996) 359-379; E. Hairer, G. Wanner, Solving Ordinary Differential Equations II, 1996, IV.2.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

from stabkit.arguments import accepts
from stabkit.errors import ArgumentError
from stabkit.integrators.catalogue_entry import Entry
from stabkit.integrators.construction import from_butcher
from stabkit.integrators.general_linear import GeneralLinearMethod
from stabkit.integrators.tableau_checks import to_fraction

_SOURCE_1 = "P. J. van der Houwen, B. P. Sommeijer, ZAMM 60 (1980) 479-485; Hairer and Wanner II, IV.2"
_SOURCE_2 = "B. P. Sommeijer, L. F. Shampine, J. G. Verwer, J. Comput. Appl. Math. 88 (1998) 315-326; Verwer 1996"


def chebyshev_values(s: int, x: Fraction) -> list[tuple[Fraction, Fraction, Fraction]]:
    """T_j(x), T_j'(x), T_j''(x) for j = 0, ..., s, by the three-term recurrence.

    Example:
        >>> chebyshev_values(2, Fraction(1))[2]
        (Fraction(1, 1), Fraction(4, 1), Fraction(4, 1))
    """
    one, zero = Fraction(1), Fraction(0)
    out = [(one, zero, zero), (x, one, zero)]
    for _ in range(s - 1):
        (a, da, dda), (b, db, ddb) = out[-2], out[-1]
        out.append((2 * x * b - a, 2 * b + 2 * x * db - da, 4 * db + 2 * x * ddb - dda))
    return out[: s + 1]


@accepts
def rkc1(s: int = 5, damping: Any = 0) -> GeneralLinearMethod:
    """The first-order Runge-Kutta-Chebyshev method: R(z) = T_s(w0 + w1 z) / T_s(w0).

    Args:
        s: the number of stages, at least 1.
        damping: eps in w0 = 1 + eps / s^2; 0 gives the longest interval, exactly 2 s^2.

    Raises:
        ArgumentError: ``s`` is below 1 or ``damping`` is negative.

    Example:
        >>> float(rkc1(5).real_interval())
        50.0
    """
    w0 = _shift(s, damping, least=1)
    T = chebyshev_values(s, w0)
    w1 = T[s][0] / T[s][1]
    rows: list[list[Fraction]] = [[], [w1 / w0]]
    for j in range(2, s + 1):
        mu, nu = 2 * w0 * T[j - 1][0] / T[j][0], -T[j - 2][0] / T[j][0]
        rows.append(_recurrence(rows, j, mu, nu, 2 * w1 * T[j - 1][0] / T[j][0], Fraction(0)))
    label = f"rkc1(s={s})" if damping == 0 else f"rkc1(s={s}, damping={damping})"
    return from_butcher(rows[:s], rows[s], name=label, source=_SOURCE_1)


@accepts
def rkc2(s: int = 5, damping: Any = Fraction(2, 13)) -> GeneralLinearMethod:
    """The second-order Runge-Kutta-Chebyshev method of the code RKC.

    Args:
        s: the number of stages, at least 2.
        damping: eps in w0 = 1 + eps / s^2, 2/13 in the code.

    Raises:
        ArgumentError: ``s`` is below 2 or ``damping`` is negative.

    Example:
        >>> rkc2(4).order
        2
    """
    w0 = _shift(s, damping, least=2)
    T = chebyshev_values(s, w0)
    w1 = T[s][1] / T[s][2]
    weight = [Fraction(0)] * 2 + [T[j][2] / T[j][1] ** 2 for j in range(2, s + 1)]
    weight[0] = weight[1] = weight[2]
    a = [1 - weight[j] * T[j][0] for j in range(s + 1)]
    rows: list[list[Fraction]] = [[], [weight[1] * w1]]
    for j in range(2, s + 1):
        mu, nu = 2 * weight[j] * w0 / weight[j - 1], -weight[j] / weight[j - 2]
        slope = 2 * weight[j] * w1 / weight[j - 1]
        rows.append(_recurrence(rows, j, mu, nu, slope, -a[j - 1] * slope))
    return from_butcher(rows[:s], rows[s], name=f"rkc2(s={s}, damping={damping})", source=_SOURCE_2)


def _shift(s: int, damping: Any, *, least: int) -> Fraction:
    if s < least:
        raise ArgumentError(f"s={s} stages; this method needs at least {least}")
    eps = to_fraction(damping)
    if eps < 0:
        raise ArgumentError(f"damping={damping} is negative; use 0 for none or a small positive number such as 2/13")
    return 1 + eps / (s * s)


def _recurrence(
    rows: list[list[Fraction]], j: int, mu: Fraction, nu: Fraction, slope: Fraction, first: Fraction
) -> list[Fraction]:
    """Row j from Y_j = (1-mu-nu) Y_0 + mu Y_{j-1} + nu Y_{j-2} + slope F_{j-1} + first F_0."""
    row = [Fraction(0)] * j
    for k, c in enumerate(rows[j - 1]):
        row[k] += mu * c
    for k, c in enumerate(rows[j - 2]):
        row[k] += nu * c
    row[j - 1] += slope
    row[0] += first
    return row


ENTRIES: tuple[Entry, ...] = (
    Entry("rkc1", rkc1, _SOURCE_1, ("chebyshev1",), {"s": 5, "damping": 0}, "stabilised Runge-Kutta"),
    Entry(
        "rkc2", rkc2, _SOURCE_2, ("chebyshev2", "rkc"), {"s": 5, "damping": Fraction(2, 13)}, "stabilised Runge-Kutta"
    ),
)
