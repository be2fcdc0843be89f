"""Exponents of random recurrent networks with one weight matrix for all time steps.

Molgedey, Schuchhardt and Schuster, Phys. Rev. Lett. 69 (1992); Engelken, Wolf and Abbott, Phys. Rev. Research 5 (2023).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from stabkit.arguments import accepts
from stabkit.meanfield.activations import activation
from stabkit.meanfield.gaussian import mean
from stabkit.meanfield.maps import Phi
from stabkit.meanfield.phase import fixed_point
from stabkit.results import Result


@dataclass(frozen=True)
class RecurrentExponents(Result):
    """Lyapunov exponents of x <- J phi(x), J_ij ~ N(0, g^2 / n), as n goes to infinity.

    Attributes:
        q: variance of the units on the attractor.
        largest: the largest exponent, log(chi_1) / 2, in nats per time step.
        mean: the mean of all exponents, log g - 1/2 + E log |phi'|; -inf where phi' vanishes on a set of units.
        error: estimate of the error of ``mean`` from quadrature.
    """

    q: float
    largest: float
    mean: float
    error: float


@accepts
def recurrent_exponents(phi: Phi, g: float) -> RecurrentExponents:
    """Largest and mean Lyapunov exponent of a random recurrent network, x <- J phi(x).

    Dynamic mean field theory gives the same largest exponent as for fresh weights in every step, log(chi_1) / 2. At
    finite width the measured one lies lower: at n = 400 and g = 2 between .148 and .152 for tanh.

    Args:
        phi: an activation.
        g: J has entries of variance g^2 / n.

    Raises:
        ArgumentError: g is negative or not finite.

    Example:
        >>> found = recurrent_exponents("tanh", 2.0)
        >>> round(found.largest, 6), round(found.mean, 3)
        (0.154724, -1.149)
    """
    function = activation(phi)
    state = fixed_point(function, sigma_w=g)
    q = min(max(state.q, 1e-12), 1e10)
    slope, error = mean(function.log_slope, q, function.kinks)
    volume = math.log(g) - 0.5 + float(slope) if g > 0 else -math.inf
    return RecurrentExponents(state.q, state.exponent, volume, float(error))
