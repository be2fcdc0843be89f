"""What is wrong, where, how sure that is, and what to change: verdicts and findings from measured growth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Thresholds:
    """The limits behind a verdict, in nats of gradient growth over the whole stretch of blocks.

    One learning rate serves layers whose gradients lie within about a factor of a thousand of each other.

    Attributes:
        stable: growth within plus or minus this is stable (a factor of 10).
        drift: growth within plus or minus this is a drift; beyond, it is exploding or vanishing (a factor of 1000).
        confidence: level of the intervals.
        resamples: bootstrap resamples behind an interval.
    """

    stable: float = math.log(10.0)
    drift: float = math.log(1e3)
    confidence: float = 0.95
    resamples: int = 2000

    def to_dict(self) -> dict[str, float]:
        """The limits by name."""
        return asdict(self)


@dataclass(frozen=True)
class Finding:
    """One diagnosed fact.

    Attributes:
        kind: ``"exploding"``, ``"vanishing"`` or ``"non_finite"``.
        severity: ``"info"``, ``"warning"`` or ``"critical"``.
        steps: indices of the steps where it happens.
        module_path: the module that contributes most.
        confidence: share of bootstrap resamples that agree, 0 to 1.
        evidence: the numbers behind it.
        remedy: what to change.
        reference: where the reasoning comes from.
    """

    kind: str
    severity: str
    steps: tuple[int, ...]
    module_path: str
    confidence: float
    evidence: str
    remedy: str
    reference: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Verdict:
    """The verdict on a stretch of steps, with the growth that it rests on.

    Attributes:
        name: ``"stable"``, ``"drift"``, ``"exploding"``, ``"vanishing"``, ``"inconclusive"`` or ``"non-finite"``.
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
    total: Array = log_growth[first : last + 1].sum(axis=0)
    if np.isnan(total).any() or np.isposinf(total).any():
        return Verdict(
            "non-finite",
            "Gradients or states are not finite.",
            float("nan"),
            (float("nan"), float("nan")),
            (first, last),
        )
    growth = float(total.mean())
    low, high = (growth, growth) if np.isinf(total).any() else bootstrap_interval(total, thresholds, seed)
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
        "drift": f"Drift: {change}; one learning rate still serves all layers.",
        "exploding": f"Exploding: {change}.",
        "vanishing": f"Vanishing: {change}.",
        "inconclusive": f"Inconclusive: {change}, but the samples disagree; analyse more of them.",
    }[name]


def diagnose_growth(
    verdict: Verdict,
    log_growth: Array,
    names: Sequence[str],
    paths: Sequence[str],
    skips: Sequence[float | None],
    thresholds: Thresholds,
    seed: int,
) -> tuple[Finding, ...]:
    """Findings behind a verdict; none when it is healthy.

    Args:
        verdict: from `judge`.
        log_growth: ``(steps, samples)`` in nats.
        names: names of the steps.
        paths: their module paths.
        skips: the coefficient a of x' = a x + f(x) of every step, None where none was read.
        thresholds: the limits.
        seed: of the bootstrap.
    """
    first, last = verdict.stretch
    if verdict.name == "non-finite":
        bad = np.flatnonzero(~np.isfinite(log_growth).all(axis=1) & ~np.isneginf(log_growth).all(axis=1))
        where = int(bad[-1]) if bad.size else last  # the gradient travels from the last step to the first
        evidence = f"the gradient is not finite at {names[where]}, the first step it meets on its way back"
        remedy = f"look at the output of {paths[where] or names[where]}: its weights or activations overflow or are NaN"
        steps = tuple(int(i) for i in bad) or (where,)
        return (Finding("non_finite", "critical", steps, paths[where], 1.0, evidence, remedy, ""),)
    if verdict.name not in ("exploding", "vanishing"):
        return ()
    rates = log_growth[first : last + 1].mean(axis=1)
    sign = 1.0 if verdict.name == "exploding" else -1.0
    worst = first + int(np.argmax(sign * rates))
    totals: Array = log_growth[first : last + 1].sum(axis=0)
    agree = 1.0 if np.isinf(totals).any() else _agreement(sign * totals, thresholds, seed)
    low, high = verdict.interval
    evidence = (
        f"log growth {verdict.growth:+.1f} nats ({thresholds.confidence:.0%} interval {low:+.1f} to {high:+.1f}) over "
        f"{last - first + 1} steps, {verdict.growth / (last - first + 1):+.2f} a step; most at {names[worst]} "
        f"({rates[worst - first]:+.2f})"
    )
    remedy = _remedy(verdict.name, float(np.median(rates)), [skips[i] for i in range(first, last + 1)])
    reference = "Yang et al., ICML 2020; Haber and Ruthotto, 2017"
    return (
        Finding(
            verdict.name, "critical", tuple(range(first, last + 1)), paths[worst], agree, evidence, remedy, reference
        ),
    )


def _agreement(signed_totals: Array, thresholds: Thresholds, seed: int) -> float:
    return float((_resampled_means(signed_totals, thresholds.resamples, seed) > thresholds.drift).mean())


def _remedy(name: str, rate: float, skips: Sequence[float | None]) -> str:
    """What undoes a typical step's growth of ``rate`` nats."""
    known = [a for a in skips if a is not None]
    residual = sum(a == 1.0 for a in known) > len(known) / 2
    scale = math.exp(-rate) if math.isfinite(rate) else math.inf
    if residual and name == "exploding":
        return (
            "scale the branches: x + h f(x) with h near 1/sqrt(depth), or start the last layer of each branch at zero; "
            "or damp the skip: (1 - lambda) x + f(x)"
        )
    if residual:
        return "the skip itself loses gradient: look for norms or activations after the addition, and move them inside"
    if math.isfinite(scale):
        return (
            f"multiply the weights of each of these layers by about {scale:.2g} (an initialisation of gain 1), "
            "or give them a skip: x + f(x)"
        )
    return "a layer passes nothing back: look for dead or saturated units, or weights that are zero"
