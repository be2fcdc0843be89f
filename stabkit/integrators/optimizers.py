"""Optimizers read as methods for the gradient flow theta' = -grad L(theta): one update is one step of length lr.

On a mode of curvature c the flow is theta' = -c theta, and an update is multiplication by M(z) at z = -lr c. So the
largest curvature at which updates stay bounded is the real stability interval of the method over lr.

Sources: B. T. Polyak, USSR Comput. Math. Math. Phys. 4 (1964) 1; J. Cohen et al., ICLR 2021 (arXiv 2103.00065) and, for
Adam with its preconditioner held fixed, arXiv 2207.14484; the updates are those of ``torch.optim``.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

from stabkit.errors import ArgumentError
from stabkit.integrators.catalogue_entry import Entry
from stabkit.integrators.general_linear import GeneralLinearMethod
from stabkit.integrators.tableau_checks import to_fraction

_POLYAK = "B. T. Polyak, Some methods of speeding up the convergence of iteration methods, 1964"
_NESTEROV = "I. Sutskever et al., On the importance of initialization and momentum in deep learning, ICML 2013"
_ADAM = "J. Cohen et al., Adaptive gradient methods at the edge of stability, 2022, arXiv 2207.14484"
_NADAM = "T. Dozat, Incorporating Nesterov momentum into Adam, ICLR workshop 2016"
_FAMILY = "optimizers"


def _number(x: Any, name: str, *, below_one: bool = False) -> Any:
    """A float as it is, anything else as a fraction, so that exact input stays exact."""
    value = x if isinstance(x, float) else to_fraction(x)
    if not value >= 0 or (below_one and not value < 1):
        raise ArgumentError(f"{name}={x}; give a number in {'[0, 1)' if below_one else '[0, inf)'}")
    return value


def heavy_ball(momentum: Any = Fraction(9, 10), dampening: Any = 0, decay: Any = 0) -> GeneralLinearMethod:
    """Gradient descent with momentum: v' = b v + (1 - d) g, x' = (1 - w) x - lr v'; states (x, -lr v).

    Args:
        momentum: b; 0 is gradient descent, which is forward Euler.
        dampening: d.
        decay: w, what decoupled weight decay takes of the weights in an update: lr times the decay of ``AdamW``.

    Raises:
        ArgumentError: a number is negative, or the momentum is 1 or more.

    Example:
        >>> heavy_ball(0).real_interval(), heavy_ball(Fraction(9, 10)).real_interval()
        (2.0, 3.8)
    """
    b, d, w = _number(momentum, "momentum", below_one=True), _number(dampening, "dampening"), _number(decay, "decay")
    if b == 0:  # no state is kept, and dampening is not used
        return GeneralLinearMethod([[0]], [[1]], [[1]], [[1 - w]], name=_name("gradient_descent", decay=decay),
                                   source=_POLYAK)  # fmt: skip
    return GeneralLinearMethod(
        [[0]], [[1, 0]], [[1 - d], [1 - d]], [[1 - w, b], [0, b]],
        name=_name("heavy_ball", momentum=momentum, dampening=dampening, decay=decay), source=_POLYAK,
    )  # fmt: skip


def nesterov(momentum: Any = Fraction(9, 10), decay: Any = 0) -> GeneralLinearMethod:
    """Nesterov's momentum as torch has it: v' = b v + g, x' = (1 - w) x - lr (g + b v'); states (x, -lr v).

    Args:
        momentum: b.
        decay: w, what decoupled weight decay takes of the weights in an update.

    Raises:
        ArgumentError: a number is negative, or the momentum is 1 or more.

    Example:
        >>> nesterov(Fraction(9, 10)).real_interval() == float(Fraction(38, 28))
        True
    """
    b, w = _number(momentum, "momentum", below_one=True), _number(decay, "decay")
    return GeneralLinearMethod(
        [[0]], [[1, 0]], [[1 + b], [1]], [[1 - w, b * b], [0, b]],
        name=_name("nesterov", momentum=momentum, decay=decay), source=_NESTEROV,
    )  # fmt: skip


def adam(beta1: Any = Fraction(9, 10), decay: Any = 0, correction: Any = 1) -> GeneralLinearMethod:
    """Adam with its preconditioner P held fixed: m' = b m + (1 - b) g, x' = (1 - w) x - lr c P^-1 m'.

    z is -lr times an eigenvalue of P^-1 H; states (x, -lr P^-1 m).

    Args:
        beta1: b, of the first moment.
        decay: w, what decoupled weight decay takes of the weights in an update.
        correction: c, what the first moment is multiplied with: 1 / (1 - b^t) at update t, 1 in the long run.

    Raises:
        ArgumentError: a number is negative, or beta1 is 1 or more.

    Example:
        >>> float(adam(Fraction(9, 10)).real_interval())
        38.0
    """
    b, w, c = _number(beta1, "beta1", below_one=True), _number(decay, "decay"), _number(correction, "correction")
    return GeneralLinearMethod(
        [[0]], [[1, 0]], [[c * (1 - b)], [1 - b]], [[1 - w, c * b], [0, b]],
        name=_name("adam", beta1=beta1, decay=decay, correction=correction), source=_ADAM,
    )  # fmt: skip


def nadam(beta1: Any = Fraction(9, 10), decay: Any = 0, own: Any = None, moment: Any = None) -> GeneralLinearMethod:
    """NAdam with its preconditioner P held fixed: m' = b m + (1 - b) g, x' = (1 - w) x - lr P^-1 (p g + q m').

    Args:
        beta1: b, of the first moment.
        decay: w, what decoupled weight decay takes of the weights in an update.
        own: p, the weight of the gradient; by default 1 - b, as in the long run.
        moment: q, the weight of the first moment; by default b, as in the long run.

    Raises:
        ArgumentError: a number is negative, or beta1 is 1 or more.

    Example:
        >>> round(float(nadam(Fraction(9, 10)).real_interval()), 9), round(3.8 / 0.28, 9)
        (13.571428571, 13.571428571)
    """
    b, w = _number(beta1, "beta1", below_one=True), _number(decay, "decay")
    p = 1 - b if own is None else _number(own, "own")
    q = b if moment is None else _number(moment, "moment")
    return GeneralLinearMethod(
        [[0]], [[1, 0]], [[p + q * (1 - b)], [1 - b]], [[1 - w, q * b], [0, b]],
        name=_name("nadam", beta1=beta1, decay=decay, own=own or 0, moment=moment or 0), source=_NADAM,
    )  # fmt: skip


def _name(method: str, **parameters: Any) -> str:
    """The name with the parameters that are not as a rule, which are 0 and, of a correction, 1."""
    told = [f"{key}={_short(value)}" for key, value in parameters.items() if value != (key == "correction")]
    return f"{method}({', '.join(told)})" if told else method


def _short(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _entry(name: str, build: Any, source: str, *aliases: str, **defaults: Any) -> Entry:
    return Entry(name, build, source, aliases, defaults, _FAMILY)


def _gradient_descent() -> GeneralLinearMethod:
    return heavy_ball(0)


ENTRIES: tuple[Entry, ...] = (
    _entry("gradient_descent", _gradient_descent, _POLYAK, "sgd"),
    _entry("heavy_ball", heavy_ball, _POLYAK, "momentum_descent", momentum=Fraction(9, 10), dampening=0, decay=0),
    _entry("nesterov", nesterov, _NESTEROV, momentum=Fraction(9, 10), decay=0),
    _entry("adam", adam, _ADAM, "adamw", beta1=Fraction(9, 10), decay=0, correction=1),
    _entry("nadam", nadam, _NADAM, beta1=Fraction(9, 10), decay=0),
)
