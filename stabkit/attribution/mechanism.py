"""Why a step's modes grow or shrink: its spectrum against the stability region of its method."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from stabkit.errors import ArgumentError
from stabkit.integrators import GeneralLinearMethod, Region

ComplexArray = npt.NDArray[np.complex128]
FloatArray = npt.NDArray[np.float64]

TOLERANCE = 1e-4  # how far |R| may exceed 1 by rounding before a mode counts as unstable
_LIMIT = 1 + 1e-10  # |R| that counts as on the boundary
_SMALLEST_FACTOR = 1e-4  # below, the boundary is crossed at the origin
_LARGEST_FACTOR = 1e6  # a step that may grow by more than this may grow without bound
_SCAN = np.concatenate([[0.0], np.geomspace(1e-6, _LARGEST_FACTOR, 600)])
_BISECTIONS = 60


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
class Mechanism:
    """What a step's spectrum says about its growth. Shares are means over samples, extremes are over all of them.

    Attributes:
        step: index of the step.
        name: of the step.
        method: of the step, in words.
        evidence: how sure z is, from ``"proven"`` to ``"unknown"``; ``"convention"`` where only eig(J) was seen and
            z = eig(J) - 1, as if the step were forward Euler.
        energy: shares of sum |lambda|^2, adding up to 1; None where the spectrum is not complete.
        modes: shares of the number of modes, adding up to 1; None where the spectrum is not complete.
        excess: what each mechanism adds to the mean of |lambda|^2 - 1 over the modes; the sum of the four is
            exp(2 spectral) - 1. None where the spectrum is not complete.
        masked: share of coordinates that an activation behind the addition switches off; they are no modes.
        margin: distance from the spectrum to the boundary of the region in the z plane, negative where an eigenvalue
            lies outside; None where there is no region. At most this where the spectrum is not complete.
        largest_step_factor: the largest s for which s' z stays in the region for all z and all s' <= s, so by how much
            the branch could grow; 0 where some mode grows at every step size. None where no method was read. At most
            this where the spectrum is not complete.
        radius: largest |R(z)|.
        complete: whether all eigenvalues were computed.
        tolerance: on |R| and on Re lambda, for rounding.
        damped_below: |R| under which a mode counts as overdamped.
        defect: |J - R(h J_f)|_F / |J|_F for a method with several stages; None where the Jacobian of the field is not
            known (and 0 by definition for one stage).
        notes: what else to know.
        z: ``(samples, k)``, NaN-padded.
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
    notes: tuple[str, ...] = ()
    z: ComplexArray | None = field(default=None, repr=False, compare=False)

    @property
    def dominant(self) -> str | None:
        """The mechanism with the largest share of energy; None where the shares are not known."""
        if self.energy is None:
            return None
        shares = asdict(self.energy)
        return max(shares, key=lambda kind: shares[kind])

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON; z as pairs ``[real, imaginary]``, one list a sample."""
        plain = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "z"}
        for name in ("energy", "modes", "excess"):
            plain[name] = None if plain[name] is None else asdict(plain[name])
        plain["notes"] = list(self.notes)
        rows = [] if self.z is None else [row[np.isfinite(row)] for row in self.z]
        plain["z"] = None if self.z is None else [[[v.real, v.imag] for v in row] for row in rows]
        return plain


def solve_z(method: GeneralLinearMethod, values: ComplexArray) -> ComplexArray:
    """The z at which the method has these eigenvalues: the root of p(value, z) = 0 of least modulus.

    For one stage and one state it is (value - a) / b of R(z) = a + b z. For more, another root may be the true one.

    Example:
        >>> from stabkit import integrators
        >>> solve_z(integrators.named("rk4"), np.array([[1.0 + 0j]])).real.tolist()
        [[0.0]]
    """
    roots = method.characteristic.roots(values)
    size = np.where(np.isfinite(roots), np.abs(roots), np.inf)
    nearest = np.take_along_axis(roots, size.argmin(-1)[..., None], -1)[..., 0]
    nearest[~np.isfinite(values)] = complex(math.nan, math.nan)
    return np.asarray(nearest + 0.0)


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


def region_margin(method: GeneralLinearMethod, z: ComplexArray) -> float:
    """The least distance of z to the boundary of the region, negative outside, by its locus."""
    flat = z[np.isfinite(z)]
    round_region = disc(method)
    if round_region is not None:
        a, b = round_region
        return float(((1 - np.abs(a + b * flat)) / abs(b)).min())
    return float(-_region(method).signed_distance(flat).max())


def largest_step_factor(method: GeneralLinearMethod, z: ComplexArray, tolerance: float = TOLERANCE) -> float:
    """The largest s such that s' z stays in the region for every z and all s' in [0, s]; ``inf`` where none leaves it.

    Closed form where the region is a disc; otherwise the first crossing on a grid of 600 s, refined by bisection.

    Args:
        method: with one field.
        z: complex, any shape; NaN entries do not count.
        tolerance: modes of modulus up to this are neutral, and do not count.

    Raises:
        ArgumentError: ``z`` holds no finite number.

    Example:
        >>> from stabkit import integrators
        >>> euler = integrators.named("forward_euler")
        >>> round(largest_step_factor(euler, np.array([-0.5 + 0j, -1.0])), 6)
        2.0
        >>> largest_step_factor(euler, np.array([0.5j, -0.5j]))
        0.0
    """
    flat = np.unique(z[np.isfinite(z)])
    if not flat.size:
        raise ArgumentError("z holds no finite number; give the eigenvalues of the branch")
    flat = flat[np.abs(flat) > tolerance]
    if not flat.size:
        return math.inf
    round_region = disc(method)
    factor = _first_crossing(method, flat) if round_region is None else _disc_factor(*round_region, flat)
    return 0.0 if factor < _SMALLEST_FACTOR else factor


def _first_crossing(method: GeneralLinearMethod, z: ComplexArray) -> float:
    stable = method.amplification(_SCAN[:, None] * z) <= _LIMIT
    bad = np.flatnonzero(~stable.all(axis=1))
    if not bad.size:
        return math.inf
    if bad[0] == 0:
        return 0.0
    low, high = float(_SCAN[bad[0] - 1]), float(_SCAN[bad[0]])
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        inside = bool((method.amplification(middle * z) <= _LIMIT).all())
        low, high = (middle, high) if inside else (low, middle)
    return low


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


def stage_defect(method: GeneralLinearMethod, J: FloatArray, field_jacobian: FloatArray) -> float:
    """``|J - R(h J_f)|_F / |J|_F``, the largest over samples: how far the stages are from sharing one Jacobian.

    Args:
        method: with one state and one field.
        J: ``(samples, d, d)``, of the step.
        field_jacobian: ``(samples, d, d)``, h J_f.
    """
    p = method.characteristic
    numerator, denominator = (_polynomial(c, field_jacobian) for c in (p.numerator, p.denominator))
    predicted = np.linalg.solve(denominator, numerator)
    size = np.linalg.norm(J, axis=(1, 2))
    return float((np.linalg.norm(J - predicted, axis=(1, 2)) / np.where(size > 0, size, 1.0)).max())


def _polynomial(coefficients: tuple[Any, ...], X: FloatArray) -> FloatArray:
    eye = np.eye(X.shape[-1])
    out = np.zeros_like(X)
    for c in reversed(coefficients):
        out = out @ X + float(c) * eye
    return out
