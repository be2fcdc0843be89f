"""What one random layer does to variances, correlations and gradients, on average and at infinite width.

The layer is h' = W phi(h) + b with W_ij ~ N(0, sigma_w^2 / n) and b_i ~ N(0, sigma_b^2). Poole et al., "Exponential
expressivity in deep neural networks through transient chaos", NeurIPS 2016; Schoenholz et al., "Deep information
propagation", ICLR 2017.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import nn

from stabkit.arguments import accepts
from stabkit.errors import ArgumentError
from stabkit.meanfield.activations import Activation, activation
from stabkit.meanfield.closed_forms import Moment, PairMoment
from stabkit.meanfield.gaussian import Array, Expectation, Function, exactly, mean, pair_mean

Phi = str | nn.Module | Activation | Callable[..., Any]


@accepts
def variance_map(phi: Phi, q: float, *, sigma_w: float, sigma_b: float = 0.0) -> Expectation:
    """The variance of the next pre-activations, q' = sigma_w^2 E phi(h)^2 + sigma_b^2, for h ~ N(0, q).

    Args:
        phi: an activation, its name, a module or a function (see `activation`).
        q: variance of the pre-activations.
        sigma_w: weights have the variance sigma_w^2 / fan-in.
        sigma_b: biases have the variance sigma_b^2.

    Raises:
        ArgumentError: q, sigma_w or sigma_b is negative or not finite; phi is not a scalar function.

    Example:
        >>> round(float(variance_map("tanh", 1.0, sigma_w=1.5)), 6)
        0.887163
    """
    check(q=q, sigma_w=sigma_w, sigma_b=sigma_b)
    return second_moment(activation(phi), q).scaled(sigma_w**2, sigma_b**2)


@accepts
def correlation_map(phi: Phi, c: float, q: float, *, sigma_w: float, sigma_b: float = 0.0) -> Expectation:
    """The correlation of two inputs one layer on, for two inputs of variance q and correlation c.

    c' = (sigma_w^2 E phi(h_1) phi(h_2) + sigma_b^2) / q', with q' of `variance_map`.

    Args:
        phi: an activation.
        c: correlation of the pre-activations, from -1 to 1.
        q: their variance, positive.
        sigma_w: weights have the variance sigma_w^2 / fan-in.
        sigma_b: biases have the variance sigma_b^2.

    Raises:
        ArgumentError: an argument is out of its range.

    Example:
        >>> round(float(correlation_map("relu", 0.0, 1.0, sigma_w=2**0.5)), 6)  # 1 / pi
        0.31831
    """
    check(q=q, sigma_w=sigma_w, sigma_b=sigma_b, c=c)
    function = activation(phi)
    after = second_moment(function, q).scaled(sigma_w**2, sigma_b**2)
    if after.value == 0:
        raise ArgumentError(
            f"the variance after the layer is 0 (q={q}, sigma_w={sigma_w}, sigma_b={sigma_b}): no correlation"
        )
    product = product_moment(function, (q, q), c).scaled(sigma_w**2, sigma_b**2)
    value = product.value / after.value
    return Expectation(value, (product.error + abs(value) * after.error) / after.value, product.method)


@accepts
def chi_1(phi: Phi, q: float, *, sigma_w: float) -> Expectation:
    """Growth of the squared gradient per layer, sigma_w^2 E phi'(h)^2; also the slope of the correlation map at c = 1.

    Raises:
        ArgumentError: an argument is out of its range.

    Example:
        >>> float(chi_1("relu", 1.0, sigma_w=2.0))
        2.0
    """
    check(q=q, sigma_w=sigma_w)
    return slope_moment(activation(phi), q).scaled(sigma_w**2)


@accepts
def chi_c(phi: Phi, c: float, q: float, *, sigma_w: float) -> Expectation:
    """sigma_w^2 E phi'(h_1) phi'(h_2) at correlation c: how a small difference of correlations changes in a layer.

    At a fixed variance q this is the slope of the correlation map.

    Raises:
        ArgumentError: an argument is out of its range.

    Example:
        >>> round(float(chi_c("relu", 0.0, 1.0, sigma_w=2**0.5)), 12)
        0.5
    """
    check(q=q, sigma_w=sigma_w, c=c)
    return slope_product_moment(activation(phi), (q, q), c).scaled(sigma_w**2)


@accepts
def chi_parallel(phi: Phi, q: float, *, sigma_w: float) -> Expectation:
    """The slope dq'/dq of the variance map.

    Computed as sigma_w^2 E phi^2 (h^2 - q) / (2 q^2), which holds for functions with kinks and jumps too.

    Raises:
        ArgumentError: an argument is out of its range; q is 0.

    Example:
        >>> float(chi_parallel("relu", 1.0, sigma_w=2.0))
        2.0
    """
    check(q=q, sigma_w=sigma_w)
    if q == 0:
        raise ArgumentError("q=0; expected a positive variance")
    function = activation(phi)
    if function.closed.chi_parallel is not None:
        return exactly(function.closed.chi_parallel(q)).scaled(sigma_w**2)
    # with phi(0) taken off, phi^2 is small where 1 / q^2 is large
    zero = float(function.function(np.zeros(1))[0])

    def integrand(h: Array) -> Array:
        rest = function.function(h) - zero
        return (rest * rest + 2 * zero * rest) * (h * h - q) / (2 * q * q)

    return _by_quadrature(integrand, q, function.kinks).scaled(sigma_w**2)


def second_moment(phi: Activation, q: float) -> Expectation:
    """E phi(h)^2 for h ~ N(0, q)."""
    return _moment(phi.closed.square, lambda h: phi.function(h) ** 2, q, phi.kinks)


def first_moment(phi: Activation, q: float) -> Expectation:
    """E phi(h) for h ~ N(0, q)."""
    return _by_quadrature(phi.function, q, phi.kinks)


def slope_moment(phi: Activation, q: float, power: int = 2) -> Expectation:
    """E phi'(h)^power for h ~ N(0, q)."""
    closed = {2: phi.closed.slope_square, 4: phi.closed.slope_fourth}.get(power)
    return _moment(closed, lambda h: phi.derivative(h) ** power, q, phi.kinks)


