"""Random residual networks over depth: variance, correlation and squared gradient.

Yang and Schoenholz, "Mean field residual networks: on the edge of chaos", NeurIPS 2017; Marion et al., "Scaling ResNets
in the large-depth regime", 2022; Zhang et al., "Fixup initialization", ICLR 2019.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from stabkit.arguments import accepts
from stabkit.errors import ArgumentError
from stabkit.meanfield.activations import activation
from stabkit.meanfield.gaussian import Array
from stabkit.meanfield.maps import Phi, check, first_moment, product_moment, second_moment, slope_moment
from stabkit.results import Result

BRANCHES = ("W phi(x)", "phi(W x)")


@dataclass(frozen=True)
class DepthProfile(Result):
    """Expected statistics of a random network at every depth.

    Attributes:
        q: ``(depth + 1,)``, mean square of the units.
        c: ``(depth + 1,)``, correlation of two inputs; None where none was asked for.
        log_chi: ``(depth,)``, log of the growth of the squared gradient in each block, from output to input.
    """

    q: Array
    c: Array | None
    log_chi: Array

    @property
    def log_gradient_ratio(self) -> float:
        """How much larger the squared gradient is at the input: log E ||g_0||^2 / ||g_L||^2."""
        return float(self.log_chi.sum())

    @property
    def log_chi_relative(self) -> Array:
        """``(depth,)``, growth of the squared gradient relative to that of the units, free of their scale."""
        return np.asarray(self.log_chi - np.diff(np.log(self.q)))

    def _contents(self) -> dict[str, Any]:
        return {**super()._contents(), "log_gradient_ratio": self.log_gradient_ratio}


@accepts
def residual_profile(
    phi: Phi,
    depth: int,
    *,
    sigma_w: float,
    sigma_b: float = 0.0,
    skip: float = 1.0,
    scale: float = 1.0,
    branch: str = "W phi(x)",
    q: float = 1.0,
    c: float | None = None,
) -> DepthProfile:
    """Mean field of x' = a x + s F(x) with fresh weights in every block.

    q' = a^2 q + s^2 q_F and chi = a^2 + s^2 chi_F; with ReLU branches and a = 1, chi = 1 + s^2 sigma_w^2 / 2. Branches
    scaled by s = 1 / sqrt(L) keep the whole network in range. With tanh(W x) the units grow like sqrt(l), so ever fewer
    of them are not saturated: log E ||g_0||^2 / ||g_L||^2 comes close to (8/3) / sqrt(2 pi) sigma_w sqrt(L), between a
    power and an exponential (Yang and Schoenholz, 2017).

    Args:
        phi: an activation.
        depth: number of blocks L.
        sigma_w: weights have the variance sigma_w^2 / fan-in.
        sigma_b: biases have the variance sigma_b^2.
        skip: the coefficient a of the skip.
        scale: the coefficient s of the branch.
        branch: F(x) = W phi(x) + b, ``"W phi(x)"``, or phi(W x + b), ``"phi(W x)"``.
        q: mean square of the units of the first state, which has mean zero.
        c: correlation of two inputs there, to follow it too.

    Raises:
        ArgumentError: an argument is out of its range.

    Example:
        >>> import math
        >>> profile = residual_profile("relu", 12, sigma_w=2**0.5)
        >>> round(math.exp(profile.log_gradient_ratio))
        4096
    """
    check(sigma_w=sigma_w, sigma_b=sigma_b, q=q, **({} if c is None else {"c": c}))
    if branch not in BRANCHES:
        raise ArgumentError(f"branch={branch!r}; expected one of {', '.join(map(repr, BRANCHES))}")
    function, last = activation(phi), branch == BRANCHES[0]
    variances, products, chis, average = [q], [q * (1.0 if c is None else c)], [], 0.0
    for _ in range(depth):
        here, product = variances[-1], products[-1]
        inner = here if last else sigma_w**2 * here + sigma_b**2
        inner_product = product if last else sigma_w**2 * product + sigma_b**2
        chis.append(skip**2 + (scale * sigma_w) ** 2 * slope_moment(function, inner).value)
        square = second_moment(function, inner).value
        correlation = inner_product / inner if inner > 0 else 1.0
        pair = product_moment(function, (inner, inner), correlation).value if c is not None else square
        shift = 0.0 if last else scale * first_moment(function, inner).value
        if last:
            square, pair = sigma_w**2 * square + sigma_b**2, sigma_w**2 * pair + sigma_b**2
        crossed = 2 * skip * average * shift  # branches that are not centred add up
        variances.append(skip**2 * here + scale**2 * square + crossed)
        products.append(skip**2 * product + scale**2 * pair + crossed)
        average = skip * average + shift
    q_all = np.array(variances)
    correlations = None if c is None else np.array(products) / q_all
    return DepthProfile(q_all, correlations, np.log(chis))
