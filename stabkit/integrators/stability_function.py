"""Steps that are no general linear method: exponential ones, and random ones in mean square."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from stabkit.errors import ArgumentError
from stabkit.integrators import rational_polynomials as poly
from stabkit.integrators.general_linear import GeneralLinearMethod
from stabkit.integrators.linear_stability import POINT_TOLERANCE, LinearStability
from stabkit.integrators.spectral_radius import ComplexArray, FloatArray, spectral_radius
from stabkit.integrators.stability_intervals import first_sign_change

# Where a closed-form function is sampled along an axis: evenly at first, then geometrically.
_SAMPLES = np.concatenate([np.linspace(0, 50, 20001)[1:], np.geomspace(50, 1e6, 4001)[1:]])


class StabilityFunction(LinearStability):
    """A one-state step with a closed-form stability function, such as exp(z).

    Args:
        function: ``(z_0, ..., z_{p-1}) -> R``, vectorised.
        n_fields: how many z it takes.
        name: shown in results.
        source: where the function is from.
        order: its order of consistency.
        at_infinity: the limit of |R| as z -> -inf.

    Example:
        >>> exact_flow = StabilityFunction(np.exp, name="exact flow", order=99, at_infinity=0.0)
        >>> exact_flow.real_interval()
        inf
    """

    states = 1

    def __init__(
        self,
        function: Callable[..., npt.NDArray[np.complex128]],
        *,
        n_fields: int = 1,
        name: str = "",
        source: str = "",
        order: int = 0,
        at_infinity: float = math.inf,
    ) -> None:
        self._function, self._fields, self._at_infinity = function, n_fields, at_infinity
        self.name, self.source, self._order = name, source, order

    def __repr__(self) -> str:
        return f"StabilityFunction({self.name!r}, fields={self._fields})"

    @property
    def n_fields(self) -> int:
        """How many z the function takes."""
        return self._fields

    @property
    def order(self) -> int:
        """The order of consistency, as given."""
        return self._order

    def stability_matrix(self, *z: npt.ArrayLike) -> ComplexArray:
        """R(z) as ``(..., 1, 1)``."""
        with np.errstate(over="ignore", invalid="ignore"):
            return np.asarray(self._function(*self._arguments(z)), dtype=complex)[..., None, None]

    def real_interval(self, tolerance: float | None = None) -> float:
        """The largest b with [-b, 0] stable, by sampling to 1e6 and bisection; ``inf`` when nothing fails."""
        return self._sampled_limit(-1.0, tolerance)

    def imaginary_interval(self, tolerance: float | None = None) -> float:
        """The largest b with i[-b, b] stable, by sampling to 1e6 and bisection; ``inf`` when nothing fails."""
        return self._sampled_limit(1j, tolerance)

    def damping_at_infinity(self) -> float:
        """The limit of |R(z)| as z -> -inf."""
        return self._at_infinity

    def _sampled_limit(self, direction: complex, tolerance: float | None) -> float:
        allowed = 1 + max(POINT_TOLERANCE if tolerance is None else tolerance, 4e-16)
        unstable = np.flatnonzero(self.amplification(direction * _SAMPLES) > allowed)
        if not len(unstable):
            return math.inf
        first = int(unstable[0])
        if first == 0:
            return 0.0
        low, high = _SAMPLES[first - 1], _SAMPLES[first]
        for _ in range(60):
            middle = (low + high) / 2
            stable = float(self.amplification(direction * middle)) <= allowed
            low, high = (middle, high) if stable else (low, middle)
        return float(low)


class MeanSquareMethod(LinearStability):
    """A step drawn at random from several methods, judged by the growth of the second moment.

    E[x x^*] is multiplied by sum_k p_k M_k(z) (x) conj(M_k(z)); the amplification is the square root of the spectral
    radius of that matrix. Source: D. J. Higham, SIAM J. Numer. Anal. 38 (2000) 753-769 (mean-square stability).

    Args:
        outcomes: explicit methods with equally many states.
        probabilities: the probabilities of the outcomes, summing to 1.
        name: shown in results.
        source: where the step is from.

    Raises:
        ArgumentError: the numbers differ or the probabilities do not sum to 1.

    Example:
        >>> euler = GeneralLinearMethod([[0]], [[1]], [[1]], [[1]])
        >>> skip = GeneralLinearMethod([[0]], [[1]], [[0]], [[1]])
        >>> MeanSquareMethod([euler, skip], [Fraction(1, 2), Fraction(1, 2)]).real_interval()
        2.0
    """

    def __init__(
        self,
        outcomes: Sequence[GeneralLinearMethod],
        probabilities: Sequence[float | Fraction],
        *,
        name: str = "",
        source: str = "",
    ) -> None:
        if len(outcomes) != len(probabilities) or abs(sum(map(float, probabilities)) - 1) > 1e-12:
            raise ArgumentError(
                f"{len(outcomes)} outcomes with probabilities {list(probabilities)}; "
                "give one probability for each, summing to 1"
            )
        if len({m.states for m in outcomes}) != 1 or not all(m.is_explicit and m.n_fields == 1 for m in outcomes):
            raise ArgumentError("outcomes must be explicit one-field methods with equally many states")
        self.outcomes, self.probabilities = tuple(outcomes), tuple(probabilities)
        self.states = outcomes[0].states
        self.name, self.source = name, source

    def __repr__(self) -> str:
        return f"MeanSquareMethod({self.name!r}, outcomes={len(self.outcomes)})"

    @property
    def n_fields(self) -> int:
        """Always one."""
        return 1

    @property
    def order(self) -> int:
        """The order of the mean step."""
        return 1 if self._mean_is_consistent else 0

    @property
    def _mean_is_consistent(self) -> bool:
        pairs = list(zip(self.probabilities, self.outcomes, strict=True))
        slope = sum(float(p) * float(np.sum(m.B @ m.U)) for p, m in pairs)
        return self.states == 1 and all(m.V[0, 0] == 1 for m in self.outcomes) and abs(slope - 1) < 1e-12

    def stability_matrix(self, *z: npt.ArrayLike) -> ComplexArray:
        """The mean step, sum_k p_k M_k(z), ``(..., r, r)``."""
        return np.asarray(
            sum(float(p) * m.stability_matrix(*z) for p, m in zip(self.probabilities, self.outcomes, strict=True))
        )

    def amplification(self, *z: npt.ArrayLike) -> FloatArray:
        """The growth of the root mean square a step, ``(...)``."""
        total: ComplexArray | float = 0.0
        for p, m in zip(self.probabilities, self.outcomes, strict=True):
            M = m.stability_matrix(*z)
            product = np.einsum("...ij,...kl->...ikjl", M, M.conj())
            total = total + float(p) * product.reshape(*M.shape[:-2], self.states**2, self.states**2)
        return np.sqrt(spectral_radius(np.asarray(total)))

    def is_stable(
        self, *z: npt.ArrayLike, strict: bool = True, tolerance: float = POINT_TOLERANCE
    ) -> npt.NDArray[np.bool_]:
        """Whether the second moment does not grow, ``(...)``; ``strict`` makes no difference here."""
        return np.asarray(self.amplification(*z) <= 1 + tolerance)

    def real_interval(self, tolerance: float | None = None) -> float:
        """The largest b with [-b, 0] stable in mean square, from exact polynomials (one state)."""
        return self._limit(lambda N: [c * (-1) ** k for k, c in enumerate(N)], tolerance)

    def imaginary_interval(self, tolerance: float | None = None) -> float:
        """The largest b with i[-b, b] stable in mean square, from exact polynomials (one state)."""
        return self._limit(None, tolerance)

    def damping_at_infinity(self) -> float:
        """The limit of the growth as z -> -inf."""
        return max(m.damping_at_infinity() for m in self.outcomes)

    def _limit(self, mirror: Callable[[Sequence[Fraction]], list[Fraction]] | None, tolerance: float | None) -> float:
        if self.states != 1:
            raise ArgumentError(f"mean-square intervals need one state, found {self.states}: use amplification(z)")
        margin: poly.Polynomial = [(1 + Fraction(repr(float(tolerance or 0)))) ** 2]
        sizes = margin
        for p, m in zip(self.probabilities, self.outcomes, strict=True):
            N = list(m.characteristic.numerator)
            if mirror is not None:
                parts = [mirror(N)]
            else:  # |N(iy)|^2 is the sum of the squares of its even and its odd part, as polynomials in y
                signed = [c * (-1) ** (k // 2) for k, c in enumerate(N)]
                parts = [[c * (k % 2 == side) for k, c in enumerate(signed)] for side in (0, 1)]
            for part in parts:
                weighted = poly.scale(poly.multiply(part, part), Fraction(p))
                margin = poly.add(margin, poly.scale(weighted, Fraction(-1)))
                sizes = poly.add(sizes, [abs(c) for c in weighted])
        kept = [Fraction(0) if abs(c) <= 4e-15 * s else c for c, s in zip(margin, sizes, strict=False)]
        return first_sign_change(poly.trimmed(kept))
