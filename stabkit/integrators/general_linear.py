"""General linear methods: one object for Runge-Kutta, multistep, splitting and multi-state networks.

One step takes the states x (r of them) to the next states through s stages,

    Y = U x + h A F(Y),        x' = V x + h B F(Y),

and on the test problem F_i(y) = z_i y it is multiplication by M(z) = V + B Z (I - A Z)^-1 U, Z = diag(z_i).
Source: J. C. Butcher, Numerical Methods for Ordinary Differential Equations, 3rd ed. 2016, chapter 5.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from functools import cached_property
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from stabkit.errors import ArgumentError
from stabkit.integrators import monotonicity, order_conditions
from stabkit.integrators.characteristic import Characteristic, characteristic
from stabkit.integrators.evaluation import evaluate
from stabkit.integrators.linear_stability import POINT_TOLERANCE, LinearStability
from stabkit.integrators.rational_matrices import Matrix, matmul
from stabkit.integrators.spectral_radius import ComplexArray, FloatArray, disc_test, root_radius, spectral_radius
from stabkit.integrators.stability_intervals import Axis, AxisInterval, is_A_stable, wedge_angle
from stabkit.integrators.tableau_checks import (
    as_floats,
    block_shapes,
    check_fields,
    check_shapes,
    entries_are_exact,
    entry_is_exact,
    read_block,
    to_fraction,
)

_FLOAT_PRECISION = 4e-15
_ORDER_RESIDUAL = 1e-10
_SERIES_RESIDUAL = 1e-12  # relative to the terms of the series
_SORTED = 1e-9  # a tolerance that the Schur-Cohn test cannot confuse
_MANY = 1000  # points from which the simultaneous iteration beats one eigenvalue call for each point


#: What a block may be given as: nested sequences of ints, fractions, strings or floats, or a 2-D array.
Block: TypeAlias = Sequence[Sequence[Any]] | npt.NDArray[Any]


class Tableau(NamedTuple):
    """The four blocks with exact entries, as lists of lists of ``Fraction``."""

    A: Matrix
    U: Matrix
    B: Matrix
    V: Matrix


class GeneralLinearMethod(LinearStability):
    """The method [[A, U], [B, V]] with s stages and r states.

    Entries may be ints, ``Fraction``, strings such as ``"1/3"``, or floats. When no entry is a float that is not a
    whole number, the tableau is exact and so is everything decided from it; floats are otherwise taken as they are.

    Args:
        A: ``(s, s)``, stage from stage.
        U: ``(s, r)``, stage from state.
        B: ``(r, s)``, state from stage.
        V: ``(r, r)``, state from state.
        fields: the field that each stage evaluates, numbered from 0; all stages the same field by default. Several
            fields make a partitioned or additive method, with one z for each field.
        name: shown in results.
        source: where the coefficients are from.
        declared_order: the order, for methods whose states approximate different quantities (partitioned systems).
        stability_function: exact ``(N, D)`` of R(z) = N(z)/D(z), constant term first, where the tableau is
            irrational and R is not (Gauss, Radau, Lobatto).
        precision: the relative accuracy of the coefficients, when they were published with few digits; by default 0
            for an exact tableau and 4e-15 for floats.

    Raises:
        ArgumentError: the shapes do not fit, an entry is not finite, or ``fields`` has a gap.

    Example:
        >>> heun = GeneralLinearMethod([[0, 0], [1, 0]], [[1], [1]], [["1/2", "1/2"]], [[1]])
        >>> heun.characteristic.numerator
        (Fraction(1, 1), Fraction(1, 1), Fraction(1, 2))
        >>> heun.order, float(heun.real_interval())
        (2, 2.0)
    """

    def __init__(
        self,
        A: Block,
        U: Block,
        B: Block,
        V: Block,
        *,
        fields: Sequence[int] | None = None,
        name: str = "",
        source: str = "",
        declared_order: int | None = None,
        stability_function: tuple[Sequence[Any], Sequence[Any]] | None = None,
        precision: float | None = None,
    ) -> None:
        blocks = {"A": read_block(A, "A"), "U": read_block(U, "U"), "B": read_block(B, "B"), "V": read_block(V, "V")}
        check_shapes(blocks)
        self.is_exact: bool = all(map(entries_are_exact, blocks.values()))
        self.tableau = Tableau(*([[to_fraction(x) for x in row] for row in b] for b in blocks.values()))
        self.stages, self.states = len(blocks["A"]), len(blocks["V"])
        self.A, self.U, self.B, self.V = (
            as_floats(block, shape)
            for block, shape in zip(self.tableau, block_shapes(self.stages, self.states), strict=True)
        )
        self.fields = check_fields(fields, self.stages)
        self.name, self.source, self._declared_order = name, source, declared_order
        self._stability_function = stability_function
        self._given_precision = precision

    def __repr__(self) -> str:
        label = f"{self.name!r}, " if self.name else ""
        several = f", fields={self.n_fields}" if self.n_fields > 1 else ""
        return f"GeneralLinearMethod({label}stages={self.stages}, states={self.states}{several})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, GeneralLinearMethod):
            return NotImplemented
        return self.tableau == other.tableau and self.fields == other.fields

    def __hash__(self) -> int:
        return hash((self.fields, *(tuple(map(tuple, block)) for block in self.tableau)))

    @property
    def n_fields(self) -> int:
        """How many fields, and so how many z, the method has."""
        return max(self.fields, default=0) + 1

    @cached_property
    def is_explicit(self) -> bool:
        """Whether the stages can be computed one after the other."""
        return not np.any(np.triu(self.A))

    @cached_property
    def characteristic(self) -> Characteristic:
        """The exact characteristic polynomial p(zeta, z), every field at the same z."""
        if self._stability_function is not None:
            N, D = ([to_fraction(c) for c in p] for p in self._stability_function)
            return Characteristic((tuple(-c for c in N), tuple(D))).reduced()
        p = characteristic(*self.tableau)
        if self.is_exact or not np.any(np.triu(self.A, 1)):
            return p
        # A rounded singular A (Lobatto) would leave a spurious highest power of z, which decides the limit at infinity.
        # The coefficients of z^j are sums of products of entries from j rows.
        rows = np.concatenate([np.abs(self.A).sum(axis=1), np.abs(self.B).sum(axis=1)])
        return p.without_noise([*np.abs(np.poly(-rows)), *([0.0] * p.degree)])

    @property
    def polynomial(self) -> Characteristic:
        """The characteristic polynomial, as for every `LinearStability`."""
        return self.characteristic

    @property
    def precision(self) -> float:
        """The relative accuracy of the coefficients of the characteristic polynomial; 0 when exact."""
        if self._stability_function is not None:
            return 0.0
        if self._given_precision is not None:
            return self._given_precision
        return 0.0 if self.is_exact else _FLOAT_PRECISION

    # ---------------------------------------------------------------- values

    def stability_matrix(self, *z: npt.ArrayLike) -> ComplexArray:
        """M(z) = V + B Z (I - A Z)^-1 U.

        Args:
            *z: one complex array for each field, broadcast together; one array alone goes to every field.

        Returns:
            ``(..., r, r)``, complex; ``inf`` at a pole.

        Raises:
            ArgumentError: the number of arrays is neither 1 nor the number of fields.
        """
        return evaluate((self.A, self.U, self.B, self.V), self.fields, self._arguments(z))

    def amplification(self, *z: npt.ArrayLike) -> FloatArray:
        """The spectral radius of M(z): |R(z)| for one state.

        Args:
            *z: as in :meth:`stability_matrix`.

        Returns:
            ``(...)``, float; ``inf`` at a pole, the limit at an infinite z.
        """
        points = self._arguments(z)
        if len(z) != 1:
            return spectral_radius(self.stability_matrix(*z))
        flat = points[0].reshape(-1)
        finite = np.isfinite(flat)
        out = np.full(flat.shape, np.nan)
        if not finite.all():
            out[np.isinf(flat)] = self.damping_at_infinity()
        if self.states > 2 and finite.sum() >= _MANY:
            out[finite] = root_radius(self.characteristic.coefficients, flat[finite])
        else:
            out[finite] = spectral_radius(self.stability_matrix(flat[finite]))
        return out.reshape(points[0].shape)

    def is_stable(
        self, *z: npt.ArrayLike, strict: bool = True, tolerance: float = POINT_TOLERANCE
    ) -> npt.NDArray[np.bool_]:
        """Whether the powers of M(z) stay bounded; arguments as in :meth:`LinearStability.is_stable`.

        Many points of a method with several states are sorted by the Schur-Cohn test; only those near the boundary
        need eigenvalues.
        """
        points = np.asarray(z[0], dtype=complex)
        if (
            len(z) != 1
            or self.states <= 2
            or points.size < _MANY
            or tolerance >= _SORTED
            or not np.isfinite(points).all()
        ):
            return super().is_stable(*z, strict=strict, tolerance=tolerance)
        flat = points.reshape(-1)
        verdict = disc_test(self.characteristic.coefficients, flat)
        out = verdict > 0
        close = np.flatnonzero(verdict == 0)
        if len(close):
            out[close] = super().is_stable(flat[close], strict=strict, tolerance=tolerance)
        return np.asarray(out.reshape(points.shape))

    def internal_amplification(self, z: npt.ArrayLike) -> FloatArray:
        """The largest gain from an error in one stage to the result, max_j |Q_j(z)|.

        Source: Ketcheson, Loczi and Parsani, SIAM J. Numer. Anal. 52 (2014).

        Args:
            z: complex, ``(...)``; every field at the same z.

        Returns:
            ``(...)``, float.
        """
        return monotonicity.internal_amplification((self.A, self.U, self.B, self.V), np.asarray(z, dtype=complex))

    # ---------------------------------------------------------------- accuracy

    @cached_property
    def linear_order(self) -> int:
        """The order on y' = lambda y: the principal root agrees with exp(z) up to z^order."""
        return order_conditions.linear_order(self._intended, tolerance=max(_SERIES_RESIDUAL, 10 * self.precision))

    @cached_property
    def order(self) -> int:
        """The order of consistency for nonlinear problems; 0 when not consistent."""
        if self._declared_order is not None:
            return self._declared_order
        found = order_conditions.order(
            (self.A, self.U, self.B, self.V),
            self.fields,
            at_most=self._linear_order_of_sum,
            tolerance=max(_ORDER_RESIDUAL, 10 * self.precision),
        )
        return self.linear_order if found is None else found

    @cached_property
    def _linear_order_of_sum(self) -> int:
        """An upper bound of the order: that on y' = lambda y with lambda split evenly between the fields."""
        if self.n_fields == 1:
            return self.linear_order
        share = Fraction(1, self.n_fields)
        return self.along(*([share] * self.n_fields)).linear_order

    @property
    def is_zero_stable(self) -> bool:
        """Whether the powers of V = M(0) stay bounded."""
        return bool(self.is_stable(0.0))

    # ---------------------------------------------------------------- stability

    def real_interval(self, tolerance: float | None = None) -> float:
        """The largest b with [-b, 0] stable; ``inf`` where true.

        Args:
            tolerance: None gives an :class:`AxisInterval`, a float that also carries ``strict`` and ``within`` (its
                value at tolerance 1e-12); a number gives the value at that tolerance on the spectral radius, 0 the
                strict one.
        """
        return self._interval("real", tolerance)

    def imaginary_interval(self, tolerance: float | None = None) -> float:
        """The largest b with i[-b, b] stable; ``inf`` where true. Arguments as in :meth:`real_interval`."""
        return self._interval("imaginary", tolerance)

    def _interval(self, axis: Axis, tolerance: float | None) -> float:
        if axis not in self._axis_intervals:  # each is exact arithmetic of some milliseconds
            self._axis_intervals[axis] = AxisInterval(self.characteristic, axis, precision=self.precision)
        found = self._axis_intervals[axis]
        return found if tolerance is None else found.at(tolerance)

    @cached_property
    def _axis_intervals(self) -> dict[Axis, AxisInterval]:
        return {}

    @cached_property
    def is_A_stable(self) -> bool:
        """Whether the whole left half plane is stable."""
        return is_A_stable(self._intended, self.imaginary_interval())

    @property
    def is_L_stable(self) -> bool:
        """Whether the method is A-stable and damps infinitely stiff modes completely."""
        return self.is_A_stable and self.damping_at_infinity() <= 1e-7

    def alpha(self) -> float:
        """The largest angle, in degrees, with the wedge |arg(-z)| < alpha stable: 90 when A-stable, 0 when none."""
        return self._alpha

    @cached_property
    def _alpha(self) -> float:
        return 90.0 if self.is_A_stable else wedge_angle(self._intended, self.real_interval())

    def damping_at_infinity(self) -> float:
        """The limit of the spectral radius as |z| -> inf; ``inf`` for explicit methods that do not ignore z."""
        return self._intended.at_infinity()

    @cached_property
    def _intended(self) -> Characteristic:
        return self.characteristic.recognised() if self.precision else self.characteristic

    def ssp_coefficient(self) -> float:
        """The strong-stability-preserving coefficient: steps up to C times the Euler limit keep convex bounds.

        Source: Kraaijevanger, BIT 31 (1991); Spijker, SIAM J. Numer. Anal. 45 (2007) for several states.
        """
        return self._ssp

    @cached_property
    def _ssp(self) -> float:
        return monotonicity.ssp_coefficient(*self.tableau, exact=self.is_exact)

    # ---------------------------------------------------------------- new methods from this one

    def along(self, *factors: Any) -> GeneralLinearMethod:
        """The one-field method that sees field j at z_j = factors[j] * z.

        Args:
            *factors: one real number for each field.

        Raises:
            ArgumentError: the number of factors is not the number of fields.

        Example:
            >>> imex = GeneralLinearMethod([[1, 0], [1, 0]], [[1], [1]], [[1, 1]], [[1]], fields=[1, 0])
            >>> float(imex.along(0, 1).real_interval())
            inf
        """
        if len(factors) != self.n_fields:
            raise ArgumentError(f"{len(factors)} factors for {self.n_fields} fields; give one number for each field")
        columns = [factors[f] for f in self.fields]
        return self._with_columns(columns, fields=(0,) * self.stages)

    def scaled(self, h: Any) -> GeneralLinearMethod:
        """The same method with every field multiplied by h: M(z) becomes M(h z)."""
        return self._with_columns([h] * self.stages, fields=self.fields)

    def on_field(self, field: int) -> GeneralLinearMethod:
        """The same one-field method as a part of a method with several fields: its stages evaluate this field.

        Args:
            field: the number of the field; M then ignores the z of the others.

        Raises:
            ArgumentError: the method has several fields already.
        """
        if self.n_fields != 1:
            raise ArgumentError(f"the method has {self.n_fields} fields; only a one-field method can be moved")
        return from_tableau(
            self.tableau, exact=self.is_exact, fields=(field,) * self.stages, name=self.name, source=self.source
        )

    def _with_columns(self, factors: Sequence[Any], fields: Sequence[int]) -> GeneralLinearMethod:
        exact = self.is_exact and all(map(entry_is_exact, factors))
        columns = [to_fraction(c) for c in factors]
        A, B = (
            [[a * c for a, c in zip(row, columns, strict=True)] for row in block]
            for block in (self.tableau.A, self.tableau.B)
        )
        tableau = Tableau(A, self.tableau.U, B, self.tableau.V)
        return from_tableau(tableau, exact=exact, fields=fields, name=self.name, source=self.source)

    def then(self, other: GeneralLinearMethod, *, name: str = "", source: str = "") -> GeneralLinearMethod:
        """One step of this method followed by one of the other: M = M_other M_self.

        Args:
            other: a method with the same number of states; its fields keep their numbers.
            name: the name of the composition.
            source: where the composition is from.

        Raises:
            ArgumentError: the numbers of states differ.
        """
        if other.states != self.states:
            raise ArgumentError(
                f"the first method has {self.states} states and the second {other.states}; "
                "only methods with equally many states compose"
            )
        first, second = self.tableau, other.tableau
        zeros = [Fraction(0)] * other.stages
        carried = matmul(second.U, first.B) if first.A and second.A else [[] for _ in second.A]
        A = [[*row, *zeros] for row in first.A]
        A += [[*c, *row] for c, row in zip(carried, second.A, strict=True)]
        B = [[*c, *row] for c, row in zip(matmul(second.V, first.B), second.B, strict=True)]
        return from_tableau(
            Tableau(A, [*first.U, *matmul(second.U, first.V)], B, matmul(second.V, first.V)),
            exact=self.is_exact and other.is_exact,
            fields=self.fields + other.fields,
            name=name,
            source=source,
        )


def from_tableau(
    tableau: Tableau, *, exact: bool, fields: Sequence[int] | None = None, name: str = "", source: str = ""
) -> GeneralLinearMethod:
    """A method from entries already turned into fractions.

    Args:
        tableau: the four blocks.
        exact: whether the entries are exact, and not rounded floats turned into fractions.
        fields: the field of each stage.
        name: shown in results.
        source: where the coefficients are from.
    """
    method = GeneralLinearMethod(*tableau, fields=fields, name=name, source=source)
    method.is_exact = exact
    return method
