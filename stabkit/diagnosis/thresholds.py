"""The limits behind verdicts and findings, all in one place."""

from __future__ import annotations

import math
from dataclasses import dataclass

from stabkit.results import Result


@dataclass(frozen=True)
class Thresholds(Result):
    """The limits behind verdicts and findings. Growths are in nats and over the whole stretch of blocks.

    One learning rate serves layers whose gradients lie within about a factor of a thousand of each other.

    Attributes:
        stable: growth within plus or minus this is stable (a factor of 10).
        explosion: beyond plus or minus this, growth is exploding or vanishing (a factor of 1000); between `stable` and
            this it is a drift.
        confidence: level of the intervals.
        rate_law: advantage in AIC that an exponential law must have over a power law before a growth counts as
            exponential. The power law of a normalised residual network is a drift, however deep the network.
        outlier: how many robust standard deviations a block must lie from its peers to be a local fault.
        outlier_weight: smallest deviation of a weight from the same weight of the peers, nats (a factor of 3).
        outlier_behaviour: smallest deviation of a block's gain, where the sizes of its weights say nothing, and of the
            effective rank of a matrix (a factor of 4).
        dead: share of the units of a layer that pass nothing for any sample, from which the layer is dead.
        saturated: share of a layer's entries where the derivative is below a twentieth of its largest value.
        collapsed: share of a state's energy that still tells samples or tokens apart, under which its rank collapsed.
        mechanism: share of the growing energy from which discretisation counts as its mechanism.
        lost: share of numbers lost to rounding or underflow from which precision loss is a warning.
        homogeneous: fewest alike layers that a statement about chaos needs, when weights are not tied.
    """

    stable: float = math.log(10.0)
    explosion: float = math.log(1e3)
    confidence: float = 0.95
    rate_law: float = 10.0
    outlier: float = 6.0
    outlier_weight: float = math.log(3.0)
    outlier_behaviour: float = math.log(4.0)
    dead: float = 0.9
    saturated: float = 0.8
    collapsed: float = 1e-4
    mechanism: float = 0.5
    lost: float = 0.5
    homogeneous: int = 20
