"""The verdict on measured growth, with the interval it rests on.

What the findings say besides is added later: `stabkit.diagnosis.suspects` tells growth that passes and chaos apart,
`stabkit.diagnosis.examination` what was not judged and what is a known initialisation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from stabkit.diagnosis.finding import Finding
from stabkit.diagnosis.kinds import leading
from stabkit.diagnosis.thresholds import Thresholds
from stabkit.statistics import mean_interval

Array = npt.NDArray[np.float64]
_FEWEST_BLOCKS = 2  # steps that keep their space, from which growth over depth can be judged


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


def stretch_of_blocks(kinds: Sequence[str]) -> tuple[int, int]:
    """From the first to the last step that keeps the space; everything, when there is none.

    A stem or a head changes the space, so that the norm ratio across it depends on how many coordinates there are.
    """
    blocks = [index for index, kind in enumerate(kinds) if kind == "step"]
    return (blocks[0], blocks[-1]) if blocks else (0, len(kinds) - 1)


def judge(log_growth: Array, kinds: Sequence[str], thresholds: Thresholds) -> Verdict:
    """The verdict on measured growth.

    Args:
        log_growth: ``(steps, samples)`` in nats, samples being inputs and random cotangents.
        kinds: kind of every step.
        thresholds: the limits.
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
        low, high = mean_interval(total[through], thresholds.confidence)
    name = _name(low, high, thresholds)
    count = last - first + 1
    found = Verdict(name, _summary(name, growth, (low, high), count, thresholds), growth, (low, high), (first, last))
    blocks = sum(kind == "step" for kind in kinds)
    alone = count == 1 and blocks == 0 and math.isfinite(growth)  # a model that is one step between two spaces
    if blocks < _FEWEST_BLOCKS and (name in ("stable", "drift") or alone):
        return not_judged(found, _too_few(blocks, len(kinds)))
    return found


def not_judged(verdict: Verdict, why: str) -> Verdict:
    """The same measurement without a verdict, and why there is none."""
    return replace(verdict, name="not judged", summary=f"Not judged: {why}.")


def judged_without(verdict: Verdict, other: Verdict, what: str) -> Verdict:
    """The verdict that holds without what a model was made with, and will be trained out of."""
    told = other.summary[:1].lower() + other.summary[1:]
    return replace(verdict, name=other.name, summary=f"{other.name.capitalize()} but for {what}; without it, {told}")


def judged_harmless(verdict: Verdict, why: str, how: str = "the model learns all the same") -> Verdict:
    """A drift in the place of a verdict on growth beyond the limits that keeps a model from nothing."""
    count = verdict.stretch[1] - verdict.stretch[0] + 1
    steps = f"{count} step{'s' if count != 1 else ''}"
    change = f"over {steps} the gradient changes by a factor of {factor(verdict.growth)} on its way back"
    return replace(verdict, name="drift", summary=f"Drift: {change}, and {how}: {why}.")


_NOTHING = "; by itself it asks for nothing"


def led_by_findings(verdict: Verdict, findings: Sequence[Finding]) -> Verdict:
    """A verdict whose summary begins with the worst finding, where that is a warning or more and another matter."""
    worst = leading(verdict.name, findings)
    if worst is None:
        return verdict
    place = f" at {worst.module_path}" if worst.module_path else ""
    depth = verdict.summary[:1].lower() + verdict.summary[1:].replace(_NOTHING, "")
    said = f"{worst.severity.capitalize()}{place}: {_first_clause(worst.evidence)}. Depth alone: {depth}"
    return replace(verdict, summary=said)


def _first_clause(evidence: str) -> str:
    """What stands before the first semicolon that is outside brackets: lists within them are not cut in two."""
    end = evidence.find("; ")
    while end >= 0 and evidence.count("(", 0, end) > evidence.count(")", 0, end):
        end = evidence.find("; ", end + 1)
    return evidence if end < 0 else evidence[:end]


def _too_few(blocks: int, count: int) -> str:
    """Why growth over so few blocks says nothing."""
    if blocks == 0:
        if count == 1:
            return "the model is one step that changes its space, and growth from one space to another has no zero"
        return (
            f"each of the {count} steps changes its space, or hands on one state more, kept for the output; and growth "
            "from one space to another has no zero"
        )
    return f"one step alone keeps its space, and {count - 1} change it; growth over one block says nothing of depth"


def _name(low: float, high: float, thresholds: Thresholds) -> str:
    if low > thresholds.explosion:
        return "exploding"
    if high < -thresholds.explosion:
        return "vanishing"
    if -thresholds.stable <= low and high <= thresholds.stable:
        return "stable"
    if -thresholds.explosion <= low and high <= thresholds.explosion:
        return "drift"
    return "inconclusive"


def factor(growth: float) -> str:
    """A growth in nats as a factor that a person can read, also where it leaves the range of a float.

    Example:
        >>> factor(0.0), factor(8.0), factor(-2000.0), factor(float("-inf"))
        ('1', '2980', '10^-869', '0')
    """
    if not math.isfinite(growth):
        return "0" if growth == -math.inf else str(growth)
    if abs(growth) >= 10:
        return f"10^{growth / math.log(10):.0f}"
    rounded = float(f"{math.exp(growth):.3g}")
    return f"{rounded:.0f}" if rounded >= 1000 else f"{rounded:.3g}"


def nats(growth: float) -> str:
    """A growth in nats, in words where it is not finite.

    Example:
        >>> nats(-1.234), nats(float("-inf"))
        ('-1.23 nats', 'nothing passes')
    """
    if growth == -math.inf:
        return "nothing passes"
    return f"{growth:+.2f} nats" if math.isfinite(growth) else "not finite"


def _summary(name: str, growth: float, interval: tuple[float, float], count: int, thresholds: Thresholds) -> str:
    steps = f"{count} step{'s' if count != 1 else ''}"
    change = f"over {steps} the gradient changes by a factor of {factor(growth)} on its way back"
    if abs(growth) > thresholds.stable:
        reach = "That is"
    else:  # the mean by itself would be stable: what it may be over other samples is not
        low, high = (factor(end) for end in interval)
        reach = f"The samples differ, so that it may be anything from {low} to {high}:"
    return {
        "stable": f"Stable: {change}.",
        "drift": f"Drift: {change}. {reach} beyond the factor of {factor(thresholds.stable)}, up or down, that counts "
        f"as stable, and within the {factor(thresholds.explosion)} from which a finding is made of it{_NOTHING}.",
        "exploding": f"Exploding: {change}.",
        "vanishing": f"Vanishing: {change}.",
        "inconclusive": f"Inconclusive: {change}, but the samples disagree; analyse more of them.",
    }[name]
