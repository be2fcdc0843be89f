"""Implicit Runge-Kutta methods: collocation families for any number of stages, and diagonally implicit ones.

Source of the families: E. Hairer, G. Wanner, Solving Ordinary Differential Equations II, 2nd ed. 1996, IV.3 (Pade
functions), IV.5 (Gauss, Radau, Lobatto) and IV.6 (diagonally implicit methods).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import partial
from typing import Any, Literal

import numpy as np
from numpy.polynomial import Legendre

from stabkit.arguments import accepts
from stabkit.errors import ArgumentError
from stabkit.integrators.catalogue_entry import Entry
from stabkit.integrators.construction import from_butcher
from stabkit.integrators.general_linear import GeneralLinearMethod
from stabkit.integrators.rational_matrices import solve
from stabkit.integrators.tableau_checks import to_fraction

_IV5 = "Hairer and Wanner II, 2nd ed. 1996, IV.5"
_ALEXANDER = "R. Alexander, SIAM J. Numer. Anal. 14 (1977) 1006-1021"
_FAMILY = "implicit Runge-Kutta"
Family = Literal["gauss", "radau_ia", "radau_iia", "lobatto_iiia", "lobatto_iiib", "lobatto_iiic"]


def pade(top: int, bottom: int) -> tuple[list[Fraction], list[Fraction]]:
    """The Pade approximation of exp(z): N of degree ``top``, D of degree ``bottom``, constant term first.

    Example:
        >>> pade(1, 1)
        ([Fraction(1, 1), Fraction(1, 2)], [Fraction(1, 1), Fraction(-1, 2)])
    """

    def side(k: int, j: int, sign: int) -> list[Fraction]:
        return [
            Fraction(sign**i * math.comb(k, i) * math.factorial(k + j - i), math.factorial(k + j)) for i in range(k + 1)
        ]

    return side(top, bottom, 1), side(bottom, top, -1)


@accepts
def collocation_family(family: Family, s: int) -> GeneralLinearMethod:
    """The s-stage method of a family built on Gauss, Radau or Lobatto nodes.

    Args:
        family: which family.
        s: the number of stages; Lobatto families need at least 2.

    Returns:
        The method; rational where the nodes are, and with its exact Pade stability function always.

    Raises:
        ArgumentError: too few stages.

    Example:
        >>> collocation_family("radau_iia", 2).tableau.A[0]
        [Fraction(5, 12), Fraction(-1, 12)]
    """
    least = 2 if family.startswith("lobatto") else 1
    if s < least:
        raise ArgumentError(f"s={s} stages; {family} needs at least {least}")
    nodes = [_simplest(Fraction(c)) for c in _nodes(family, s)]
    top, bottom = {
        "gauss": (s, s), "radau_ia": (s - 1, s), "radau_iia": (s - 1, s), "lobatto_iiia": (s - 1, s - 1),
        "lobatto_iiib": (s - 1, s - 1), "lobatto_iiic": (s - 2, s),
    }[family]  # fmt: skip
    moments = [[c**k for c in nodes] for k in range(s)]
    weights = [row[0] for row in solve(moments, [[Fraction(1, k + 1)] for k in range(s)])]
    stages = _stage_matrix(family, nodes, weights)
    number = Fraction if all(c.denominator <= 60 for c in nodes) else float  # irrational nodes are floats
    A, b = [[number(x) for x in row] for row in stages], [number(x) for x in weights]
    return from_butcher(
        A, b, name=f"{family}{s}", source=f"{_IV5}, {family} with {s} stages", stability_function=pade(top, bottom)
    )


def _stage_matrix(family: Family, c: Sequence[Fraction], b: Sequence[Fraction]) -> list[list[Fraction]]:
    s = len(c)
    if family in ("radau_ia", "lobatto_iiib"):  # D(s): sum_i b_i c_i^(k-1) a_ij = b_j (1 - c_j^k) / k
        left = [[b[i] * c[i] ** k for i in range(s)] for k in range(s)]
        right = [[b[j] * (1 - c[j] ** (k + 1)) / (k + 1) for j in range(s)] for k in range(s)]
        return solve(left, right)
    # C(s): sum_j a_ij c_j^(k-1) = c_i^k / k; for Lobatto IIIC the last one gives way to a_i1 = b_1.
    conditions = [[x**k for x in c] for k in range(s)]
    values = [[x ** (k + 1) / (k + 1) for x in c] for k in range(s)]
    if family == "lobatto_iiic":
        conditions[-1] = [Fraction(int(j == 0)) for j in range(s)]
        values[-1] = [b[0]] * s
    return [list(row) for row in zip(*solve(conditions, values), strict=True)]


def _nodes(family: Family, s: int) -> list[float]:
    P = Legendre.basis
    if family == "gauss":
        x = P(s).roots()
    elif family.startswith("radau"):
        x = (P(s) - P(s - 1)).roots() if family == "radau_iia" else (P(s) + P(s - 1)).roots()
    else:
        x = np.concatenate([[-1.0], P(s - 1).deriv().roots() if s > 2 else [], [1.0]])
    return [float(c) for c in (np.sort(np.real(x)) + 1) / 2]


def _simplest(c: Fraction) -> Fraction:
    simple = c.limit_denominator(60)
    return simple if abs(simple - c) < Fraction(1, 10**14) else c


def theta(theta: Any = Fraction(1, 2)) -> GeneralLinearMethod:
    """X' = x + h [(1 - theta) f(x) + theta f(x')]: R = (1 + (1-theta) z) / (1 - theta z).

    Args:
        theta: 0 is forward Euler, 1/2 the trapezoid, 1 backward Euler.

    Example:
        >>> from_half = theta(1)
        >>> from_half.is_L_stable
        True
    """
    t = theta if isinstance(theta, float) else to_fraction(theta)
    return from_butcher([[], [1 - t, t]], [1 - t, t], name=f"theta({theta})", source="Hairer and Wanner II, IV.3")


def _sdirk2() -> tuple[list[list[float]], list[float]]:
    g = 1 - math.sqrt(2) / 2
    return [[g], [1 - g, g]], [1 - g, g]


def _alexander3() -> tuple[list[list[float]], list[float]]:
    g = 0.43586652150845899942  # the root of g^3 - 3 g^2 + 3/2 g - 1/6 in (1/6, 1/2)
    b1, b2 = -(6 * g * g - 16 * g + 1) / 4, (6 * g * g - 20 * g + 5) / 4
    return [[g], [(1 - g) / 2, g], [b1, b2, g]], [b1, b2, g]


def _norsett23() -> tuple[list[list[float]], list[float]]:
    g = (3 + math.sqrt(3)) / 6
    return [[g], [1 - 2 * g, g]], [0.5, 0.5]


def _norsett34() -> tuple[list[list[float]], list[float]]:
    g = 0.5 + math.cos(math.pi / 18) / math.sqrt(3)
    d = 1 / (6 * (2 * g - 1) ** 2)
    return [[g], [0.5 - g, g], [2 * g, 1 - 4 * g, g]], [d, 1 - 2 * d, d]


def _sdirk4() -> tuple[list[list[str]], list[str]]:
    rows = "1/4; 1/2 1/4; 17/50 -1/25 1/4; 371/1360 -137/2720 15/544 1/4; 25/24 -49/48 125/16 -85/12 1/4"
    A = [row.split() for row in rows.split(";")]
    return A, A[-1]


def _tr_bdf2() -> tuple[list[list[float]], list[float]]:
    g = 2 - math.sqrt(2)
    w = math.sqrt(2) / 4
    return [[], [g / 2, g / 2], [w, w, g / 2]], [w, w, g / 2]


def _bank() -> tuple[list[list[str]], list[str]]:
    return [[], ["1/4", "1/4"], ["1/3"] * 3], ["1/3"] * 3


_DIAGONAL: dict[str, tuple[Callable[[], tuple[Any, Any]], tuple[str, ...], str]] = {
    "backward_euler": (lambda: ([[1]], [1]), ("implicit_euler", "be", "radau_iia1"), f"{_IV5} (Radau IIA, one stage)"),
    "trapezoid": (lambda: ([[], ["1/2", "1/2"]], ["1/2", "1/2"]),
                  ("crank_nicolson", "trapezoidal", "implicit_trapezoid"),
                  "J. Crank, P. Nicolson, Proc. Camb. Phil. Soc. 43 (1947) 50-67"),
    "implicit_midpoint": (lambda: ([["1/2"]], [1]), ("gauss1", "midpoint_rule"), f"{_IV5} (Gauss, one stage)"),
    "sdirk2": (_sdirk2, ("sdirk22", "alexander2"), _ALEXANDER),
    "sdirk3": (_alexander3, ("sdirk33", "alexander3"), _ALEXANDER),
    "sdirk23": (_norsett23, ("crouzeix2",), "S. P. Norsett 1974; M. Crouzeix 1975; Hairer, Norsett, Wanner I, II.7"),
    "sdirk34": (_norsett34, ("crouzeix3",), "S. P. Norsett 1974; M. Crouzeix 1975; Hairer and Wanner II, IV.6"),
    "sdirk4": (_sdirk4, ("sdirk54", "hairer_wanner_sdirk4"), "Hairer and Wanner II, IV.6, (6.16)"),
    "tr_bdf2": (_tr_bdf2, ("trbdf2",), "M. E. Hosea, L. F. Shampine, Appl. Numer. Math. 20 (1996) 21-37"),
    "tr_bdf2_half": (_bank, ("tr_bdf2_bank",), "R. E. Bank et al., IEEE Trans. CAD 4 (1985) 436-451, equal substeps"),
}  # fmt: skip


def _diagonal(name: str, source: str, tableau: Callable[[], tuple[Any, Any]]) -> GeneralLinearMethod:
    return from_butcher(*tableau(), name=name, source=source)


_COLLOCATION: tuple[tuple[Family, tuple[int, ...], str], ...] = (
    ("gauss", (2, 3, 4, 5), "gl"),
    ("radau_ia", (2, 3), ""),
    ("radau_iia", (2, 3, 4, 5), "radau"),
    ("lobatto_iiia", (2, 3, 4), ""),
    ("lobatto_iiib", (2, 3, 4), ""),
    ("lobatto_iiic", (2, 3, 4), ""),
)

ENTRIES: tuple[Entry, ...] = (
    Entry("theta", theta, "Hairer and Wanner II, IV.3", ("theta_method",), {"theta": Fraction(1, 2)}, _FAMILY),
    *(
        Entry(name, partial(_diagonal, name, source, tableau), source, aliases, family=_FAMILY)
        for name, (tableau, aliases, source) in _DIAGONAL.items()
    ),
    *(
        Entry(
            f"{family}{s}",
            partial(collocation_family, family, s),
            f"{_IV5}, {family} with {s} stages",
            (f"{short}{s}",) if short else (),
            family=_FAMILY,
        )
        for family, sizes, short in _COLLOCATION
        for s in sizes
    ),
)
