"""The root locus curve of a method: z(theta) with p(exp(i theta), z) = 0, followed in theta."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from stabkit.integrators.characteristic import Characteristic
from stabkit.integrators.spectral_radius import ComplexArray

_NEWTON_STEPS = 3


@dataclass(frozen=True)
class LocusCurve:
    """One curve of the locus.

    Attributes:
        points: z, complex ``(n,)``, in order of theta; the side where |zeta| < 1 lies to the left.
        theta: the angle of zeta at each point, increasing, ``(n,)``; it may pass several turns.
        closed: whether the curve returns to its first point.
    """

    points: ComplexArray
    theta: npt.NDArray[np.float64]
    closed: bool


def boundary_locus(p: Characteristic, samples: int = 2048) -> tuple[LocusCurve, ...]:
    """All curves of the root locus, by following the roots z as theta runs around the circle.

    Every point is refined until p(exp(i theta), z) = 0 to rounding. Roots at infinity cut a curve.

    Args:
        p: the characteristic polynomial.
        samples: angles in one turn.

    Example:
        >>> from stabkit import integrators
        >>> curve, = boundary_locus(integrators.named("forward_euler").characteristic)
        >>> bool(np.allclose(np.abs(curve.points + 1), 1))
        True
    """
    if p.degree == 0:
        return ()
    theta = np.pi / samples + 2 * np.pi * np.arange(samples) / samples  # off the real points, where roots may meet
    roots = p.roots(np.exp(1j * theta))
    roots = _refined(p, np.exp(1j * theta), roots)
    following = _follow(roots)
    tracks = np.take_along_axis(roots, following[:-1], axis=1)
    return tuple(piece for cycle in _cycles(following[-1]) for piece in _pieces(tracks, theta, cycle))


def locus_tangent(p: Characteristic, theta: npt.NDArray[np.float64], z: ComplexArray) -> ComplexArray:
    """dz/dtheta along the locus, by implicit differentiation; not finite where two roots z meet."""
    k, j = np.arange(p.states + 1), np.arange(p.degree + 1)
    zeta = np.exp(1j * theta)
    in_zeta, in_z = zeta[:, None] ** k, z[:, None] ** j
    slope_zeta = k * zeta[:, None] ** np.maximum(k - 1, 0)
    slope_z = j * z[:, None] ** np.maximum(j - 1, 0)
    by_zeta = np.einsum("nk,kj,nj->n", slope_zeta, p.coefficients, in_z)
    by_z = np.einsum("nk,kj,nj->n", in_zeta, p.coefficients, slope_z)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(-1j * zeta * by_zeta / by_z, dtype=complex)


def locus_point(p: Characteristic, theta: float, near: complex) -> complex:
    """The point of the locus at an angle that lies nearest to a given point."""
    zeta = np.exp(1j * np.array([theta]))
    roots = _refined(p, zeta, p.roots(zeta))[0]
    return complex(roots[np.nanargmin(np.abs(roots - near))])


def _follow(roots: ComplexArray) -> npt.NDArray[np.intp]:
    """For each angle the permutation that continues the tracks of the first; one more row closes the turn."""
    n, degree = roots.shape
    out = np.zeros((n + 1, degree), dtype=np.intp)
    out[0] = np.arange(degree)
    current = roots[0]
    for k in range(1, n + 1):
        target = roots[k % n]
        out[k] = _match(current, target)
        current = target[out[k]]
    return out


def _match(current: ComplexArray, target: ComplexArray) -> npt.NDArray[np.intp]:
    from scipy.optimize import linear_sum_assignment

    if len(current) == 1:
        return np.zeros(1, dtype=np.intp)
    # On the Riemann sphere, so that a root that passes infinity is continued on the other side.
    with np.errstate(invalid="ignore", over="ignore"):
        chord = np.abs(current[:, None] - target[None, :])
        scale = np.sqrt((1 + np.abs(current[:, None]) ** 2) * (1 + np.abs(target[None, :]) ** 2))
        cost = np.nan_to_num(chord / scale, nan=1.0)
    nearest = cost.argmin(axis=1)
    if len(set(nearest.tolist())) == len(current):
        return np.asarray(nearest, dtype=np.intp)
    return np.asarray(linear_sum_assignment(cost)[1], dtype=np.intp)


def _cycles(onward: npt.NDArray[np.intp]) -> list[list[int]]:
    left, out = set(range(len(onward))), []
    while left:
        k = min(left)
        cycle = []
        while k in left:
            left.discard(k)
            cycle.append(k)
            k = int(onward[k])
        out.append(cycle)
    return out


def _pieces(tracks: ComplexArray, theta: npt.NDArray[np.float64], cycle: list[int]) -> list[LocusCurve]:
    z = np.concatenate([tracks[:, k] for k in cycle])
    angle = np.concatenate([theta + 2 * np.pi * turn for turn in range(len(cycle))])
    # A curve through infinity is cut where it is far out and jumps to the other side.
    far = ~np.isfinite(z) | (np.abs(z) > 1e6)
    following = np.roll(z, -1)
    with np.errstate(invalid="ignore"):
        jump = np.abs(following - z) > np.maximum(np.abs(z), np.abs(following)) * 1.2
    jump &= np.minimum(np.abs(z), np.abs(following)) > 20
    if not far.any() and not jump.any():
        return [LocusCurve(z, angle, True)]
    breaks = np.flatnonzero(far | jump)
    order = (np.arange(len(z)) + breaks[0] + 1) % len(z)
    cuts = np.flatnonzero((far | jump)[order]) + 1
    runs = [run[~far[run]] for run in np.split(order, cuts)]
    return [LocusCurve(z[run], angle[run], False) for run in runs if len(run) > 1]


def _refined(p: Characteristic, zeta: ComplexArray, roots: ComplexArray) -> ComplexArray:
    rows = (zeta[:, None] ** np.arange(p.states + 1)) @ p.coefficients  # (n, K + 1)
    z = roots.copy()
    for _ in range(_NEWTON_STEPS):
        value = np.zeros_like(z)
        slope = np.zeros_like(z)
        with np.errstate(all="ignore"):
            for k in range(rows.shape[1] - 1, -1, -1):
                slope = slope * z + value
                value = value * z + rows[:, k : k + 1]
            step = value / slope
        # Where roots meet, Newton's step is unreliable and the eigenvalue is kept.
        usable = np.isfinite(step) & (np.abs(step) < 1e-3 * (1e-3 + np.abs(z)))
        z = np.where(usable, z - np.where(usable, step, 0), z)
    return z
