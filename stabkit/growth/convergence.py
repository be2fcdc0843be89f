"""Whether a time average of growth can be trusted: errors corrected for autocorrelation, and halves compared."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_FEWEST = 20  # steps below which no error bar is believed
_APART = 4.0  # standard errors by which two halves of a run may differ


def standard_errors(series: Tensor) -> Tensor:
    """Standard error of the mean over the first dimension, corrected for autocorrelation.

    Overlapping batch means: the spread of means over stretches contains what correlations do to them, of either sign.
    Stretches have the length ``steps^(2/3)``, at most a tenth of all: chaotic oscillations average out only over many
    turns.

    Args:
        series: ``(steps, ...)``.

    Returns:
        A tensor of the remaining shape; NaN for fewer than two steps.

    Source:
        Meketon and Schmeiser, "Overlapping batch means: something for nothing?" (1984); conditions on
        the batch size in Flegal and Jones, "Batch means and spectral variance estimators in Markov chain Monte Carlo"
        (2010).

    Example:
        >>> noise = torch.randn(10_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        >>> bool(abs(standard_errors(noise) - 0.01) < 0.002)
        True
    """
    count = len(series)
    if count < 2:
        return torch.full(series.shape[1:], math.nan, dtype=torch.float64)
    length = max(1, min(round(count ** (2 / 3)), count // 10))
    centred = series - series.mean(0)
    sums = torch.cat([torch.zeros_like(centred[:1]), centred.cumsum(0)])
    means = (sums[length:] - sums[:-length]) / length
    batches = count - length + 1
    variance = count * length / ((count - length) * batches) * means.square().sum(0)
    errors: Tensor = (variance / count).sqrt()
    return errors


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
