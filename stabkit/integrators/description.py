"""Everything the package can say about a method, in one record."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from stabkit.integrators.general_linear import GeneralLinearMethod
from stabkit.integrators.linear_stability import LinearStability
from stabkit.integrators.stability_intervals import AxisInterval
from stabkit.results import Result


@dataclass(frozen=True)
class MethodDescription(Result):
    """The properties of a method; None where a property does not apply to its kind.

    Attributes:
        name: its name.
        source: where it is from.
        stages: how many stages, s.
        states: how many states, r.
        fields: how many fields; the intervals below then hold with every field at the same z.
        explicit: whether no equation is solved in a step.
        exact: whether the tableau is exact.
        order: the order of consistency; 0 when not consistent.
        linear_order: the order on y' = lambda y.
        zero_stable: whether the powers of M(0) stay bounded.
        real_interval: the largest b with [-b, 0] stable.
        real_interval_strict: the same with the coefficients exactly as stored.
        real_interval_within: the same with spectral radius up to 1 + ``tolerance``.
        imaginary_interval: the largest b with i[-b, b] stable.
        imaginary_interval_strict: the same with the coefficients exactly as stored.
        imaginary_interval_within: the same with spectral radius up to 1 + ``tolerance``.
        tolerance: the tolerance of the two ``within`` values.
        A_stable: whether the left half plane is stable.
        L_stable: whether, besides, infinitely stiff modes are damped completely.
        alpha: the angle of A(alpha)-stability in degrees.
        damping_at_infinity: the limit of the amplification.
        ssp_coefficient: strong stability preservation.
        maximum_internal_amplification: the largest gain of a stage error over the region; None when it is unbounded.
        stability_polynomials: (numerator, denominator) of R(z) as strings of rationals or floats, one state only.
    """

    name: str
    source: str
    stages: int | None
    states: int
    fields: int
    explicit: bool | None
    exact: bool | None
    order: int
    linear_order: int | None
    zero_stable: bool
    real_interval: float
    real_interval_strict: float
    real_interval_within: float
    imaginary_interval: float
    imaginary_interval_strict: float
    imaginary_interval_within: float
    tolerance: float
    A_stable: bool | None
    L_stable: bool | None
    alpha: float | None
    damping_at_infinity: float
    ssp_coefficient: float | None
    maximum_internal_amplification: float | None
    stability_polynomials: tuple[tuple[str, ...], tuple[str, ...]] | None


def describe(method: LinearStability, *, internal: bool = True) -> MethodDescription:
    """All properties of a method.

    Args:
        method: a method, for instance from ``named``.
        internal: whether to search the boundary for the maximum internal amplification, the slowest property.

    Example:
        >>> from stabkit import integrators
        >>> about = describe(integrators.named("backward_euler"))
        >>> about.L_stable, about.real_interval, about.order
        (True, inf, 1)
    """
    real, imaginary = method.real_interval(), method.imaginary_interval()
    linear = method if isinstance(method, GeneralLinearMethod) else None
    return MethodDescription(
        name=method.name,
        source=method.source,
        stages=linear.stages if linear else None,
        states=method.states,
        fields=method.n_fields,
        explicit=linear.is_explicit if linear else None,
        exact=linear.is_exact if linear else None,
        order=method.order,
        linear_order=linear.linear_order if linear else None,
        zero_stable=bool(method.is_stable(0.0)),
        real_interval=float(real),
        real_interval_strict=_strict(real),
        real_interval_within=_within(real),
        imaginary_interval=float(imaginary),
        imaginary_interval_strict=_strict(imaginary),
        imaginary_interval_within=_within(imaginary),
        tolerance=real.tolerance if isinstance(real, AxisInterval) else 0.0,
        A_stable=linear.is_A_stable if linear else None,
        L_stable=linear.is_L_stable if linear else None,
        alpha=linear.alpha() if linear else None,
        damping_at_infinity=method.damping_at_infinity(),
        ssp_coefficient=linear.ssp_coefficient() if linear else None,
        maximum_internal_amplification=maximum_internal_amplification(linear) if linear and internal else None,
        stability_polynomials=_polynomials(linear) if linear else None,
    )


def maximum_internal_amplification(method: GeneralLinearMethod) -> float | None:
    """The largest max_j |Q_j(z)| over the stability region, found on its boundary; None when that is unbounded.

    Source: D. I. Ketcheson, L. Loczi, M. Parsani, SIAM J. Numer. Anal. 52 (2014) 2226-2249.

    Args:
        method: a method with a bounded region; Q is then analytic inside and largest on the boundary.

    Example:
        >>> from stabkit import integrators
        >>> round(maximum_internal_amplification(integrators.named("midpoint")), 3)  # max |z| over the region
        2.197
    """
    region = method.region()
    if not region.is_bounded or not method.is_explicit or not method.stages:
        return None
    values = [method.internal_amplification(curve.points).max() for curve in region.curves if len(curve.points)]
    real = method.real_interval()  # often the extreme point, and between samples of the boundary
    if math.isfinite(real):
        values.append(method.internal_amplification(np.array([-real + 0j])).max())
    return float(max(values))


def _strict(interval: float) -> float:
    return interval.strict if isinstance(interval, AxisInterval) else float(interval)


def _within(interval: float) -> float:
    return interval.within if isinstance(interval, AxisInterval) else float(interval)


def _polynomials(method: GeneralLinearMethod) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
    if method.states != 1:
        return None
    p = method.characteristic
    spell = str if method.precision == 0 else (lambda c: repr(float(c)))
    return tuple(spell(c) for c in p.numerator), tuple(spell(c) for c in p.denominator)
