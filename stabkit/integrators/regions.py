"""Stability regions in the complex plane: boundary curves, area, signed distance, order stars.

Two routes to the boundary. The locus: the z at which p(exp(i theta), z) = 0, followed in theta, of which the parts
with spectral radius 1 bound the region. The level set: where the amplification crosses 1 on a grid, each crossing
then refined; it needs nothing but amplification(z). Sources: E. Hairer, G. Wanner, Solving Ordinary Differential
Equations II, 2nd ed. 1996, IV.2 (regions), IV.4 (order stars), V.1 (root locus curves).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import numpy.typing as npt

from stabkit.errors import ArgumentError
from stabkit.integrators.characteristic import Characteristic
from stabkit.integrators.level_sets import level_set
from stabkit.integrators.locus import LocusCurve, boundary_locus, locus_point, locus_tangent
from stabkit.integrators.spectral_radius import ComplexArray, FloatArray

Box = tuple[float, float, float, float]

_ON_BOUNDARY = 1e-11
_BISECTIONS = 40
_DEFAULT_BOX: Box = (-6.0, 6.0, -6.0, 6.0)
_LARGEST = 1e4  # curves that run further out than this leave the picture
_FAR = 1e3
_LOCUS_DEGREE = 16  # beyond this degree in z the power basis is too ill-conditioned for the locus


class Amplifying(Protocol):
    """What a region needs to know of a method; every `LinearStability` is one."""

    @property
    def polynomial(self) -> Characteristic | None:
        """The exact characteristic polynomial p(zeta, z); None for steps known by their values only."""

    def amplification(self, *z: npt.ArrayLike) -> FloatArray:
        """The spectral radius of M(z), ``(...)``."""

    def is_stable(self, *z: npt.ArrayLike) -> npt.NDArray[np.bool_]:
        """Whether the powers of M(z) stay bounded, ``(...)`` bool."""

    def damping_at_infinity(self) -> float:
        """The limit of the amplification as z -> -inf."""

    def real_interval(self) -> float:
        """The largest b with [-b, 0] stable."""

    def imaginary_interval(self) -> float:
        """The largest b with i[-b, b] stable."""


@dataclass(frozen=True)
class Curve:
    """One piece of the boundary.

    Attributes:
        points: complex, ``(n,)``, in order; the region lies to the left.
        closed: whether the last point joins the first.
        tangents: dz for a step to the next angle of the locus, ``(n,)``; None for a level set.
    """

    points: ComplexArray
    closed: bool
    tangents: ComplexArray | None = None


class Region:
    """The set of z at which the powers of M(z) stay bounded.

    Args:
        method: the method.
        box: (left, right, bottom, top) to look at; chosen from the boundary by default.

    Example:
        >>> from stabkit import integrators
        >>> euler = integrators.named("forward_euler").region()
        >>> round(euler.area, 9), round(float(euler.signed_distance(-1.0)), 9)
        (3.141592654, -1.0)
    """

    def __init__(self, method: Amplifying, box: Box | None = None) -> None:
        self.method = method
        self._box = None if box is None else _checked_box(box)

    def __repr__(self) -> str:
        return f"Region({self.method!r}, box={self.box})"

    def contains(self, z: npt.ArrayLike) -> npt.NDArray[np.bool_]:
        """Whether each point is stable, ``(...)`` bool."""
        return self.method.is_stable(z)

    @cached_property
    def is_bounded(self) -> bool:
        """Whether the region has no part at infinity."""
        return self.method.damping_at_infinity() > 1 + _ON_BOUNDARY

    @cached_property
    def locus(self) -> tuple[LocusCurve, ...]:
        """The whole root locus curve, also where another root is outside the circle; empty for other steps."""
        return boundary_locus(self._polynomial) if self._polynomial is not None else ()

    @cached_property
    def _polynomial(self) -> Characteristic | None:
        p = self.method.polynomial
        return p if p is not None and p.degree <= _LOCUS_DEGREE else None

    @cached_property
    def curves(self) -> tuple[Curve, ...]:
        """The boundary, ``|spectral radius - 1| < 1e-10`` at every point.

        From the locus for general linear methods, else from the level set in the box.
        """
        p = self._polynomial
        if p is None:
            return self.level_curves()
        return tuple(piece for curve in self.locus for piece in self._boundary_parts(p, curve))

    def level_curves(self, resolution: int = 400) -> tuple[Curve, ...]:
        """The boundary inside the box from the sign changes of amplification - 1 on a grid.

        Args:
            resolution: grid cells along each side; features thinner than a cell are missed.
        """
        pieces = level_set(lambda z: self.method.amplification(z) - 1, self.box, resolution)
        return tuple(Curve(points, closed) for points, closed in pieces)

    @property
    def box(self) -> Box:
        """(left, right, bottom, top) that shows the boundary with a margin."""
        return self._box if self._box is not None else self._automatic_box

    @cached_property
    def _automatic_box(self) -> Box:
        if self._polynomial is None:
            return self._box_from_axes()
        points = [c.points for c in self.curves]
        everything = np.concatenate(points) if points else np.zeros(0, dtype=complex)
        near = everything[np.abs(everything) < _LARGEST]
        if not near.size:
            return _DEFAULT_BOX
        if near.size < everything.size or np.abs(near).max() > _FAR:  # runs off to infinity, as the trapezoid's axis
            near = near[np.abs(near) <= 8]
        return _with_margin(near) if near.size else _DEFAULT_BOX

    def _box_from_axes(self) -> Box:
        real, imaginary = self.method.real_interval(), self.method.imaginary_interval()
        if math.isinf(real):
            return _DEFAULT_BOX
        height = max(1.5, 1.3 * imaginary if math.isfinite(imaginary) else 0.0)
        # Stabilised methods reach far out on the real axis and are about as high as the square root of that.
        height = max(height, 1.5 * math.sqrt(real))
        return (-1.1 * real - 0.2, 0.1 * real + 0.5, -height, height)

    def _boundary_parts(self, p: Characteristic, curve: LocusCurve) -> list[Curve]:
        """The parts of a locus curve where no other root is outside, cut exactly at the corners."""
        z, theta = curve.points, curve.theta
        if p.states == 1:
            return [Curve(z, curve.closed, locus_tangent(p, theta, z))]
        on = self.method.amplification(z) <= 1 + _ON_BOUNDARY
        if on.all():
            return [Curve(z, curve.closed, locus_tangent(p, theta, z))]
        if not on.any():
            return []
        if curve.closed:  # start at a point off the boundary, so that no part is split
            first = int(np.flatnonzero(~on)[0])
            turn = 2 * np.pi * round((theta[-1] - theta[0]) / (2 * np.pi))
            z, on = np.roll(z, -first), np.roll(on, -first)
            theta = np.concatenate([theta[first:], theta[:first] + turn])
        out = []
        for run in np.split(np.arange(len(on)), np.flatnonzero(np.diff(on.astype(int))) + 1):
            if not on[run[0]]:
                continue
            ends = [self._corner(p, z, theta, int(run[0]), -1), self._corner(p, z, theta, int(run[-1]), 1)]
            points = np.concatenate([ends[0][0], z[run], ends[1][0]])
            angles = np.concatenate([ends[0][1], theta[run], ends[1][1]])
            if len(points) > 1:
                out.append(Curve(points, False, locus_tangent(p, angles, points)))
        return out

    def _corner(
        self, p: Characteristic, z: ComplexArray, theta: FloatArray, k: int, side: int
    ) -> tuple[ComplexArray, FloatArray]:
        """The point between sample k and its neighbour where another root reaches the circle, as arrays of 0 or 1."""
        other = (k + side) % len(z)
        low, high = float(theta[k]), float(theta[k]) + side * abs(float(theta[1] - theta[0]))
        point = complex(z[k])
        if abs(z[other] - z[k]) > 1:  # the end of a curve that ran to infinity
            return z[:0], theta[:0]
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            candidate = locus_point(p, middle, point)
            if float(self.method.amplification(candidate)) <= 1 + _ON_BOUNDARY:
                low, point = middle, candidate
            else:
                high = middle
        return np.array([point]), np.array([low])

    @cached_property
    def area(self) -> float:
        """The area of the region; ``inf`` when it is unbounded.

        Green's theorem, with cubics between boundary points of the locus (relative error about 1e-9), or with chords
        between those of a fine level set (about 1e-5).
        """
        if not self.is_bounded:
            return math.inf
        curves = self.curves if self._polynomial is not None else self.level_curves(1000)
        return abs(sum(_enclosed(curve) for curve in curves))

    def signed_distance(self, z: npt.ArrayLike) -> FloatArray:
        """The distance to the boundary, negative inside the region.

        Args:
            z: complex, ``(...)``.

        Returns:
            ``(...)``; ``-inf`` or ``inf`` when the region has no boundary. Refined on the locus to about 1e-9; from a
            level set, to the square of its spacing.
        """
        points = np.asarray(z, dtype=complex)
        flat = points.reshape(-1)
        sign = np.where(self.contains(flat), -1.0, 1.0)
        distance = _distance_to_curves(self.curves, flat)
        return (sign * distance).reshape(points.shape)


def order_star(method: Amplifying, z: npt.ArrayLike) -> FloatArray:
    """|R(z)| / |exp(z)|: the order star is the set where it exceeds 1.

    For several states the spectral radius stands for |R|. Source: G. Wanner, E. Hairer, S. P. Norsett, BIT 18 (1978)
    475-489.

    Args:
        method: the method.
        z: complex, ``(...)``.

    Returns:
        ``(...)``, positive.

    Example:
        >>> from stabkit import integrators
        >>> bool(order_star(integrators.named("forward_euler"), 0.1) < 1)
        True
    """
    points = np.asarray(z, dtype=complex)
    with np.errstate(over="ignore"):
        return np.asarray(method.amplification(points) * np.exp(-points.real))


def _enclosed(curve: Curve) -> float:
    """The integral of (x dy - y dx) / 2 along a curve, each piece a cubic with the given tangents."""

    def cross(a: ComplexArray, b: ComplexArray) -> FloatArray:
        return np.asarray((a.conj() * b).imag)

    close = slice(None) if curve.closed else slice(None, -1)
    a, b = curve.points[close], np.roll(curve.points, -1)[close]
    chords = cross(a, b) / 2
    if curve.tangents is None:
        return float(chords.sum())
    first, last = curve.tangents[close], np.roll(curve.tangents, -1)[close]
    # The tangents are known up to one positive factor, the step in theta; the chord fixes it.
    with np.errstate(all="ignore"):
        step = np.abs(b - a) / np.abs((first + last) / 2)
        p, q = a + step * first / 3, b - step * last / 3
        cubic = (
            6 * cross(a, p) + 3 * cross(a, q) + cross(a, b) + 3 * cross(p, q) + 3 * cross(p, b) + 6 * cross(q, b)
        ) / 20
        bend = np.abs(first / last - 1)
    # At a cusp or a saddle of the locus the tangents are no guide.
    return float(np.where(np.isfinite(cubic) & (bend < 0.5), cubic, chords).sum())


def _checked_box(box: Sequence[float]) -> Box:
    left, right, bottom, top = (float(x) for x in box)
    if not (left < right and bottom < top):
        raise ArgumentError(
            f"box={tuple(box)} is empty; give (left, right, bottom, top) with left < right, bottom < top"
        )
    return left, right, bottom, top


def _with_margin(points: ComplexArray) -> Box:
    left, right = float(points.real.min()), float(points.real.max())
    bottom, top = float(points.imag.min()), float(points.imag.max())
    margin = 0.1 * max(right - left, top - bottom, 1e-3)
    return left - margin, right + margin, bottom - margin, top + margin


def _distance_to_curves(curves: Sequence[Curve], z: ComplexArray) -> FloatArray:
    """The distance to the nearest point of parabolas through neighbouring boundary points."""
    from scipy.spatial import cKDTree

    best = np.full(z.shape, np.inf)
    for curve in curves:
        points = curve.points
        if len(points) < 2:
            continue
        tree = cKDTree(np.column_stack([points.real, points.imag]))
        _, nearest = tree.query(np.column_stack([z.real, z.imag]))
        n = len(points)
        for k in (nearest - 1, nearest, nearest + 1):  # the true foot may lie beyond the neighbouring point
            k = k % n if curve.closed else np.clip(k, 1, max(n - 2, 1))
            a, b, c = points[(k - 1) % n], points[k % n], points[(k + 1) % n]
            best = np.minimum(best, _distance_to_parabola(a, b, c, z))
    return best


def _distance_to_parabola(a: ComplexArray, b: ComplexArray, c: ComplexArray, z: ComplexArray) -> FloatArray:
    """The distance to the quadratic curve through a, b, c at parameters -1, 0, 1."""
    slope, bend = (c - a) / 2, (a + c) / 2 - b
    t = np.zeros(z.shape)
    for _ in range(6):
        gap = b + t * (slope + t * bend) - z
        tangent = slope + 2 * t * bend
        convexity = np.abs(tangent) ** 2 + 2 * (gap * bend.conj()).real
        step = (gap * tangent.conj()).real / np.where(convexity > 0, convexity, np.inf)
        t = np.clip(t - step, -1, 1)
    return np.asarray(np.abs(b + t * (slope + t * bend) - z))
