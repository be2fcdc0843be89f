"""Why a step's modes grow or shrink: its spectrum against the stability region of its method."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from stabkit.arguments import accepts
from stabkit.errors import ArgumentError
from stabkit.integrators import GeneralLinearMethod, Region
from stabkit.results import Result

ComplexArray = npt.NDArray[np.complex128]
FloatArray = npt.NDArray[np.float64]

TOLERANCE = 1e-4  # how far |R| may exceed 1 by rounding before a mode counts as unstable
_LIMIT = 1 + 1e-10  # |R| that counts as on the boundary
_LEAVING = 1 + 1e-13  # |R| that counts as beyond it near the origin, where |R| - 1 may be of high order
_SMALLEST_FACTOR = 1e-4  # below, the boundary is crossed at the origin
_SMALLEST_Z = 2e-3  # likewise, where |R| - 1 is of fourth order in z
_LARGEST_FACTOR = 1e6  # a step that may grow by more than this may grow without bound
_SCAN = np.concatenate([[0.0], np.geomspace(1e-6, _LARGEST_FACTOR, 600)])
_BISECTIONS = 60
_MODES_AT_A_TIME = 64  # of a scan: 40,000 points, so that memory stays small


@dataclass(frozen=True)
class Shares:
    """One number for each mechanism.

    Attributes:
        continuous: modes that grow in the continuous system too (Re lambda > 0).
        discretisation: modes that the continuous system does not amplify and the step does: its size is too large for
            the region of its method.
        overdamped: modes deep inside the region, which the step extinguishes.
        neutral: the rest, which the step carries on about as they are.
    """

    continuous: float
    discretisation: float
    overdamped: float
    neutral: float

    @property
    def unstable(self) -> float:
        """Continuous and discretisation together."""
        return self.continuous + self.discretisation


@dataclass(frozen=True)
class Mechanism(Result):
    """What a step's spectrum says about its growth. Shares are means over samples, extremes are over all of them.

    Attributes:
        step: index of the step.
        name: the name of the step.
        method: the method of the step, in words.
        evidence: how sure z is, from ``"proven"`` to ``"unknown"``; ``"convention"`` where only eig(J) was seen and
            z = eig(J) - 1, as if the step were forward Euler.
        energy: shares of sum |lambda|^2, adding up to 1; None where the spectrum is not complete.
        modes: shares of the number of modes, adding up to 1; None where the spectrum is not complete.
        excess: what each mechanism adds to the mean of |lambda|^2 - 1 over the modes; the sum of the four is
            exp(2 spectral) - 1. None where the spectrum is not complete.
        masked: share of coordinates that an activation behind the addition switches off; they are no modes.
        margin: distance from the spectrum to the boundary of the region in the z plane, negative where an eigenvalue
            lies outside; None where there is no region. At most this where the spectrum is not complete.
        largest_step_factor: the largest s for which s' z stays in the region for all s' <= s and all z but those of
            modes that the field itself amplifies (the continuous share), which no step size helps: below 1 the step is
            too long by this factor. 0 where modes leave the region at every step size, as on the imaginary axis under
            forward Euler. None where no method was read, or no mode is left. At most this where the spectrum is not
            complete.
        radius: largest |R(z)|.
        complete: whether all eigenvalues were computed.
        tolerance: on |R| and on Re lambda, for rounding.
        damped_below: |R| under which a mode counts as overdamped.
        defect: |J - R(h J_f)|_F / |J|_F, J_f the mean over the stages: how far the prediction of the stability function
            is from the step; 0 by definition for one stage. None where the field is not known, or there are several
            states.
        spread: by how much of its norm J_f changes between the stages of a step; None for one stage.
        commutator: |[F, G]|_F / (|F|_F |G|_F) of a splitting's fields, 0 where they share modes; None for one field.
        notes: what else to know.
        z: ``(samples, k)``, h eig(J_f), NaN-padded; of several fields the sum.
        field_z: one such array for each field, the z of a mode at one place; None where z comes from eig(J), exact for
            one stage.
    """

    step: int
    name: str
    method: str
    evidence: str
    energy: Shares | None = None
    modes: Shares | None = None
    excess: Shares | None = None
    masked: float = 0.0
    margin: float | None = None
    largest_step_factor: float | None = None
    radius: float | None = None
    complete: bool = False
    tolerance: float = TOLERANCE
    damped_below: float = 0.5
    defect: float | None = None
    spread: float | None = None
    commutator: float | None = None
    notes: tuple[str, ...] = ()
    z: ComplexArray | None = field(default=None, repr=False, compare=False)
    field_z: tuple[ComplexArray, ...] | None = field(default=None, repr=False, compare=False)

    @property
    def dominant(self) -> str | None:
        """The mechanism with the largest share of energy; None where the shares are not known."""
        if self.energy is None:
            return None
        shares = asdict(self.energy)
        return max(shares, key=lambda kind: shares[kind])

    def _contents(self) -> dict[str, Any]:
        z = None if self.z is None else _finite(self.z)
        return {
            **super()._contents(),
            "z": z,
            "field_z": None if self.field_z is None else [*map(_finite, self.field_z)],
        }


def _finite(z: ComplexArray) -> list[ComplexArray]:
    """Those of each sample that are known."""
    return [row[np.isfinite(row)] for row in z]


def is_inverted(method: GeneralLinearMethod) -> bool:
    """Whether an eigenvalue of the step tells z: one field, and a characteristic polynomial of degree 1 in z.

    So it is for one stage of one state (R(z) = a + b z), and for momentum and two-step methods. Elsewhere R(z) = mu has
    several roots, each of which agrees with the step, and only the field knows the true one.
    """
    p = method.characteristic
    return method.n_fields == 1 and p.degree == 1 and (method.states > 1 or len(p.denominator) == 1)


def z_of_one_stage(method: GeneralLinearMethod, values: ComplexArray) -> ComplexArray:
    """The z at which a method that `is_inverted` has these eigenvalues: (value - a) / b for R(z) = a + b z.

    Example:
        >>> from stabkit import integrators
        >>> z_of_one_stage(integrators.named("forward_euler"), np.array([[0.5 + 0j]])).real.tolist()
        [[-0.5]]
    """
    z = method.characteristic.roots(values)[..., 0]
    z[~np.isfinite(values)] = complex(math.nan, math.nan)
    return np.asarray(z + 0.0)


def disc(method: GeneralLinearMethod) -> tuple[float, float] | None:
    """``(a, b)`` of R(z) = a + b z, whose region is a disc; None for other methods."""
    if method.states != 1 or method.n_fields != 1 or method.characteristic.degree != 1:
        return None
    if len(method.characteristic.denominator) != 1:
        return None
    a, b = method.characteristic.coefficients[0]
    return -float(a), -float(b)


def shares(
    values: ComplexArray, growing: npt.NDArray[np.bool_], tolerance: float, damped_below: float, size: int
) -> tuple[Shares, Shares, Shares]:
    """Energy, modes and excess of each mechanism.

    Args:
        values: ``(samples, k)``, R(z) of all modes, NaN where there is none.
        growing: ``(samples, k)``, whether the continuous system amplifies the mode.
        tolerance: on the modulus.
        damped_below: modulus under which a mode counts as overdamped.
        size: number of coordinates, masked ones included.
    """
    known = np.isfinite(values).any(1)  # a sample without modes has no shares
    modulus, growing = np.abs(values[known]), growing[known]
    there = np.isfinite(modulus)
    unstable = there & (modulus > 1 + tolerance)
    damped = there & (modulus < damped_below)
    classes = {
        "continuous": unstable & growing,
        "discretisation": unstable & ~growing,
        "overdamped": damped,
        "neutral": there & ~unstable & ~damped,
    }
    square = np.where(there, modulus, 0.0) ** 2
    energy = {k: _mean_share(square, c) for k, c in classes.items()}
    modes = {k: _mean_share(there.astype(float), c) for k, c in classes.items()}
    excess = {k: float(((square - 1) * c).sum(1).mean() / size) for k, c in classes.items()}
    return Shares(**energy), Shares(**modes), Shares(**excess)


def _mean_share(weights: FloatArray, chosen: npt.NDArray[np.bool_]) -> float:
    """Mean over samples of the chosen weight; modes without any energy count by their number."""
    total = weights.sum(1, keepdims=True)
    weights = np.where(total > 0, weights, 1.0)
    share = (weights * chosen).sum(1) / weights.sum(1)
    return float(share.mean())


@lru_cache(maxsize=64)
def _region(method: GeneralLinearMethod) -> Region:
    return method.region()


def region_margin(method: GeneralLinearMethod, *z: ComplexArray) -> float:
    """The least distance of z to the boundary of the region, negative outside.

    For one field by the region's locus. For several, whose region lies in a space of more dimensions, along the line
    from the origin through the z of a mode.
    """
    if len(z) > 1:
        return _margin_along_rays(method, z)
    flat = z[0][np.isfinite(z[0])]
    round_region = disc(method)
    if round_region is not None:
        a, b = round_region
        return float(((1 - np.abs(a + b * flat)) / abs(b)).min())
    return float(-_region(method).signed_distance(flat).max())


def _margin_along_rays(method: GeneralLinearMethod, z: tuple[ComplexArray, ...]) -> float:
    points = np.stack([np.ravel(field) for field in z])
    points = points[:, np.isfinite(points).all(0)]
    lengths = np.linalg.norm(points, axis=0)
    factors = _crossings(method, points)
    reach = np.where(np.isfinite(factors), factors, _LARGEST_FACTOR)
    return float(((reach - 1) * lengths).min())


@accepts
def largest_step_factor(
    method: GeneralLinearMethod,
    *z: ComplexArray,
    tolerance: float = TOLERANCE,
    growing: npt.NDArray[np.bool_] | None = None,
) -> float | None:
    """The largest s such that s' z stays in the region for every z and all s' in [0, s]; ``inf`` where none leaves it.

    Closed form where the region is a disc; otherwise the first crossing on a grid of 600 s, refined by bisection.

    Args:
        method: with a field for each z.
        *z: complex, any shape, the same for every field; NaN entries do not count.
        tolerance: modes of modulus up to this are neutral, and do not count.
        growing: modes that the field itself amplifies, in the shape of z: no step helps them, and they do not count.

    Returns:
        None when no mode is left; 0 where some mode leaves the region at every step: those of the imaginary axis under
        a method that is stable on no part of it.

    Raises:
        ArgumentError: ``z`` holds no finite number.

    Example:
        >>> from stabkit import integrators
        >>> euler = integrators.named("forward_euler")
        >>> round(largest_step_factor(euler, np.array([-0.5 + 0j, -1.0])), 6)
        2.0
        >>> largest_step_factor(euler, np.array([0.5j, -0.5j]))
        0.0
        >>> round(largest_step_factor(integrators.named("rk4"), np.array([-3.0 + 0j])), 3)
        0.928
    """
    points = np.stack([np.ravel(field) for field in z])
    finite = np.isfinite(points).all(0)
    if not finite.any():
        raise ArgumentError("z holds no finite number; give the eigenvalues of the branch")
    moving = finite & (np.abs(points).max(0) > tolerance)
    if not moving.any():
        return math.inf
    if growing is not None:
        moving &= ~np.ravel(growing)
    if not moving.any():
        return None
    points = np.unique(points[:, moving], axis=1)
    round_region = disc(method) if len(z) == 1 else None
    factor = _first_crossing(method, points) if round_region is None else _disc_factor(*round_region, points[0])
    at_origin = factor < _SMALLEST_FACTOR or (round_region is None and factor * np.abs(points).max() < _SMALLEST_Z)
    return 0.0 if at_origin else factor


def _first_crossing(method: GeneralLinearMethod, points: ComplexArray) -> float:
    """The first s at which a mode leaves the region; ``points`` is ``(fields, modes)``."""

    def stable(s: FloatArray | float) -> npt.NDArray[np.bool_]:
        return np.asarray(_within(method, np.multiply.outer(points, np.asarray(s))).all(axis=0))

    bad = np.flatnonzero(~stable(_SCAN))
    if not bad.size:
        return math.inf
    if bad[0] == 0:
        return 0.0
    low, high = float(_SCAN[bad[0] - 1]), float(_SCAN[bad[0]])
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if bool(stable(middle)) else (low, middle)
    return low


def _within(method: GeneralLinearMethod, z: ComplexArray) -> npt.NDArray[np.bool_]:
    """Whether modes lie in the region; ``z`` is ``(fields, ...)``."""
    limit = np.where(np.abs(z).max(axis=0) < 0.1, _LEAVING, _LIMIT)
    return np.asarray(method.amplification(*z) <= limit)


def _crossings(method: GeneralLinearMethod, points: ComplexArray) -> FloatArray:
    """The first s at which each mode by itself leaves the region, as `_first_crossing`, for all modes at a time."""
    found = np.full(points.shape[1], np.inf)
    for start in range(0, points.shape[1], _MODES_AT_A_TIME):
        some = points[:, start : start + _MODES_AT_A_TIME]
        bad = ~_within(method, some[:, :, None] * _SCAN)
        first = bad.argmax(axis=1)
        leaves = np.flatnonzero(bad.any(axis=1) & (first > 0))
        factors = np.where(bad[:, 0], 0.0, np.inf)
        low, high = _SCAN[first[leaves] - 1], _SCAN[first[leaves]]
        for _ in range(_BISECTIONS if leaves.size else 0):
            middle = (low + high) / 2
            inside = _within(method, some[:, leaves] * middle)
            low, high = np.where(inside, middle, low), np.where(inside, high, middle)
        factors[leaves] = low
        found[start : start + _MODES_AT_A_TIME] = factors
    return found


def _disc_factor(a: float, b: float, z: ComplexArray) -> float:
    """The largest s with |a + b s z| <= 1 for all z, from a quadratic in s."""
    if abs(a) > _LIMIT:
        return 0.0
    w = b * z
    slope, square, room = a * w.real, np.abs(w) ** 2, max(1 - a * a, 0.0)
    root = np.sqrt(slope * slope + square * room)
    # the positive root, in the form without cancellation
    with np.errstate(divide="ignore", invalid="ignore"):
        factor = np.where(slope > 0, room / (slope + root), (root - slope) / square)
    return float(factor.min())
