"""What finite width changes: typical gradients shrink where their mean square is kept.

Hanin and Nica, "Products of many large random matrices and gradients in deep neural networks", Comm. Math. Phys. 376
(2020); Newman, "The distribution of Lyapunov exponents: exact results for random matrices", Comm. Math. Phys. 103
(1986). Sums over chi-square laws are exact at every width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from stabkit.arguments import accepts
from stabkit.errors import ArgumentError
from stabkit.meanfield.activations import activation
from stabkit.meanfield.maps import Phi, check, slope_moment
from stabkit.results import Result


@dataclass(frozen=True)
class LogGain(Result):
    """Mean and variance over weights of log |J u|^2 for one layer, J its Jacobian and u any unit vector.

    Attributes:
        mean: in nats; half of it is the typical growth exponent per layer.
        variance: in nats squared; over independent layers it adds up.
    """

    mean: float
    variance: float


@accepts
def relu_log_gain(width: int, sigma_w: float = math.sqrt(2)) -> LogGain:
    """Exact mean and variance of log |J u|^2 for a ReLU layer of Gaussian weights without bias.

    |J u|^2 is sigma_w^2 / n times a chi-square variable of K degrees of freedom, K ~ Binomial(n, 1/2), given that
    K > 0. At sigma_w^2 = 2 and large n the mean is -5 / (2 n) and the variance 5 / n: the mean square stays 1.

    Args:
        width: number of units n.
        sigma_w: weights have the variance sigma_w^2 / n.

    Raises:
        ArgumentError: the width is not positive, or sigma_w is not.

    Example:
        >>> round(relu_log_gain(32).mean / 2, 8)
        -0.0412701
    """
    from scipy.special import digamma, gammaln, polygamma

    _check_sigma(sigma_w)
    k = np.arange(1, width + 1)
    log_share = gammaln(width + 1) - gammaln(k + 1) - gammaln(width - k + 1) - width * math.log(2)
    share = np.exp(log_share)
    share /= share.sum()
    logs = math.log(2 * sigma_w**2 / width) + digamma(k / 2)
    average = float(share @ logs)
    return LogGain(average, float(share @ (logs - average) ** 2 + share @ polygamma(1, k / 2)))


@accepts
def log_gain_variance(phi: Phi, width: int, q: float = 1.0, weights: str = "gaussian") -> float:
    """Variance of log |J u|^2 of one layer over its weights, to first order in 1 / width.

    (3 mu_2 / mu_1^2 - 1) / n for Gaussian weights and 3 (mu_2 / mu_1^2 - 1) / n for orthogonal ones, mu_k =
    E phi'^2k: 2 / n for a linear layer, 5 / n for a ReLU. Half of it, summed over layers, is the gap between the mean
    square gradient and the typical one.

    Raises:
        ArgumentError: an argument is out of its range.

    Example:
        >>> log_gain_variance("relu", 100)
        0.05
    """
    check(q=q)
    if weights not in ("gaussian", "orthogonal"):
        raise ArgumentError(f"weights={weights!r}; expected 'gaussian' or 'orthogonal'")
    function = activation(phi)
    ratio = slope_moment(function, q, 4).value / slope_moment(function, q).value ** 2
    return (3 * ratio - (1 if weights == "gaussian" else 3)) / width


@accepts
def gaussian_exponents(width: int, sigma_w: float = 1.0) -> np.ndarray:
    """All Lyapunov exponents of a deep linear network of Gaussian layers W_ij ~ N(0, sigma_w^2 / n), largest first.

    lambda_k = (log(2 sigma_w^2 / n) + psi((n - k + 1) / 2)) / 2, in nats per layer; exact at every width (Newman).

    Args:
        width: number of units n.
        sigma_w: weights have the variance sigma_w^2 / n.

    Returns:
        ``(width,)``.

    Raises:
        ArgumentError: the width or sigma_w is not positive.

    Example:
        >>> gaussian_exponents(8)[[0, -1]].round(6).tolist()
        [-0.065088, -1.674902]
    """
    from scipy.special import digamma

    _check_sigma(sigma_w)
    k = np.arange(1, width + 1)
    return np.asarray(0.5 * (math.log(2 * sigma_w**2 / width) + digamma((width - k + 1) / 2)))


@accepts
def residual_exponent(width: int | None, h: float) -> float:
    """The largest exponent of x' = x + h W x with fresh W_ij ~ N(0, 1 / n) in every layer, in nats per layer.

    n / h^2 times |J u|^2 is chi-square with n degrees of freedom and noncentrality n / h^2, a Poisson mixture of
    central ones: exact at every width. (log(1 + h^2)) / 2 in the limit.

    Args:
        width: number of units n; None for the limit.
        h: step size.

    Raises:
        ArgumentError: the width is not positive, or h is negative or not finite.

    Example:
        >>> round(residual_exponent(32, 0.5), 8), round(residual_exponent(None, 0.5), 8)
        (0.10589139, 0.11157178)
    """
    from scipy.special import digamma
    from scipy.stats import poisson

    check(h=h)
    if width is None or h == 0:
        return 0.5 * math.log1p(h * h)
    rate = width / (2 * h * h)
    reach = 12 * math.sqrt(rate) + 60  # beyond lies less than rounding
    j = np.arange(max(0, int(rate - reach)), int(rate + reach))
    return 0.5 * (math.log(2 * h * h / width) + float(poisson.pmf(j, rate) @ digamma(width / 2 + j)))


def _check_sigma(sigma_w: float) -> None:
    if not (math.isfinite(sigma_w) and sigma_w > 0):
        raise ArgumentError(f"sigma_w={sigma_w}; expected a positive finite number")
