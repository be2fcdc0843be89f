"""The h A of a linear recurrence whose rule is known: what its numbers are the exponential, or a rational function, of.

Where matrices are constants of the code, discretised before the model was made, nothing on the graph tells the rule.
But the A of a memory that was derived (Legendre polynomials, Voelker et al. 2019) is made of few numbers, and a
function of it has as many as it has entries: the one rule under which they repeat is that by which it was made.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from stabkit.identification.steps.matrix_logarithm import logarithm

Matrix = np.ndarray[Any, np.dtype[Any]]

# different moduli as a share of the entries that are not zero: 1 / n for a Legendre memory of order n, 1/2 of a matrix
# that is skew, as every orthogonal one's is. Missed: memories of order 32 in single precision with a long window; of
# 6,000 random matrices (orthogonal, triangular, symmetric, near the identity) none is held for a function of such
_REPEATED = 0.4
_DISTINCT = 0.8
_SAME = 1e-4  # of the largest entry: discretised in double precision, kept in single
_FEWEST = 3  # rows: of fewer some entries repeat under several rules

_OF_NUMBERS: dict[str, Callable[[Matrix], Matrix]] = {
    "exponential": np.log,
    "trapezoid": lambda a: 2 * (a - 1) / (a + 1),
    "backward Euler": lambda a: 1 - 1 / a,
}


def rates(rule: str, values: Matrix) -> str:
    """What h A is, in words, from the numbers or eigenvalues that a rule made of it; empty where some are zero.

    Example:
        >>> rates("backward Euler", np.array([0.5, 0.8]))
        'h A from -1 to -0.25'
    """
    a = values[np.isfinite(values)].astype(complex)
    if not a.size or not a.all() or (rule == "trapezoid" and (a == -1).any()):
        return ""
    z = _OF_NUMBERS[rule](a)
    low, high, turn = z.real.min(), z.real.max(), np.abs(z.imag).max()
    if turn <= _SAME * max(np.abs(z).max(), 1e-30):
        return f"h A = {low:.3g}" if f"{low:.3g}" == f"{high:.3g}" else f"h A from {low:.3g} to {high:.3g}"
    wraps = " (up to turns of 2 pi)" if rule == "exponential" else ""
    return f"h A with real parts from {low:.3g} to {high:.3g}, imaginary parts up to {turn:.3g}{wraps}"


def rule_of_constants(M: Matrix) -> str | None:
    """The one rule under which few numbers make up the A of a constant matrix; None where there is none, or several.

    Example:
        >>> from scipy.linalg import expm
        >>> A = 0.1 * np.array([[-1.0, -1, -1], [3, -3, -3], [-5, 5, -5]])  # Legendre polynomials, order 3
        >>> rule_of_constants(expm(A)), rule_of_constants(np.eye(3) + A)
        ('exponential', None)
    """
    change = M - np.eye(len(M))
    if len(M) < _FEWEST or not change.any() or _distinct(change) < _DISTINCT:
        return None
    one = np.eye(len(M))
    if min(np.linalg.svd(M + shift * one, compute_uv=False)[-1] for shift in (0, 1)) < _SAME:
        return None
    found = {"trapezoid": 2 * np.linalg.solve(M + one, change), "backward Euler": one - np.linalg.inv(M)}
    if (np.linalg.eigvals(M).real > 0).all():  # of others no logarithm is meant
        found["exponential"] = logarithm(M)
    fits = [rule for rule, A in found.items() if _repeats(A)]
    return fits[0] if len(fits) == 1 else None


def _repeats(A: Matrix) -> bool:
    """Whether a matrix is real, and few numbers make it up."""
    real = np.abs(A.imag).max() <= _SAME * np.abs(A).max() if np.isfinite(A).all() else False
    return bool(real and _distinct(A.real) <= _REPEATED)


def _distinct(A: Matrix) -> float:
    """How many different moduli there are, as a share of the entries that are not zero."""
    sizes = np.sort(np.abs(A).ravel())
    sizes = sizes[sizes > _SAME * sizes[-1]]
    return float((1 + (np.diff(sizes) > _SAME * sizes[-1]).sum()) / max(sizes.size, 1))


def rates_of_oscillators(M: Matrix) -> str:
    """Step size and stiffness of oscillators y' = v, v' = -A y from the 2 x 2 matrices of a step; empty where unclear.

    Both symplectic Euler (v first or y first) and backward Euler give h as what v adds to y, over what is kept.

    Example:
        >>> h, A = 0.1, np.array([1.0, 4.0])
        >>> rates_of_oscillators(np.stack([[[1.0, -h * a], [h, 1 - h * h * a]] for a in A]))
        'h = 0.1, A from 1 to 4 where v = dy/dt'
    """
    down, up = M[:, 1, 0], M[:, 0, 1]
    if (up > 0).all() and (down <= 0).all():
        down, up = up, down
    elif not ((down > 0).all() and (up <= 0).all()):
        return ""
    trace, det = np.trace(M, axis1=1, axis2=2), np.linalg.det(M)
    h = down if np.abs(det - 1).max() <= _SAME else 2 * down / trace  # backward Euler: 1 / (1 + h^2 A) on the diagonal
    ends = [("h", h), ("A", -up / down)]
    said = [f"{what} = {x.min():.3g}" if np.ptp(x) <= _SAME * np.abs(x).max() else
            f"{what} from {x.min():.3g} to {x.max():.3g}" for what, x in ends]  # fmt: skip
    return f"{', '.join(said)} where v = dy/dt"