def product_moment(phi: Activation, q: tuple[float, float], c: float) -> Expectation:
    """E phi(h_1) phi(h_2) at variances q and correlation c."""
    return _pair(phi.closed.product, phi.function, q, c, phi.kinks)


def slope_product_moment(phi: Activation, q: tuple[float, float], c: float) -> Expectation:
    """E phi'(h_1) phi'(h_2) at variances q and correlation c."""
    return _pair(phi.closed.slope_product, phi.derivative, q, c, phi.kinks)


def _moment(closed: Moment | None, f: Function, q: float, kinks: tuple[float, ...]) -> Expectation:
    return exactly(closed(q)) if closed is not None else _by_quadrature(f, q, kinks)


def _by_quadrature(f: Function, q: float, kinks: tuple[float, ...]) -> Expectation:
    value, error = mean(f, q, kinks)
    return Expectation(float(value), float(error), "quadrature")


def _pair(
    closed: PairMoment | None, f: Function, q: tuple[float, float], c: float, kinks: tuple[float, ...]
) -> Expectation:
    c = min(1.0, max(-1.0, c))
    if closed is not None:
        return exactly(closed(*q, c))
    if c == 1.0 and q[0] == q[1]:
        return _by_quadrature(lambda h: f(h) ** 2, q[0], kinks)
    return Expectation(*pair_mean(f, q, c, kinks), "quadrature")


def check(**values: float) -> None:
    """Refuse variances and deviations that are negative or not finite, and correlations beyond 1.

    Raises:
        ArgumentError: naming the first argument that is out of its range.
    """
    for name, value in values.items():
        low, high = (-1.0, 1.0) if name == "c" else (0.0, float("inf"))
        if not (np.isfinite(value) and low <= value <= high):
            expected = "a correlation from -1 to 1" if name == "c" else "a finite number that is not negative"
            raise ArgumentError(f"{name}={value}; expected {expected}")
