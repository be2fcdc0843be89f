"""Linear multistep methods, their coefficients computed exactly from interpolation.

Source: E. Hairer, S. P. Norsett, G. Wanner, Solving Ordinary Differential Equations I, 2nd ed. 1993, III.1 and III.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from functools import partial

from stabkit.arguments import accepts
from stabkit.errors import ArgumentError
from stabkit.integrators import rational_polynomials as poly
from stabkit.integrators.catalogue_entry import Entry
from stabkit.integrators.construction import from_multistep
from stabkit.integrators.general_linear import GeneralLinearMethod

_III1 = "Hairer, Norsett and Wanner I, 2nd ed. 1993, III.1"
_SSP = "S. Gottlieb, D. Ketcheson, C.-W. Shu, Strong Stability Preserving Time Discretizations, 2011, chapter 8"
_FAMILY = "multistep"
_ZERO, _ONE = Fraction(0), Fraction(1)


def quadrature_weights(nodes: Sequence[int], start: int, stop: int) -> list[Fraction]:
    """The integrals over [start, stop] of the Lagrange polynomials on integer nodes.

    Example:
        >>> quadrature_weights([0, 1, 2], 0, 2)  # Simpson
        [Fraction(1, 3), Fraction(4, 3), Fraction(1, 3)]
    """
    out = []
    for j in nodes:
        basis = [_ONE]
        for i in nodes:
            if i != j:
                basis = poly.multiply(basis, [Fraction(-i, j - i), Fraction(1, j - i)])
        integral = [_ZERO, *(c / (k + 1) for k, c in enumerate(basis))]
        out.append(poly.evaluate(integral, Fraction(stop)) - poly.evaluate(integral, Fraction(start)))
    return out


@accepts
def adams_bashforth(k: int) -> GeneralLinearMethod:
    """The explicit Adams method with k steps, of order k.

    Example:
        >>> float(adams_bashforth(3).real_interval()) == 6 / 11
        True
    """
    _at_least(k, 1)
    beta = [*quadrature_weights(range(k), k - 1, k), _ZERO]
    return from_multistep(_difference(k, 1), beta, name=f"ab{k}", source=f"{_III1} (Adams-Bashforth)")


@accepts
def adams_moulton(k: int) -> GeneralLinearMethod:
    """The implicit Adams method with k steps, of order k + 1.

    Example:
        >>> adams_moulton(2).order
        3
    """
    _at_least(k, 1)
    beta = quadrature_weights(range(k + 1), k - 1, k)
    return from_multistep(_difference(k, 1), beta, name=f"am{k}", source=f"{_III1} (Adams-Moulton)")


@accepts
def nystrom(k: int) -> GeneralLinearMethod:
    """The explicit Nystrom method y_{n+1} = y_{n-1} + h sum beta_j f_j with k >= 2 steps; k = 2 is the leapfrog."""
    _at_least(k, 2)
    beta = [*quadrature_weights(range(k), k - 2, k), _ZERO]
    return from_multistep(_difference(k, 2), beta, name=f"nystrom{k}", source=f"{_III1} (Nystrom)")


@accepts
def milne_simpson(k: int) -> GeneralLinearMethod:
    """The implicit method y_{n+1} = y_{n-1} + h sum beta_j f_j with k >= 2 steps; k = 2 is Simpson's rule."""
    _at_least(k, 2)
    beta = quadrature_weights(range(k + 1), k - 2, k)
    return from_multistep(_difference(k, 2), beta, name=f"milne_simpson{k}", source=f"{_III1} (Milne-Simpson)")


@accepts
def bdf(k: int) -> GeneralLinearMethod:
    """The backward differentiation formula with k steps, of order k; zero-unstable from k = 7 on.

    Example:
        >>> round(bdf(3).alpha(), 10)
        86.0323668602
    """
    _at_least(k, 1)
    alpha: poly.Polynomial = []
    backward: poly.Polynomial = [_ONE]
    for j in range(1, k + 1):
        backward = poly.multiply(backward, [-_ONE, _ONE])  # (zeta - 1)^j
        alpha = poly.add(alpha, [*([_ZERO] * (k - j)), *poly.scale(backward, Fraction(1, j))])
    beta = [_ZERO] * k + [_ONE]
    return from_multistep(alpha, beta, name=f"bdf{k}", source=f"{_III1} (Curtiss and Hirschfelder 1952; Gear)")


def _difference(k: int, back: int) -> list[Fraction]:
    alpha = [_ZERO] * (k + 1)
    alpha[k], alpha[k - back] = _ONE, -_ONE
    return alpha


def _at_least(k: int, least: int) -> None:
    if k < least:
        raise ArgumentError(f"k={k} steps; this method needs at least {least}")


# (steps, order): (alpha, beta), oldest first
_SSP_MULTISTEP = {
    (3, 2): (("-1/4", 0, "-3/4", 1), (0, 0, "3/2", 0)),
    (4, 2): (("-1/9", 0, 0, "-8/9", 1), (0, 0, 0, "4/3", 0)),
    (4, 3): (("-11/27", 0, 0, "-16/27", 1), ("12/27", 0, 0, "48/27", 0)),
    (5, 3): (("-7/32", 0, 0, 0, "-25/32", 1), ("5/16", 0, 0, 0, "25/16", 0)),
}


def _ssp_multistep(steps: int, order: int) -> GeneralLinearMethod:
    alpha, beta = _SSP_MULTISTEP[steps, order]
    return from_multistep(alpha, beta, name=f"sspms{steps}{order}", source=_SSP)


ENTRIES: tuple[Entry, ...] = (
    *(Entry(f"ab{k}", partial(adams_bashforth, k), f"{_III1} (Adams-Bashforth)", (f"adams_bashforth{k}",),
            family=_FAMILY) for k in range(2, 7)),
    *(Entry(f"am{k}", partial(adams_moulton, k), f"{_III1} (Adams-Moulton)", (f"adams_moulton{k}",),
            family=_FAMILY) for k in range(1, 6)),
    *(Entry(f"bdf{k}", partial(bdf, k), f"{_III1} (backward differentiation)", (), family=_FAMILY)
      for k in range(1, 8)),
    Entry("leapfrog", partial(nystrom, 2), f"{_III1} (explicit midpoint rule)",
          ("nystrom2", "midpoint_two_step", "two_step_midpoint", "midpoint_network"), family=_FAMILY),
    *(Entry(f"nystrom{k}", partial(nystrom, k), f"{_III1} (Nystrom)", (), family=_FAMILY) for k in range(3, 5)),
    Entry("milne_simpson", partial(milne_simpson, 2), f"{_III1} (Milne-Simpson)",
          ("milne_simpson2", "simpson", "milne"), family=_FAMILY),
    Entry("milne_simpson4", partial(milne_simpson, 4), f"{_III1} (Milne-Simpson)", (), family=_FAMILY),
    *(Entry(f"sspms{s}{p}", partial(_ssp_multistep, s, p), _SSP, (f"ssp_multistep{s}{p}",), family=_FAMILY)
      for s, p in _SSP_MULTISTEP),
)  # fmt: skip
