"""What every step has: its action M(z) on the test problem, and whether powers of it stay bounded."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import numpy.typing as npt

from stabkit.errors import ArgumentError
from stabkit.integrators.characteristic import Characteristic
from stabkit.integrators.regions import Region
from stabkit.integrators.spectral_radius import (
    ComplexArray,
    FloatArray,
    has_defective_unit_eigenvalue,
    spectral_radius,
)

#: How far the spectral radius may exceed 1, for rounding, before a point counts as unstable.
POINT_TOLERANCE = 1e-12
_DOUBTFUL = 1e-6  # a repeated root on the circle moves by about the square root of rounding


class LinearStability(ABC):
    """A step known by its matrix on the test problem y' = lambda y, as a function of z = h lambda."""

    name: str
    source: str
    states: int

    @property
    @abstractmethod
    def order(self) -> int:
        """The order of consistency; 0 when not consistent."""

    @property
    @abstractmethod
    def n_fields(self) -> int:
        """How many fields, and so how many z, the step has."""

    @abstractmethod
    def stability_matrix(self, *z: npt.ArrayLike) -> ComplexArray:
        """M(z), ``(..., r, r)``."""

    @abstractmethod
    def real_interval(self, tolerance: float | None = None) -> float:
        """The largest b with [-b, 0] stable."""

    @abstractmethod
    def imaginary_interval(self, tolerance: float | None = None) -> float:
        """The largest b with i[-b, b] stable."""

    @abstractmethod
    def damping_at_infinity(self) -> float:
        """The limit of the amplification as z -> -inf."""

    @property
    def polynomial(self) -> Characteristic | None:
        """The exact characteristic polynomial p(zeta, z), every field at the same z; None where only values are known.

        Overridden by what has one.
        """
        return None

    def amplification(self, *z: npt.ArrayLike) -> FloatArray:
        """The spectral radius of M(z), ``(...)``."""
        return spectral_radius(self.stability_matrix(*z))

    def is_stable(
        self, *z: npt.ArrayLike, strict: bool = True, tolerance: float = POINT_TOLERANCE
    ) -> npt.NDArray[np.bool_]:
        """Whether the powers of M(z) stay bounded: no eigenvalue outside the unit circle, none on it defective.

        Args:
            *z: complex arrays, one for each field or one for all.
            strict: False asks only that no eigenvalue lies outside.
            tolerance: how far the spectral radius may exceed 1.

        Returns:
            ``(...)``, bool.

        Example:
            >>> from stabkit import integrators
            >>> integrators.named("leapfrog").is_stable([0.5j, 1j, -0.1]).tolist()
            [True, False, False]
        """
        points = np.broadcast_arrays(*(np.asarray(a, dtype=complex) for a in z))
        shape = points[0].shape
        flat = [p.reshape(-1) for p in points]
        radius = self.amplification(*flat)
        out = radius <= 1 + tolerance
        if self.states == 1:
            return out.reshape(shape)
        doubtful = np.flatnonzero(np.abs(radius - 1) <= max(_DOUBTFUL, tolerance))
        if len(doubtful):
            M = self.stability_matrix(*(p[doubtful] for p in flat))
            # Either computation may lose half its digits at a repeated root, but not both in the same place.
            out[doubtful] |= np.abs(np.linalg.eigvals(M)).max(axis=-1) <= 1 + tolerance
            if strict:
                out[doubtful] &= ~has_defective_unit_eigenvalue(M, tolerance)
        return out.reshape(shape)

    def region(self, box: tuple[float, float, float, float] | None = None) -> Region:
        """The stability region: its boundary as curves, area, signed distance.

        Args:
            box: (left, right, bottom, top); chosen from the boundary by default.
        """
        return Region(self, box)

    def _arguments(self, z: tuple[npt.ArrayLike, ...]) -> list[ComplexArray]:
        """One complex array for each field, broadcast together."""
        if len(z) not in (1, self.n_fields):
            raise ArgumentError(
                f"{len(z)} values of z for {self.n_fields} field(s); give one for each field, or one for all"
            )
        arrays = [np.asarray(a, dtype=complex) for a in z] * (self.n_fields if len(z) == 1 else 1)
        return list(np.broadcast_arrays(*arrays))
