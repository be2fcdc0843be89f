"""The gradient at every time step of a recurrence, whatever it is written as."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

Array = npt.NDArray[np.float64]
FEWEST = 8  #: time steps from which one speaks of time


@dataclass
class TimeProfile:
    """The gradient at every time step of one recurrent module.

    Attributes:
        path: the path of the module.
        module: itself.
        log_gradient: ``(time,)``, log of the gradient norm there; -inf where nothing arrives.
        loop: whether it is called in a loop of the model, and no recurrent module of torch.
        width: size of the last axis of the states of such a loop.
        place: which of the recurrences that run inside the module without a module of their own; -1 for others.
        fed: whether gates, or other numbers that are made of the input, multiply the state.
        step: the step of depth that it runs in; -1 where that is told by its module.
        method: the method of its steps, where it was read.
        own: what a random cotangent gains on its way back over all its states alone, nats; NaN where not measured.
    """

    path: str
    module: nn.Module
    log_gradient: Array
    loop: bool = False
    width: int = 0
    place: int = -1
    fed: bool = False
    step: int = -1
    method: str = ""
    own: float = math.nan

    @property
    def growth(self) -> float:
        """What the gradient gains on its way back over time, nats: from the newest step that it reaches to the oldest.

        Means of the first and last eighths, so that one step counts little; NaN where too few steps are reached.
        """
        reached = np.flatnonzero(self.log_gradient > -math.inf)
        logs = self.log_gradient[: reached[-1] + 1] if reached.size else self.log_gradient[:0]
        if len(logs) < FEWEST:
            return math.nan
        width = max(1, len(logs) // 8)
        with np.errstate(invalid="ignore"):
            return float(_log_mean(logs[:width]) - _log_mean(logs[-width:]))


def _log_mean(logs: Array) -> float:
    top = logs.max()
    return float(top + 0.5 * np.log(np.exp(2 * (logs - top)).mean())) if np.isfinite(top) else float(top)


def logs_of(sizes: Tensor) -> Array:
    """Logs of norms; -inf of zero."""
    with np.errstate(divide="ignore"):
        logs: Array = np.log(sizes.double().numpy())
    return logs
