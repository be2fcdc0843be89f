"""The verdict on measured growth, with the interval it rests on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from stabkit.diagnosis.thresholds import Thresholds

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Verdict:
    """The verdict on a stretch of steps, with the growth that it rests on.

    Attributes:
        name: one of `stabkit.diagnosis.VERDICTS`.
        summary: the verdict in a sentence.
        growth: mean log growth over the stretch, in nats.
        interval: its confidence interval.
        stretch: first and last step that it is about.
    """

    name: str
    summary: str
    growth: float
    interval: tuple[float, float]
    stretch: tuple[int, int]


def bootstrap_interval(values: Array, thresholds: Thresholds, seed: int) -> tuple[float, float]:
    """Percentile interval of the mean over samples; the value itself when there is only one.

    Samples share the weights, so this is a statement about this network and not about its initialisation.
    """
    means = _resampled_means(values, thresholds.resamples, seed)
    tail = 50 * (1 - thresholds.confidence)
    low, high = np.percentile(means, [tail, 100 - tail])
    return float(low), float(high)


def share_beyond(values: Array, thresholds: Thresholds, seed: int) -> float:
    """Share of bootstrap means of ``values`` that lie beyond the limit of drift."""
    return float((_resampled_means(values, thresholds.resamples, seed) > thresholds.drift).mean())


def _resampled_means(values: Array, resamples: int, seed: int) -> Array:
    rng = np.random.default_rng(seed)
    picks = rng.integers(0, len(values), size=(resamples, len(values)))
    means: Array = values[picks].mean(axis=1)
    return means


def stretch_of_blocks(kinds: Sequence[str]) -> tuple[int, int]:
    """From the first to the last step that keeps the space; everything, when there is none.

    A stem or a head changes the space, so that the norm ratio across it depends on how many coordinates there are.
    """
    blocks = [index for index, kind in enumerate(kinds) if kind == "step"]
    return (blocks[0], blocks[-1]) if blocks else (0, len(kinds) - 1)


def judge(log_growth: Array, kinds: Sequence[str], thresholds: Thresholds, seed: int) -> Verdict:
    """The verdict on measured growth.

    Args:
        log_growth: ``(steps, samples)`` in nats, samples being inputs and random cotangents.
        kinds: kind of every step.
        thresholds: the limits.
        seed: of the bootstrap.
    """
    first, last = stretch_of_blocks(kinds)
    with np.errstate(invalid="ignore"):  # infinitely much times nothing is NaN
        total: Array = log_growth[first : last + 1].sum(axis=0)
    if np.isnan(total).any() or np.isposinf(total).any():
        return Verdict(
            "non-finite",
            "Gradients or states are not finite.",
            float("nan"),
            (float("nan"), float("nan")),
            (first, last),
        )
    through = np.isfinite(total)
    if through.sum() <= len(total) / 2:
        growth = low = high = -np.inf  # nothing comes back for most samples
    else:
        growth = float(total[through].mean())
        low, high = bootstrap_interval(total[through], thresholds, seed)
    name = _name(low, high, thresholds)
    count = last - first + 1
    return Verdict(name, _summary(name, growth, count), growth, (low, high), (first, last))


def _name(low: float, high: float, thresholds: Thresholds) -> str:
    if low > thresholds.drift:
        return "exploding"
    if high < -thresholds.drift:
        return "vanishing"
    if -thresholds.stable <= low and high <= thresholds.stable:
        return "stable"
    if -thresholds.drift <= low and high <= thresholds.drift:
        return "drift"
    return "inconclusive"


def factor(growth: float) -> str:
    """A growth in nats as a factor that a person can read, also where it leaves the range of a float.

    Example:
        >>> factor(0.0), factor(-2000.0), factor(float("-inf"))
        ('1', '10^-869', '0')
    """
    if not math.isfinite(growth):
        return "0" if growth == -math.inf else str(growth)
    return f"{math.exp(growth):.3g}" if abs(growth) < 10 else f"10^{growth / math.log(10):.0f}"


def _summary(name: str, growth: float, count: int) -> str:
    steps = f"{count} step{'s' if count != 1 else ''}"
    change = f"over {steps} the gradient changes by a factor of {factor(growth)} on its way back"
    return {
        "stable": f"Stable: {change}.",
        "drift": f"Drift: {change}: more than a factor of 10, less than what usually breaks training.",
        "exploding": f"Exploding: {change}.",
        "vanishing": f"Vanishing: {change}.",
        "inconclusive": f"Inconclusive: {change}, but the samples disagree; analyse more of them.",
    }[name]
