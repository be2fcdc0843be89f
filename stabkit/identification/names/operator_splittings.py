"""Names of splittings of two operators that are told by how each answers the other, whatever the states are called.

    H(zeta) = A + U (zeta I - V)^-1 B

is what reaches each field of what all fields gave out; no change of the states changes it, and where a round is cut
only moves a power of zeta from one entry off the diagonal to the other (Lessard and Seiler 2020, equivalence of
algorithms). Alternating directions: x = G(z - u), z' = P(x + u), u' = u + eta (x - z'). Primal-dual hybrid gradient:
y' = a_y (y + sigma K q), x' = a_x (x - tau K* y'), q' = x' + theta (x' - x) (Chambolle and Pock 2011).
"""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt

from stabkit.identification.form.tableau import Blocks
from stabkit.identification.names.single import Name

_CLOSE = 1e-5  # products of several coefficients of single precision networks
_ZETA = 1.7 * np.exp(2j * np.pi * (np.arange(12) + 0.25) / 12)  # outside of all roots of stable methods
Complex = npt.NDArray[np.complex128]


def name_splitting(found: Blocks, *, adjoint: bool) -> Name | None:
    """The name of a step of two fields by alternating directions, or of a primal and a dual state; None for others.

    Args:
        found: the tableau.
        adjoint: whether one field is a multiple of the adjoint of the other.
    """
    if len(found.rows) != 2 or found.n_fields != 2 or len(found.V) < 2:
        return None
    if np.abs(np.linalg.eigvals(found.V)).max() > 1 + 1e-3:
        return None
    H = np.array([found.A + found.U @ np.linalg.solve(z * np.eye(len(found.V)) - found.V, found.B) for z in _ZETA])
    return _alternating_directions(H) or (_primal_dual(H) if adjoint else None)


def _alternating_directions(H: Complex) -> Name | None:
    """By H_PP = -eta/(zeta - 1), that of G likewise, and the product of the two that lead from each to the other."""
    pole = _ZETA - 1
    for p, g in itertools.permutations(range(2)):
        own, other = -H[:, p, p] * pole, -H[:, g, g] * pole
        sign = float(np.sign(own.mean().real))  # that of a field is its own
        eta = abs(float(own.mean().real))
        answers = abs(other.mean()) > _CLOSE and _CLOSE < eta < 2
        if not answers or not _same(own, sign * eta) or not _same(other, other.mean()):
            continue
        expected = sign * other.mean() / eta * (1 / _ZETA + eta / pole) * (1 + eta / pole)
        if _same(H[:, p, g] * H[:, g, p], expected):
            step = "" if abs(eta - 1) <= _CLOSE else f" (dual step {eta:.3g})"
            system = "0 in G(x) + P(x), each by its resolvent: Douglas-Rachford splitting of the dual problem"
            return Name(f"ADMM{step}", system, 1.0, "h = 1: the resolvents as they are")
    return None


def _primal_dual(H: Complex) -> Name | None:
    """By the product of what leads from each field to the other: (p zeta - q) / ((zeta - a_x)(zeta - a_y))."""
    size = float(np.abs(H).max())
    if np.abs(H[:, [0, 1], [0, 1]]).max() > _CLOSE * size:
        return None
    G = H[:, 0, 1] * H[:, 1, 0]
    columns = np.stack([G * _ZETA, -G, _ZETA, -np.ones_like(G)], axis=1)
    right = G * _ZETA**2
    matrix = np.concatenate([columns.real, columns.imag])
    (s, m, p, q), *_ = np.linalg.lstsq(matrix, np.concatenate([right.real, right.imag]), rcond=None)
    if not _same(columns @ np.array([s, m, p, q]), right) or abs(p) <= _CLOSE:
        return None
    roots = np.roots([1.0, -s, m])
    if np.abs(roots.imag).max() > 1e-3 or roots.real.min() <= 0 or roots.real.max() > 1 + 1e-3 or p == q:
        return None
    theta = q / (p - q)
    if not -_CLOSE < theta < 2:
        return None
    kind = "Arrow-Hurwicz" if abs(theta) <= 10 * _CLOSE else f"Chambolle-Pock, theta = {theta:.3g}"
    system = "x' = -K* y - d g(x), y' = K x - d f(y): a saddle point, symplectic Euler with extrapolation"
    h = float(np.sqrt(abs(p - q)))
    return Name(f"primal-dual hybrid gradient ({kind})", system, h, "h: h^2 is the product of both steps")


def _same(found: Complex, expected: Complex | complex) -> bool:
    scale = max(float(np.abs(expected).max()), _CLOSE)
    return bool(np.abs(found - expected).max() <= 10 * _CLOSE * scale)
