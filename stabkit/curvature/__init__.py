"""Curvature of the loss in the parameters: is this learning rate stable on this loss?

Example:
    >>> import torch
    >>> from stabkit.curvature import sharpness
    >>> model, x = torch.nn.Linear(1, 1, bias=False).double(), torch.ones(4, 1).double()
    >>> round(float(sharpness(model, x, loss=lambda out: out.square().mean()).values[0]), 9)
    2.0
"""

from stabkit.curvature.blocks import BlockCurvature
from stabkit.curvature.critical_rate import CriticalRate, critical_rate
from stabkit.curvature.schedules import RatesAhead, rates_ahead
from stabkit.curvature.secant import PendingSecant, Secant, SecantCurvature
from stabkit.curvature.sharpness import Sharpness, sharpness
from stabkit.curvature.tracking import SharpnessTracker, TrackedSharpness
from stabkit.curvature.updates import NoThresholdError, NotYetError

__all__ = [
    "BlockCurvature",
    "CriticalRate",
    "NoThresholdError",
    "NotYetError",
    "PendingSecant",
    "RatesAhead",
    "Secant",
    "SecantCurvature",
    "Sharpness",
    "SharpnessTracker",
    "TrackedSharpness",
    "critical_rate",
    "rates_ahead",
    "sharpness",
]
