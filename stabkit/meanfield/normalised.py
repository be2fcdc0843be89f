"""Normalised random networks: batch norm makes plain nets explode, a skip turns that into a power of depth.

Yang et al., "A mean field theory of batch normalization", ICLR 2019 (eq. 25); De and Smith, "Batch normalization biases
residual blocks towards the identity function in deep networks", NeurIPS 2020; Xiong et al., "On layer normalization in
the transformer architecture", ICML 2020; Doshi et al., "Critical initialization of wide and deep neural networks
through partial Jacobians", NeurIPS 2023.
"""

from __future__ import annotations

import math

import numpy as np

from stabkit.arguments import accepts
from stabkit.errors import ArgumentError
from stabkit.meanfield.activations import activation
from stabkit.meanfield.maps import Phi, check, first_moment, second_moment, slope_moment
from stabkit.meanfield.residual import DepthProfile

NORMS = ("layer", "rms")


@accepts
def batch_norm_rate(phi: Phi = "relu", batch: int | None = None) -> float:
    """Growth of the squared gradient per layer of a plain network x' = phi(BN(W x)), training mode, towards the input.

    In the limit of large batches E phi'^2 / Var phi over a standard normal: pi / (pi - 1) = 1.467 for the ReLU, the
    square of the 1.21 that is often quoted. No choice of sigma_w changes it, for the norm divides it out.

    Args:
        phi: an activation; ``"relu"`` or ``"linear"`` for a finite batch.
        batch: samples per batch, at least 4; None for the limit.

    Raises:
        ArgumentError: the batch is too small, or there is no formula for this activation at finite batch.

    Example:
        >>> round(batch_norm_rate("relu"), 5), batch_norm_rate("linear", 5)
        (1.46694, 1.5)
    """
    function = activation(phi)
    if batch is None:
        variance = second_moment(function, 1.0).value - first_moment(function, 1.0).value ** 2
        return slope_moment(function, 1.0).value / variance
    if batch < 4:
        raise ArgumentError(f"batch={batch}; expected at least 4 samples: with fewer the mean square is infinite")
    if function.name == "linear":
        return (batch - 2) / (batch - 3)
    if function.name != "relu":
        raise ArgumentError(f"phi={function.name}, batch={batch}; a finite batch is known for 'relu' and 'linear' only")
    c = -1 / (batch - 1)
    kappa_1 = (math.sqrt(1 - c * c) + c * (math.pi - math.acos(c))) / math.pi
    kappa_0 = 1 - math.acos(c) / math.pi
    grown = (batch - 1) * (kappa_0 + batch - 1) / ((batch - 3) * (batch - 1) * (1 - kappa_1))
    return grown - 1 / (batch - 3)


@accepts
def batch_norm_residual_profile(
    depth: int, *, pairs: int = 1, phi: Phi = "relu", sigma_w: float = math.sqrt(2), q: float = 1.0
) -> DepthProfile:
    """Mean field of x' = x + F(x), F made of ``pairs`` of batch norm, activation and weights, for large batches.

    Squared gradients follow (L / l)^p with p = `batch_norm_rate` ** pairs, 2.15 for two BN-ReLU pairs: a power of
    depth, not an exponential. Every block adds the same variance over the batch, sigma_w^2 Var phi, to that of the
    stream; for He weights and ReLU (pi - 1) / pi = .68.

    Args:
        depth: number of blocks.
        pairs: norm-activation-weight groups in each branch.
        phi: an activation.
        sigma_w: weights have the variance sigma_w^2 / fan-in.
        q: variance over the batch of the first state.

    Raises:
        ArgumentError: an argument is out of its range.

    Example:
        >>> profile = batch_norm_residual_profile(3)
        >>> (profile.q[1:] - profile.q[:-1]).round(4).tolist()
        [0.6817, 0.6817, 0.6817]
    """
    check(sigma_w=sigma_w, q=q)
    function = activation(phi)
    added = sigma_w**2 * (second_moment(function, 1.0).value - first_moment(function, 1.0).value ** 2)
    stream = q + added * np.arange(depth + 1.0)
    branch = added * batch_norm_rate(function) ** pairs
    return DepthProfile(stream, None, np.log1p(branch / stream[:-1]))


@accepts
def norm_gain(width: int, q: float, norm: str = "layer") -> float:
    """Mean squared singular value of a norm layer on inputs of variance q, in one sample: (1 - k / n) / q.

    Layer norm has k = 2 zero singular values (the mean and the radial direction), RMS norm k = 1; the others are equal.

    Args:
        width: units n that are normalised together.
        q: their variance (mean square for RMS norm).
        norm: ``"layer"`` or ``"rms"``.

    Raises:
        ArgumentError: an argument is out of its range.

    Example:
        >>> norm_gain(8, 4.0), norm_gain(8, 4.0, "rms")
        (0.1875, 0.21875)
    """
    check(q=q)
    if norm not in NORMS:
        raise ArgumentError(f"norm={norm!r}; expected 'layer' or 'rms'")
    zeros = 2 if norm == "layer" else 1
    if width <= zeros or q == 0:
        raise ArgumentError(f"width={width}, q={q}; expected more than {zeros} units and a positive variance")
    return (1 - zeros / width) / q


@accepts
def prenorm_profile(
    phi: Phi,
    depth: int,
    *,
    sigma_in: float,
    sigma_out: float,
    skip: float = 1.0,
    scale: float = 1.0,
    q: float = 1.0,
) -> DepthProfile:
    """Mean field of x' = a x + s W_2 phi(W_1 N(x)), N a layer or RMS norm, for wide layers.

    q grows linearly and chi_l - 1 falls like 1 / l: gradients grow as a power of depth, and relative to the units
    (``log_chi_relative``) hardly at all, for any weights.

    Args:
        phi: an activation.
        depth: number of blocks.
        sigma_in: W_1 has entries of variance sigma_in^2 / fan-in.
        sigma_out: W_2 has entries of variance sigma_out^2 / fan-in.
        skip: the coefficient a of the skip.
        scale: the coefficient s of the branch.
        q: variance of the first state.

    Raises:
        ArgumentError: an argument is out of its range.

    Example:
        >>> prenorm_profile("relu", 4, sigma_in=1.0, sigma_out=2**0.5).q.round(6).tolist()
        [1.0, 2.0, 3.0, 4.0, 5.0]
    """
    check(sigma_in=sigma_in, sigma_out=sigma_out, q=q)
    function = activation(phi)
    added = (scale * sigma_out) ** 2 * second_moment(function, sigma_in**2).value
    branch = (scale * sigma_out * sigma_in) ** 2 * slope_moment(function, sigma_in**2).value
    stream = [q]
    for _ in range(depth):
        stream.append(skip**2 * stream[-1] + added)
    units = np.array(stream)
    return DepthProfile(units, None, np.log(skip**2 + branch / units[:-1]))


@accepts
def postnorm_chi(phi: Phi, *, sigma_in: float, sigma_out: float, skip: float = 1.0, scale: float = 1.0) -> float:
    """Growth of the squared gradient per block of x' = N(a x + s W_2 phi(W_1 x)), for wide layers.

    (a^2 + s^2 chi_F) / (a^2 + s^2 q_F), with units of variance 1 before and after.

    Raises:
        ArgumentError: an argument is out of its range.

    Example:
        >>> round(postnorm_chi("relu", sigma_in=1.0, sigma_out=2**0.5), 12)
        1.0
    """
    profile = prenorm_profile(phi, 1, sigma_in=sigma_in, sigma_out=sigma_out, skip=skip, scale=scale)
    return float(np.exp(profile.log_chi[0]) / profile.q[1])
