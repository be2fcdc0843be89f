"""Squared singular values of the Jacobian of a deep random network: moments and edges, at infinite width.

Pennington, Schoenholz and Ganguli, "Resurrecting the sigmoid in deep learning through dynamical isometry", NeurIPS
2017, and "The emergence of spectral universality in deep networks", AISTATS 2018. J = D_L W_L ... D_1 W_1, with
D = diag phi'(h), h ~ N(0, q*), and W Gaussian or Haar-orthogonal. S-transforms multiply.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from stabkit.arguments import accepts
from stabkit.errors import ArgumentError
from stabkit.meanfield.activations import Activation, activation
from stabkit.meanfield.gaussian import Array, mean
from stabkit.meanfield.maps import Phi, check, slope_moment
from stabkit.results import Result


@dataclass(frozen=True)
class JacobianSpectrum(Result):
    """Mean, variance and edges of the eigenvalues of J J^T, the squared singular values of J.

    Attributes:
        mean: chi_1 to the power of the depth.
        variance: mean^2 * depth * (mu_2 / mu_1^2 - 1 - s_1), mu_k = E phi'^2k, s_1 = -1 Gaussian or 0 orthogonal.
        largest: the upper edge of their distribution.
        smallest: the lower edge. Slopes at more than 8 standard deviations of h, one unit in 10^15, count for neither.
        depth: number of layers.
        weights: ``"gaussian"`` or ``"orthogonal"``.
    """

    mean: float
    variance: float
    largest: float
    smallest: float
    depth: int
    weights: str


@accepts
def jacobian_spectrum(
    phi: Phi, depth: int, *, sigma_w: float, q: float = 1.0, weights: str = "gaussian"
) -> JacobianSpectrum:
    """Where the squared singular values of the input-output Jacobian of a random network lie.

    Args:
        phi: an activation; ``"linear"`` for a deep linear network.
        depth: number of layers, at least 1.
        sigma_w: Gaussian weights have the variance sigma_w^2 / n, orthogonal ones are sigma_w times an isometry.
        q: variance of the pre-activations in every layer, such as ``fixed_point(...).q``.
        weights: ``"gaussian"`` or ``"orthogonal"``.

    Raises:
        ArgumentError: an argument is out of its range.

    Example:
        >>> spectrum = jacobian_spectrum("linear", 2, sigma_w=1.0)  # edge (L + 1)^(L + 1) / L^L
        >>> round(spectrum.largest, 8), round(spectrum.variance, 8)
        (6.75, 2.0)
    """
    check(sigma_w=sigma_w, q=q)
    if weights not in ("gaussian", "orthogonal"):
        raise ArgumentError(f"weights={weights!r}; expected 'gaussian' or 'orthogonal'")
    function = activation(phi)
    first, second = slope_moment(function, q).value, slope_moment(function, q, 4).value
    if first == 0 or sigma_w == 0:
        return JacobianSpectrum(0.0, 0.0, 0.0, 0.0, depth, weights)
    average = (sigma_w**2 * first) ** depth
    spread = second / first**2 - 1 + (1.0 if weights == "gaussian" else 0.0)
    layer = _Layer(function, q, depth, weights == "gaussian")
    scale = depth * math.log(sigma_w**2)
    return JacobianSpectrum(
        mean=average,
        variance=average**2 * depth * spread,
        largest=math.exp(layer.log_upper_edge() + scale),
        smallest=math.exp(layer.log_lower_edge() + scale),
        depth=depth,
        weights=weights,
    )


class _Layer:
    """The distribution of phi'(h)^2 and the inverse of the moment function of J J^T at sigma_w = 1.

    With z = psi(u) = E[u d / (1 - u d)], d = phi'^2, the S-transform of d is (1 + z) u / z, and J J^T has
    psi(1 / x) = z at x = (1 + z) / (z S^depth). Edges are the extrema of x over real u off the support.
    """

    def __init__(self, function: Activation, q: float, depth: int, gaussian: bool) -> None:
        self.function, self.q, self.depth, self.gaussian = function, q, depth, gaussian
        grid = math.sqrt(q) * np.linspace(-8, 8, 4001)
        slopes = function.derivative(np.concatenate([grid, [0.0]])) ** 2
        self.top, self.bottom = float(slopes.max()), float(slopes.min())

    def _log_x(self, gap: float, *, upper: bool) -> float:
        """Log of x where u d leaves 1 by the relative gap at the nearest slope."""
        size = self.top if upper else self.bottom

        def ratio(h: Array) -> Array:
            d = np.minimum(self.function.derivative(h) ** 2 / size, 1.0) if upper else self._above(h, size)
            return d * (1 - gap) / (1 - d * (1 - gap)) if upper else d * (1 + gap) / (1 - d * (1 + gap))

        z = float(mean(ratio, self.q, self.function.kinks)[0])
        u = (1 - gap if upper else 1 + gap) / size
        log_s = math.log(abs((1 + z) * u / z)) - (math.log(abs(1 + z)) if self.gaussian else 0.0)
        return math.log(abs((1 + z) / z)) - self.depth * log_s

    def _above(self, h: Array, size: float) -> Array:
        return np.maximum(self.function.derivative(h) ** 2 / size, 1.0)

    def log_upper_edge(self) -> float:
        from scipy.optimize import minimize_scalar

        # the gap from 1 is searched over logits: the minimum may lie at either end
        found = minimize_scalar(
            lambda t: self._log_x(1 / (1 + math.exp(t)), upper=True),
            bounds=(-25.0, 30.0),
            method="bounded",
            options={"xatol": 1e-9},
        )
        ends = (self._log_x(1 / (1 + math.exp(t)), upper=True) for t in (-25.0, 30.0))
        return float(min(found.fun, *ends))

    def log_lower_edge(self) -> float:
        """-inf where slopes vanish, or Gaussian weights have singular values down to zero."""
        from scipy.optimize import minimize_scalar

        if self.gaussian or self.bottom < 1e-12 * self.top:
            return -math.inf
        found = minimize_scalar(
            lambda t: -self._log_x(math.exp(t), upper=False), bounds=(-30.0, 30.0), method="bounded"
        )
        ends = (self._log_x(math.exp(t), upper=False) for t in (-30.0, 30.0))
        return float(max(-found.fun, *ends))
