"""Pseudospectra: where the resolvent (z - A)^-1 is large, and what follows for powers of A.

L. N. Trefethen, M. Embree, Spectra and Pseudospectra (2005). For a matrix too large to be reduced, the rectangular
Hessenberg matrix of an Arnoldi run replaces it: its pseudospectra lie inside those of A (K.-C. Toh, L. N. Trefethen,
SIAM J. Sci. Comput. 17 (1996) 1), so that radius, abscissa and Kreiss constant become lower bounds.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

_SVD_SIZE = 40  # up to here a full SVD is as fast as a few triangular solves


class Resolvent:
    """sigma_min(z I - A) for many z, for a square A or a rectangular Hessenberg matrix of Arnoldi.

    Attributes:
        norm: the 2-norm of A.
        departure: Henrici's departure from normality, the norm of the strictly upper part of the Schur form; nan for a
            rectangular A.

    Args:
        A: real ``(n, n)``, or ``(p + b, p)`` for the lower bound by projection.
    """

    def __init__(self, A: np.ndarray) -> None:
        import scipy.linalg

        rows, self.n = A.shape
        self.square = rows == self.n
        self.norm = float(np.linalg.norm(A, 2))
        if self.square:
            T, Z = scipy.linalg.schur(A, output="real")
            self.matrix = np.asfortranarray(scipy.linalg.rsf2csf(T, Z)[0])
            # the difference of squared norms that it equals would lose half of the digits near normal matrices
            self.departure = float(np.linalg.norm(np.triu(self.matrix, 1)))
        else:
            self.matrix = A.astype(complex)
            self.departure = float("nan")

    def smallest(self, z: complex) -> float:
        """sigma_min(z I - A): exact for small or rectangular A, else by Lanczos on the inverse."""
        M = self.matrix.copy(order="F")
        diagonal = np.arange(self.n)
        M[diagonal, diagonal] -= z
        if not self.square or self.n <= _SVD_SIZE:
            return float(np.linalg.svd(M, compute_uv=False)[-1])
        if np.abs(M[diagonal, diagonal]).min() <= 1e-14 * self.norm:
            return 0.0
        return _inverse_lanczos(M)


def _inverse_lanczos(R: np.ndarray, steps: int = 40) -> float:
    """Smallest singular value of an upper triangular matrix: Lanczos on (R^H R)^-1 (S. H. Lui, 1997)."""
    import scipy.linalg
    from scipy.linalg.lapack import ztrtrs

    rng = np.random.default_rng(0)
    n = len(R)
    q = rng.standard_normal(n) + 1j * rng.standard_normal(n)
    q /= np.linalg.norm(q)
    basis = [q]
    alphas: list[float] = []
    betas: list[float] = []
    largest = 0.0
    for _ in range(min(steps, n)):
        w = ztrtrs(R, ztrtrs(R, basis[-1], trans=2)[0])[0]
        alphas.append(float(np.vdot(basis[-1], w).real))
        Q = np.array(basis)
        w = w - Q.T @ (Q.conj() @ w)
        w = w - Q.T @ (Q.conj() @ w)
        top = float(
            scipy.linalg.eigvalsh_tridiagonal(alphas, betas, select="i", select_range=(len(alphas) - 1,) * 2)[0]
        )
        beta = float(np.linalg.norm(w))
        if top - largest <= 1e-8 * top or beta <= 1e-14 * top:
            return 1 / float(np.sqrt(top))
        largest = top
        betas.append(beta)
        basis.append(w / beta)
    return 1 / float(np.sqrt(largest))


def pseudospectral_radius(resolvent: Resolvent, epsilon: float, values: np.ndarray, outside: float) -> float:
    """Max |z| with sigma_min(z I - A) <= epsilon: a lower bound, exact unless a narrow lobe hides between rays.

    Args:
        resolvent: the resolvent of A.
        epsilon: the level.
        values: eigenvalues of A; for a projection Ritz values, which only guide the search.
        outside: a bound from above of max |z| - epsilon, such as the numerical radius or the norm.

    Returns:
        The radius; ``nan`` where a projection is too small to reach the level.
    """
    reached = float(np.abs(values).max()) if resolvent.square else float("nan")
    leading = values[np.argsort(-np.abs(values))[:8]]
    rays = np.union1d(np.linspace(0, np.pi, 33), np.abs(np.angle(leading)))
    inside = reached if resolvent.square else 0.0
    return _outermost(resolvent, _on_ray, rays, (outside + epsilon, inside), reached, epsilon)


def pseudospectral_abscissa(
    resolvent: Resolvent, epsilon: float, values: np.ndarray, outside: float, height: float
) -> float:
    """Max Re z with sigma_min(z I - A) <= epsilon, along horizontal lines up to ``height``; otherwise as above."""
    reached = float(values.real.max()) if resolvent.square else float("nan")
    leading = values[np.argsort(-values.real)[:8]]
    lines = np.union1d(np.linspace(0, height + epsilon, 33), np.abs(leading.imag))
    inside = reached if resolvent.square else -outside
    return _outermost(resolvent, _on_line, lines, (outside + epsilon, inside), reached, epsilon)


def _on_ray(angle: float, r: float) -> complex:
    return complex(r * np.cos(angle), r * np.sin(angle))


def _on_line(y: float, x: float) -> complex:
    return complex(x, y)


def _root(gap: Callable[[float], float], inner: float, outer: float) -> float:
    """Where ``gap`` changes sign; an end where it does not (rounding of the inverse iteration)."""
    from scipy.optimize import brentq

    if gap(inner) >= 0:
        return inner
    return outer if gap(outer) <= 0 else float(brentq(gap, inner, outer, rtol=1e-11))


def _outermost(
    resolvent: Resolvent,
    point: Callable[[float, float], complex],
    lines: np.ndarray,
    span: tuple[float, float],
    reached: float,
    epsilon: float,
) -> float:
    """The largest t in ``span`` with sigma_min(point(s, t)) <= epsilon over the lines s, from outside inwards."""
    from scipy.optimize import minimize_scalar

    outside, inside = span
    ts = np.linspace(outside + 1e-9 * (abs(outside) + epsilon), inside, 13)

    def crossing(s: float, depth: int) -> tuple[float, int]:
        for i in range(1, depth + 1):
            if resolvent.smallest(point(s, ts[i])) <= epsilon:
                return _root(lambda t: resolvent.smallest(point(s, t)) - epsilon, ts[i], ts[i - 1]), i
        return reached, depth

    found, depth = np.full(len(lines), reached), len(ts) - 1
    for j, s in enumerate(lines):  # a line is followed only down to the level that another one has reached
        found[j], depth = crossing(s, depth)
    if np.isnan(found).all():
        return float("nan")
    best = int(np.nanargmax(found))
    bounds = (lines[max(best - 1, 0)], lines[min(best + 1, len(lines) - 1)])
    refined = minimize_scalar(
        lambda s: -np.nan_to_num(crossing(s, depth)[0], nan=inside),
        bounds=bounds,
        method="bounded",
        options={"xatol": 1e-7},
    )
    return max(float(found[best]), -float(refined.fun))


def kreiss_constant(resolvent: Resolvent, spectral_radius: float, outside: float) -> float:
    """A lower bound of K = sup over |z| > 1 of (|z| - 1) ||(z - A)^-1||; inf where the spectral radius exceeds 1.

    K <= sup_k ||A^k|| <= e n K (H.-O. Kreiss 1962; M. N. Spijker 1991). A polar grid, then Nelder-Mead from its
    best points.
    """
    from scipy.optimize import minimize

    if spectral_radius > 1 + 1e-12:
        return float("inf")

    def ratio(log_gap: float, angle: float) -> float:
        gap = np.exp(log_gap)
        smallest = resolvent.smallest((1 + gap) * np.exp(1j * angle))
        return float(gap / smallest) if smallest > 0 else float("inf")

    gaps = np.log(np.geomspace(1e-4, 4 * max(outside, 1.0), 12))  # far outside the ratio only tends to 1
    angles = np.linspace(0, np.pi, 17)
    grid = np.array([[ratio(g, a) for a in angles] for g in gaps])
    best = max(1.0, float(grid.max()))
    for flat in np.argsort(grid, axis=None)[::-1][:2]:
        i, j = np.unravel_index(int(flat), grid.shape)
        refined = minimize(
            lambda x: -ratio(float(np.clip(x[0], -16, 16)), float(x[1])),
            [gaps[i], angles[j]],
            method="Nelder-Mead",
            options={"xatol": 1e-6, "fatol": 1e-9, "maxfev": 150},
        )
        best = max(best, -float(refined.fun))
    return best
