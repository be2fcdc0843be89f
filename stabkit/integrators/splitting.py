"""Partitioned, splitting and IMEX methods: several fields, one z for each."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from stabkit.integrators.catalogue_entry import Entry
from stabkit.integrators.construction import from_additive_butcher, from_butcher, from_partitioned_butcher
from stabkit.integrators.general_linear import GeneralLinearMethod
from stabkit.integrators.stability_function import StabilityFunction

_HLW = "E. Hairer, C. Lubich, G. Wanner, Geometric Numerical Integration, 2nd ed. 2006"
_TROTTER = "H. F. Trotter, Proc. AMS 10 (1959) 545-551"
_STRANG = "G. Strang, SIAM J. Numer. Anal. 5 (1968) 506-517"
_MACARON = "Y. Lu et al., arXiv 1906.02762"
_FAMILY = "splitting and partitioned"


def sub_step(base: GeneralLinearMethod, field: int, h: Any = 1) -> GeneralLinearMethod:
    """A step of length h of a one-field method with one field of several; other fields stand still.

    Args:
        base: a one-field method.
        field: which field it evaluates.
        h: the fraction of the step.

    Raises:
        ArgumentError: ``base`` has several fields.
    """
    return base.scaled(h).on_field(field)


def lie(base: GeneralLinearMethod | None = None) -> GeneralLinearMethod:
    """Lie-Trotter splitting: a full step with field 0, then one with field 1; with Euler sub-steps by default.

    A pre-norm transformer block is one such step, attention then feed-forward: R = (1 + z_1)(1 + z_0).

    Args:
        base: the one-field method of each sub-step.

    Example:
        >>> complex(lie().stability_matrix(1.0, 2.0)[0, 0])
        (6+0j)
    """
    base = base or from_butcher([[]], [1])
    return sub_step(base, 0).then(sub_step(base, 1), name="lie", source=_TROTTER)


def strang(base: GeneralLinearMethod | None = None) -> GeneralLinearMethod:
    """Strang splitting: half a step with field 0, a full one with field 1, half a step with field 0.

    The order is 2 only if the sub-steps have order 2; the explicit midpoint rule is taken by default. Source: G.
    Strang, SIAM J. Numer. Anal. 5 (1968) 506-517.

    Args:
        base: the one-field method of each sub-step.

    Example:
        >>> strang().order
        2
    """
    base = base or from_butcher([[], ["1/2"]], [0, 1])
    half = sub_step(base, 0, "1/2")
    return half.then(sub_step(base, 1)).then(half, name="strang", source=_STRANG)


def macaron() -> GeneralLinearMethod:
    """Half a feed-forward, attention, half a feed-forward, all Euler: R = (1 + z_0/2)^2 (1 + z_1), of order 1.

    Source: Y. Lu et al., Understanding and Improving Transformer From a Multi-Particle Dynamic System Point of View,
    arXiv 1906.02762.
    """
    method = strang(from_butcher([[]], [1]))
    method.name, method.source = "macaron", _MACARON
    return method


def parallel() -> GeneralLinearMethod:
    """X' = x + f_0(x) + f_1(x), both fields at the same point: R = 1 + z_0 + z_1 (GPT-J, PaLM)."""
    return GeneralLinearMethod(
        [[0, 0], [0, 0]], [[1], [1]], [[1, 1]], [[1]], fields=[0, 1], name="parallel",
        source="B. Wang, A. Komatsuzaki, GPT-J-6B, 2021 (additive Euler)",
    )  # fmt: skip


def symplectic_euler() -> GeneralLinearMethod:
    """P' = p + h g(q), then q' = q + h f(p'); states (q, p), field 0 is f, field 1 is g.

    Example:
        >>> float(symplectic_euler().imaginary_interval())
        2.0
    """
    return from_partitioned_butcher(
        ([[0]], [1]), ([[1]], [1]), name="symplectic_euler", source=f"{_HLW}, I.1.2", order=1
    )


