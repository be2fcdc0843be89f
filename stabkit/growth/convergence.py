"""Whether a time average of growth can be trusted: errors corrected for autocorrelation, and halves compared."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from stabkit.statistics import series_error

_FEWEST = 20  # steps below which no error bar is believed
_APART = 4.0  # standard errors by which two halves of a run may differ


def standard_errors(series: Tensor) -> Tensor:
    """Standard error of the mean over the first dimension, corrected for autocorrelation of either sign.

    Args:
        series: ``(steps, ...)``; see `stabkit.statistics.series_error`.

    Returns:
        A tensor of the remaining shape; NaN for fewer than two steps.
    """
    return torch.from_numpy(np.asarray(series_error(series.detach().double().cpu().numpy())))


def autocorrelation_times(series: Tensor, errors: Tensor) -> Tensor:
    """How many steps carry the information of one independent step: squared error over that of white noise.

    NaN for fewer than two steps.
    """
    if len(series) < 2:
        return torch.full(series.shape[1:], math.nan, dtype=torch.float64)
    white = series.var(0) / len(series)
    return torch.where(white > 0, errors.square() / white, torch.ones_like(white))


def halves(series: Tensor) -> Tensor:
    """Means over the first and the second half, ``(2, ...)``."""
    middle = len(series) // 2
    if not middle:
        return torch.stack([series.mean(0)] * 2)
    return torch.stack([series[:middle].mean(0), series[middle:].mean(0)])


def has_converged(
    means: Tensor, errors: Tensor, split: Tensor, count: Tensor | int, absolute: float, relative: float
) -> Tensor:
    """Whether errors are within a tolerance, and the halves within the errors.

    Args:
        means: the averages.
        errors: their standard errors.
        split: ``(2, ...)``, averages over halves.
        count: how many steps they rest on.
        absolute: allowed error, in nats per step.
        relative: allowed error as a share of the average; the larger of the two counts.
    """
    allowed = torch.clamp(relative * means.abs(), min=absolute)
    rounding = 1e-12 * (1 + means.abs())
    # a half has sqrt(2) times the error of the whole, the difference of two halves 2 times
    agree = (split[0] - split[1]).abs() <= 2 * _APART * errors + rounding
    enough = torch.as_tensor(count) >= _FEWEST
    return (errors <= allowed) & agree & enough & means.isfinite()
