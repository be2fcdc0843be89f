"""Faults of a whole stretch: growth and decay over depth, transient growth, and the mechanism behind them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction

import numpy as np

from stabkit.attribution import Mechanism
from stabkit.diagnosis.finding import Action, Finding
from stabkit.diagnosis.measurement import Array, Measurement, StepMeasurement
from stabkit.diagnosis.remedies import computed as remedies
from stabkit.diagnosis.thresholds import Thresholds
from stabkit.diagnosis.verdict import Verdict, factor, nats
from stabkit.statistics import confidence_above, mean_interval
from stabkit.tracing import Flow

_ROUNDING = 1e-3  # nats
_REFERENCE = "Yang et al., ICML 2020; Haber and Ruthotto, 2017"
_FLAT = math.log(0.5)  # mean log derivative from which a tanh takes part


def growth_finding(
    verdict: Verdict, measurement: Measurement, tied: Mapping[str, float], thresholds: Thresholds
) -> list[Finding]:
    """The finding behind a verdict of exploding or vanishing, if it is one; ``tied`` are the matrices of a tied map."""
    if verdict.name not in ("exploding", "vanishing"):
        return []
    first, last = verdict.stretch
    steps = measurement.steps[first : last + 1]
    rows = measurement.growth[first : last + 1]
    rates = rows.mean(axis=1)
    sign = 1.0 if verdict.name == "exploding" else -1.0
    # the first of those that are as large but for rounding: layers alike may well tie, in each unit of the loss anew
    worst = first + int(np.flatnonzero(sign * rates >= np.nanmax(sign * rates) - _ROUNDING)[0])
    totals: Array = rows.sum(axis=0)
    sure = 1.0 if np.isinf(totals).any() else confidence_above(sign * totals, thresholds.explosion)
    low, high = verdict.interval
    count = last - first + 1
    beside = remedies.branches_beside(steps, measurement.steps)
    remedy = remedies.for_stretch(steps, verdict.growth, thresholds.stable, tied, beside)
    evidence = (
        f"log growth {verdict.growth:+.1f} nats ({thresholds.confidence:.0%} interval {low:+.1f} to {high:+.1f}) over "
        f"{count} steps ({steps[0].name} to {steps[-1].name}), {verdict.growth / count:+.2f} a step; most at "
        f"{measurement.steps[worst].name} "
        f"({nats(float(rates[worst - first]))})"
        if math.isfinite(verdict.growth)
        else f"over {count} step{'s' * (count > 1)} nothing comes back to the first; it is lost at "
        f"{measurement.steps[worst].name}"
    )
    evidence += _bounded(steps) if verdict.growth < 0 else ""
    relative = _relative(measurement, first, last)
    if math.isfinite(relative):
        evidence += f"; relative to the size of the states {relative:+.1f}"
    return [
        Finding(
            kind=verdict.name,
            severity="critical",
            steps=tuple(range(first, last + 1)),
            module_path=measurement.steps[worst].module_path,
            confidence=sure,
            evidence=evidence,
            remedy=remedy.text,
            reference=_REFERENCE,
            numbers={"growth": verdict.growth, "low": low, "high": high, "rate": verdict.growth / count},
            actions=remedy.actions,
        )
    ]


def _bounded(steps: Sequence[StepMeasurement]) -> str:
    """What saturating activations alone take from the gradient, by name, with the largest derivative they have."""
    parts = []
    saturating = [a for step in steps for a in step.activities if a.facts.flat_side == "both" and not a.gate]
    for name in sorted({a.operation for a in saturating}):
        found = [a for a in saturating if a.operation == name]
        steep = found[0].facts.steepest
        typical = sum(a.log_derivative for a in found) + len(found) * math.log(steep)
        if found and typical < -1.0:
            parts.append(
                f"; its {len(found)} {name.lower()} activations pass at most {steep:.3g} of a gradient each, and take "
                f"{typical:+.1f} nats as they are"
            )
    return "".join(parts)


def _relative(measurement: Measurement, first: int, last: int) -> float:
    """Growth of the gradient times the state, which does not see by what the states are scaled."""
    with np.errstate(invalid="ignore"):
        states = measurement.log_states[first].mean() - measurement.log_states[last + 1].mean()
        return float(measurement.growth[first : last + 1].mean(axis=1).sum() + states)


def transient(
    measurement: Measurement, stretch: tuple[int, int], total: float, thresholds: Thresholds
) -> Finding | None:
    """Growth over part of a stretch that the rest of it takes back, if it is large beside the change over the whole."""
    first, last = stretch
    rows = measurement.growth[first : last + 1]
    if not np.isfinite(rows).all() or not math.isfinite(total):
        return None
    start, stop = _largest_run(rows.mean(axis=1))
    inside = rows[start : stop + 1].sum(axis=0)
    low, high = mean_interval(inside, thresholds.confidence)
    limit = thresholds.stable + abs(total)
    if low < limit:
        return None
    start = _taken_back(rows.mean(axis=1), start, stop, thresholds.stable)
    steps = tuple(range(first + start, first + stop + 1))
    peak = max(steps, key=lambda i: float(measurement.growth[i].mean()))
    growth = float(inside.mean())
    inside_it = measurement.steps[first : last + 1]
    beside = remedies.branches_beside(inside_it, measurement.steps)
    remedy = remedies.for_passing(inside_it, total, growth, thresholds.stable, beside)
    return Finding(
        kind="transient_growth",
        severity="warning",
        steps=steps,
        module_path=measurement.steps[peak].module_path,
        confidence=confidence_above(inside, limit),
        evidence=f"the gradient grows by a factor of {factor(growth)} within steps {steps[0]} to {steps[-1]} "
        f"(interval {low:+.1f} to {high:+.1f} nats), of which the whole stretch keeps {total:+.1f} nats",
        remedy=remedy.text,
        reference="Trefethen and Embree, Spectra and Pseudospectra, 2005",
        numbers={"growth": growth, "low": low, "high": high, "total": total},
        actions=remedy.actions,
    )


def _largest_run(rates: Array) -> tuple[int, int]:
    """First and last index of the run of steps with the largest sum."""
    best, best_run, running, start = -math.inf, (0, 0), 0.0, 0
    for index, rate in enumerate(rates):
        if running <= 0.0:
            running, start = 0.0, index
        running += float(rate)
        if running > best:
            best, best_run = running, (start, index)
    return best_run


def _taken_back(rates: Array, start: int, stop: int, stable: float) -> int:
    """The step up to which, on its way back from the run, the gradient stays larger than what counts as stable."""
    growth = float(rates[start : stop + 1].sum())
    while start > 0 and growth + float(rates[start - 1]) > stable:
        start -= 1
        growth += float(rates[start])
    return start


def mechanism_findings(
    verdict: Verdict,
    measurement: Measurement,
    found: Sequence[Mechanism],
    skips: Sequence[float | None],
    thresholds: Thresholds,
) -> list[Finding]:
    """Whether the step size is what makes gradients grow, or over-damping what makes them decay.

    Only steps with a skip have a step size that can be at fault.
    """
    first, last = verdict.stretch
    read = [m for m in found[first : last + 1] if m.excess is not None and skips[m.step]]
    if len(read) < max(1, (last - first + 1) / 2):
        return []
    continuous, discrete, damped = (
        float(np.mean([getattr(m.excess, name) for m in read]))
        for name in ("continuous", "discretisation", "overdamped")
    )
    if verdict.growth > thresholds.stable and discrete > 0:
        share = discrete / (discrete + max(continuous, 0.0))
        if share > thresholds.mechanism:
            return [_unstable(measurement, read, share, verdict.growth, thresholds)]
    if verdict.growth < -thresholds.stable and damped < 0:
        share = -damped / (-damped - min(continuous, 0.0) - min(discrete, 0.0) + 1e-300)
        if share > thresholds.mechanism:
            return [_overdamped(measurement, read, share, verdict.growth, thresholds)]
    return []


def _unstable(
    measurement: Measurement, read: Sequence[Mechanism], share: float, growth: float, thresholds: Thresholds
) -> Finding:
    factors = [m.largest_step_factor for m in read if m.largest_step_factor is not None]
    usable = [f for f in factors if f > 0]
    steps = [measurement.steps[m.step] for m in read]
    matrices = remedies.branch_matrices(steps)
    if usable and len(usable) > len(read) / 2:
        by = min(1.0, 0.95 * float(np.median(usable)))
        text = f"make the step {by:.2g} times as large: then the modes of a typical block lie in the stability region"
    else:
        by = remedies.branch_factor([gain for _, gain in matrices] or [0.0] * len(steps), thresholds.stable / 2)
        text = (
            "these modes oscillate without damping, and the method is stable for them at no step size: damp them, "
            "(1 - lambda) x + f(x), or take a method whose region holds a piece of the imaginary axis, such as rk4; a "
            f"step {by:.2g} times as large only slows their growth"
        )
    worst = max(read, key=lambda m: m.radius or 0.0)
    return Finding(
        kind="unstable_step",
        severity=_harm(growth, thresholds),
        steps=tuple(m.step for m in read),
        module_path=measurement.steps[worst.step].module_path,
        confidence=share,
        evidence=f"{share:.0%} of the growth of the modes comes from steps too large for their region, not from the "
        f"system itself; largest |R(z)| {worst.radius:.3g} at {worst.name}, margin {worst.margin:.3g}",
        remedy=text,
        reference="Haber and Ruthotto, 2017",
        numbers={"share": share, "radius": worst.radius or math.nan, "step_factor": by},
        actions=_scaled(steps, by, measurement),
    )


def _scaled(steps: Sequence[StepMeasurement], by: float, measurement: Measurement) -> tuple[Action, ...]:
    """The last matrix of every branch of some steps, and of their like beside them, multiplied by a factor."""
    paths = [path for path, _ in remedies.branch_matrices(steps)]
    return tuple(remedies.scale(path, by) for path in [*paths, *remedies.branches_beside(steps, measurement.steps)])


def _harm(growth: float, thresholds: Thresholds) -> str:
    """How bad a mechanism is: its growth is out of range, or only worth knowing."""
    return "warning" if abs(growth) > thresholds.explosion else "info"


def _overdamped(
    measurement: Measurement, read: Sequence[Mechanism], share: float, growth: float, thresholds: Thresholds
) -> Finding:
    worst = max(read, key=lambda m: m.modes.overdamped if m.modes else 0.0)
    modes = float(np.mean([m.modes.overdamped for m in read if m.modes]))
    steps = [measurement.steps[m.step] for m in read]
    return Finding(
        kind="overdamped",
        severity=_harm(growth, thresholds),
        steps=tuple(m.step for m in read),
        module_path=measurement.steps[worst.step].module_path,
        confidence=share,
        evidence=f"{modes:.0%} of the modes lie so deep in the stability region that they are gone after the stretch, "
        f"and they make {share:.0%} of the decay",
        remedy="make the step a quarter as large, which moves the modes towards 1, or damp the skip less",
        reference="Haber and Ruthotto, 2017",
        numbers={"share": share, "modes": modes},
        actions=_scaled(steps, 0.25, measurement),
    )


def with_softmaxes(finding: Finding, flow: Flow, measurement: Measurement) -> Finding:
    """A finding on a stretch that vanishes, with what softmaxes take away that stand in it as activations.

    The Jacobian of a softmax, diag(p) - p p^T, has no singular value above 1/2; of n entries that are alike all are 1/n
    or 0.
    """
    if finding.kind != "vanishing" or len(finding.steps) < 3 or "growth_over_time" in finding.numbers:
        return finding
    found = [i for i in finding.steps if set(flow.steps[i].operations) == {"Softmax"}]
    taken = float(measurement.growth[found].mean(axis=1).sum()) if found else 0.0
    if len(found) < 2 or not math.isfinite(taken) or taken > -1.0:
        return finding
    names = " and ".join(flow.steps[i].name for i in found[:2]) + f" and {len(found) - 2} more" * (len(found) > 2)
    text = (
        f"{len(found)} softmaxes stand in it as activations ({names}), each of which passes at most half of a "
        f"gradient, and take {taken:+.1f} nats"
    )
    return replace(finding, evidence=f"{finding.evidence}; {text}")


def with_slopes(finding: Finding, measurement: Measurement) -> Finding:
    """A finding on a stretch that vanishes, with what its activations take away at least, or on these inputs."""
    if finding.kind != "vanishing" or len(finding.steps) < 3 or "growth_over_time" in finding.numbers:
        return finding
    inside = [a for i in finding.steps for a in measurement.steps[i].activities if not a.gate]
    bounded = Counter((a.operation, a.facts.steepest) for a in inside if a.facts.steepest < 1)
    for (operation, bound), count in bounded.items():
        if 2 * count >= len(finding.steps):
            loss, name = -count * math.log(bound), operation.lower()
            steepest = f"{name}' <= {Fraction(bound).limit_denominator(99)}"
            text = f"{steepest}: its {count} {name}s alone take away {loss:.1f} nats or more"
            return replace(finding, evidence=f"{finding.evidence}; {text}")
    flat = [a for a in inside if a.operation == "Tanh" and a.log_derivative < _FLAT]
    if 2 * len(flat) >= len(finding.steps):
        loss = -sum(a.log_derivative for a in flat)
        text = f"tanh' <= 1: on these inputs its {len(flat)} tanhs take away about {loss:.1f} nats, being saturated"
        return replace(finding, evidence=f"{finding.evidence}; {text}")
    return finding