def stormer_verlet() -> GeneralLinearMethod:
    """Half a kick, a drift, half a kick; states (q, p), field 0 is the drift, field 1 the force."""
    return GeneralLinearMethod(
        [[0, 0, 0], ["1/2", 0, 0], [0, 1, 0]],
        [[1, 0], [0, 1], [1, 0]],
        [[0, 1, 0], ["1/2", 0, "1/2"]],
        [[1, 0], [0, 1]],
        fields=[1, 0, 1],
        name="stormer_verlet",
        source=f"{_HLW}, I.1.4 and II.2 (Lobatto IIIA-IIIB pair)",
        declared_order=2,
    )


def second_order_leapfrog() -> GeneralLinearMethod:
    """y_{n+1} = 2 y_n - y_{n-1} + h^2 g(y_n) for y'' = g(y): the states are (y_n, y_{n-1}) and z = h^2 lambda.

    Stable for -4 < z < 0. Source: E. Haber, L. Ruthotto, Inverse Problems 34 (2018) 014004 (the leapfrog network).

    Example:
        >>> float(second_order_leapfrog().real_interval())
        4.0
    """
    return GeneralLinearMethod(
        [[0]], [[1, 0]], [[1], [0]], [[2, -1], [1, 0]], name="second_order_leapfrog",
        source=f"{_HLW}, I.1.4 (Stormer's two-step form); Haber and Ruthotto 2018", declared_order=2,
    )  # fmt: skip


def imex_euler() -> GeneralLinearMethod:
    """Forward Euler in field 0 and backward Euler in field 1: R = (1 + z_0) / (1 - z_1).

    Example:
        >>> imex_euler().stability_matrix(0.0, -1.0)[0, 0].real.item()
        0.5
    """
    return from_additive_butcher(
        [([[0, 0], [1, 0]], [1, 0]), ([[0, 0], [0, 1]], [0, 1])],
        name="imex_euler",
        source="U. M. Ascher, S. J. Ruuth, R. J. Spiteri, Appl. Numer. Math. 25 (1997) 151-167",
    )


def exponential_euler() -> StabilityFunction:
    """X' = e^L x + phi_1(L) f(x), exact in the linear field 0: R = e^{z_0} + z_1 (e^{z_0} - 1) / z_0.

    Source: M. Hochbruck, A. Ostermann, Acta Numerica 19 (2010) 209-286.
    """

    def function(linear: npt.NDArray[Any], other: npt.NDArray[Any]) -> npt.NDArray[np.complex128]:
        safe = np.where(np.abs(linear) < 1e-8, 1, linear)
        phi = np.where(np.abs(linear) < 1e-8, 1 + linear / 2, np.expm1(safe) / safe)
        return np.asarray(np.exp(linear) + phi * other, dtype=complex)

    return StabilityFunction(
        function, n_fields=2, name="exponential_euler", order=1, at_infinity=1.0,
        source="M. Hochbruck, A. Ostermann, Acta Numerica 19 (2010) 209-286",
    )  # fmt: skip


def _entry(name: str, build: Any, source: str, *aliases: str) -> Entry:
    return Entry(name, build, source, aliases, family=_FAMILY)


ENTRIES: tuple[Entry, ...] = (
    _entry("symplectic_euler", symplectic_euler, f"{_HLW}, I.1.2", "semi_implicit_euler", "hamiltonian_network"),
    _entry("stormer_verlet", stormer_verlet, f"{_HLW}, I.1.4", "verlet", "velocity_verlet", "stoermer_verlet"),
    _entry("second_order_leapfrog", second_order_leapfrog, f"{_HLW}, I.1.4; Haber and Ruthotto 2018",
           "verlet_two_step", "leapfrog_network", "hamiltonian_leapfrog"),
    _entry("lie", lie, _TROTTER, "lie_trotter", "lie_euler",
           "pre_norm_transformer", "pre_ln_transformer"),
    _entry("strang", strang, _STRANG, "strang_splitting"),
    _entry("macaron", macaron, _MACARON, "macaron_transformer", "strang_euler"),
    _entry("parallel", parallel, "B. Wang, A. Komatsuzaki, GPT-J-6B, 2021", "parallel_transformer", "gpt_j", "palm",
           "additive_euler"),
    _entry("imex_euler", imex_euler, "Ascher, Ruuth and Spiteri 1997", "forward_backward_euler", "imexnet"),
    _entry("exponential_euler", exponential_euler, "Hochbruck and Ostermann 2010", "etd1", "exp_euler"),
)  # fmt: skip
