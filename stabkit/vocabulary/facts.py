"""What is known of an activation, and of a normalisation."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from stabkit.errors import ArgumentError

Function = Callable[..., Any]


@dataclass(frozen=True)
class ActivationFacts:
    """What is known of an activation, a function that acts on every number alone.

    Attributes:
        name: what it is called: ``"tanh"``.
        slope: least and largest derivative (infimum and supremum).
        limits: its values far below and far above zero; NaN where there is none.
        kinks: points where it or its derivative is not smooth.
        piecewise_linear: whether it is linear between its kinks.
        parameters: what it was made with, by name; they are arguments of ``function``.
        function: the function itself, on tensors; None where more than the parameters is needed to compute it.
    """

    name: str
    slope: tuple[float, float]
    limits: tuple[float, float]
    kinks: tuple[float, ...] = ()
    piecewise_linear: bool = False
    parameters: Mapping[str, Any] = field(default_factory=dict)
    function: Function | None = None

    def __post_init__(self) -> None:
        (low, high), (below, above) = self.slope, self.limits
        if not low <= high:
            raise ArgumentError(f"slope=({low:g}, {high:g}): expected the least derivative first, then the largest")
        if (low >= 0 and below > above) or (high <= 0 and below < above):
            raise ArgumentError(
                f"slope=({low:g}, {high:g}) contradicts limits=({below:g}, {above:g}): a derivative of one sign makes "
                "the function monotone; expected limits in that order"
            )
        if math.isfinite(below - above) and (low > 0 or high < 0):
            raise ArgumentError(
                f"slope=({low:g}, {high:g}) contradicts limits=({below:g}, {above:g}): a function with a derivative "
                "away from zero is not bounded; expected an infinite limit"
            )

    @property
    def steepest(self) -> float:
        """The largest size of the derivative: its Lipschitz constant."""
        return max(map(abs, self.slope))

    @property
    def is_bounded(self) -> bool:
        """Whether both limits are finite."""
        return all(map(math.isfinite, self.limits))

    @property
    def rectifies(self) -> bool:
        """Whether it is constant on all negative numbers, as the ReLU is: a unit there is off."""
        return self.piecewise_linear and math.isfinite(self.limits[0]) and min(self.kinks) >= 0

    @property
    def flat_side(self) -> str:
        """Where its derivative dies out: ``"both"``, ``"below"``, ``"above"`` or ``"none"``.

        A unit that stays on the one flat side is dead, one that stays on either of two is saturated. One that
        rectifies counts as flat below, also where it is cut off above (ReLU6).
        """
        below, above = map(math.isfinite, self.limits)
        return "both" if below and above and not self.rectifies else "below" if below else "above" if above else "none"

    @property
    def gain(self) -> float:
        """What weights are multiplied with so that the mean square is kept: (E phi(z)^2)^(-1/2), z standard normal.

        Source: He et al., Delving deep into rectifiers, 2015.

        Example:
            >>> relu = ActivationFacts("relu", (0, 1), (0, math.inf), function=torch.relu)
            >>> round(relu.gain**2, 6)
            2.0
        """
        if self.function is None:
            return math.nan
        z = torch.linspace(-12.0, 12.0, 48001, dtype=torch.float64)
        density = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
        return 1 / math.sqrt(float(torch.trapezoid(self.function(z).square() * density, z)))


@dataclass(frozen=True)
class NormFacts:
    """What is known of a normalisation, a map whose result does not change when its input is scaled.

    Attributes:
        name: what it is called: ``"layer_norm"``.
        over: what its statistics are taken over, of ``"batch"``, ``"positions"``, ``"group"``, ``"features"``; empty
            where it is known by its name alone.
        centred: whether it takes the mean away; None where it is known by its name alone.
        running: whether it can hold running statistics, and is affine in its input when it uses them.
    """

    name: str
    over: tuple[str, ...]
    centred: bool | None
    running: bool = False

    @property
    def per_sample(self) -> bool:
        """Whether a sample is normalised by itself, whatever its batch."""
        return "batch" not in self.over
