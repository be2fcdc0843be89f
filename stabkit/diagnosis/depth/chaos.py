"""Chaos: bounded states, a positive Lyapunov exponent, and neighbours that part."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch

from stabkit.diagnosis.finding import Finding
from stabkit.diagnosis.measurement import Measurement
from stabkit.diagnosis.remedies import computed as remedies
from stabkit.diagnosis.states.collapse import Spread
from stabkit.diagnosis.thresholds import Thresholds
from stabkit.statistics import mean_interval
from stabkit.tracing import FlowLike, Iteration

_BOUNDED = 0.1  # slope of log |x|, as a fraction of the exponent, under which states count as bounded
_PERTURBATIONS = (1e-6, 1e-4, 1e-2)  # of the finite-size test, relative to the state
_SMALL = math.log(1e-2)  # log distance over state up to which a perturbation still grows as the linear map says
_APART = 2.0  # distance over state at which two trajectories of one size may end: about sqrt(2) when unrelated
_PART = 1e-2  # share of the energy that must tell samples apart in the end


@dataclass(frozen=True)
class Chaos:
    """What the three tests of chaos say.

    Attributes:
        exponent: largest Lyapunov exponent, nats a step, from cotangents that had a fifth of the steps to align.
        interval: the interval of the exponent.
        slope: the slope of log |x| over the last three quarters of the steps, nats a step.
        parting: the third test in words; empty where it failed.
    """

    exponent: float
    interval: tuple[float, float]
    slope: float
    parting: str

    @property
    def passed(self) -> bool:
        """Whether the states are bounded and neighbours part at a positive rate."""
        return self.interval[0] > 0 and abs(self.slope) <= _BOUNDED * self.exponent and bool(self.parting)


def chaos_finding(
    flow: FlowLike, measurement: Measurement, spread: Spread, stretch: tuple[int, int], thresholds: Thresholds
) -> list[Finding]:
    """Chaos of a tied map, or of at least ``thresholds.homogeneous`` alike layers; nothing is said of other flows.

    Expansion over the whole stretch that stays within what counts as stable is left alone: skips that carry samples
    on unchanged part neighbours a little too.
    """
    first, last = stretch
    rows = measurement.growth[first : last + 1]
    tied = isinstance(flow, Iteration)
    if not np.isfinite(rows).all() or not (tied or _homogeneous(measurement, stretch, thresholds)):
        return []
    settled = rows[: max(len(rows) * 4 // 5, 1)].mean(axis=0)  # gradients come from the end
    low, high = mean_interval(settled, thresholds.confidence)
    if low * len(rows) <= thresholds.stable:
        return []
    sizes = measurement.log_states[first : last + 2].mean(axis=1)
    late = sizes[len(sizes) // 4 :]
    slope = float(np.polyfit(np.arange(len(late)), late, 1)[0]) if len(late) > 2 else math.inf
    parting = _parting(flow) if isinstance(flow, Iteration) else _decorrelation(spread, last + 1)
    found = Chaos(float(settled.mean()), (low, high), slope, parting)
    return [_finding(flow, measurement, stretch, found, thresholds)] if found.passed else []


def _homogeneous(measurement: Measurement, stretch: tuple[int, int], thresholds: Thresholds) -> bool:
    """Whether the stretch is made of enough blocks of one class in one space."""
    steps = measurement.steps[stretch[0] : stretch[1] + 1]
    counts = Counter((step.module_class, step.space) for step in steps if step.kind == "step" and step.weights)
    return bool(counts) and max(counts.values()) >= thresholds.homogeneous


def _decorrelation(spread: Spread, state: int) -> str:
    share = float(spread.samples[state])
    return f"{share:.0%} of the energy of the last state tells samples apart" if share > _PART else ""


def _parting(flow: Iteration) -> str:
    """The finite-size test: small perturbations grow, and stop growing when they are of the size of the state."""
    generator = torch.Generator().manual_seed(0)
    count = len(flow.steps)
    directions = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.detach()) for t in flow.initial]
    undisturbed = _flat(flow, flow.initial)
    typical = float(undisturbed.norm(dim=2).mean() / undisturbed.shape[2] ** 0.5)
    rates, ends = [], []
    for size in _PERTURBATIONS:
        start = tuple(t.detach() + size * typical * d for t, d in zip(flow.initial, directions, strict=True))
        # beside the typical state: the first may well be zero
        apart = (_flat(flow, start) - undisturbed).norm(dim=2) / max(typical * undisturbed.shape[2] ** 0.5, 1e-300)
        logs = apart.clamp_min(1e-300).log().mean(1)
        linear = int((logs < _SMALL).nonzero().max()) if bool((logs < _SMALL).any()) else 0
        rates.append(float(logs[linear] - logs[0]) / max(linear, 1))
        ends.append(float(apart[-1].mean()))
    if rates[0] <= 0 or max(ends) > _APART or max(ends) <= _PART:
        return ""
    return (
        f"a perturbation of {_PERTURBATIONS[0]:g} of the state grows at {rates[0]:+.3f} nats a step and those of up to "
        f"{_PERTURBATIONS[-1]:g} end {max(ends):.2g} of the state apart after {count} steps"
    )


def _flat(flow: Iteration, start: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The trajectory from a state, ``(states, batch, size)``."""
    states = flow._run(start, 0, len(flow.steps))
    flat = [flow.space.flatten([t.detach().unsqueeze(0) for t in state]).squeeze(-1) for state in states]
    return torch.stack(flat).to(torch.float64)


def recurrent_matrices(flow: Iteration) -> dict[str, float]:
    """Matrices that act on the state, with the log of the gain that their size means, nats.

    Those are the ``weight_hh`` of torch's cells, or else the square ones.
    """
    named = {name: p.detach().double() for name, p in flow.model.named_parameters() if p.dim() == 2}
    hidden = {name: p for name, p in named.items() if "weight_hh" in name}
    found = hidden or {name: p for name, p in named.items() if p.shape[0] == p.shape[1]}
    sizes = {name: float(p.square().mean().sqrt()) * p.shape[1] ** 0.5 for name, p in found.items()}
    return {name: math.log(max(size, 1e-300)) for name, size in sizes.items()}


def _finding(
    flow: FlowLike, measurement: Measurement, stretch: tuple[int, int], found: Chaos, thresholds: Thresholds
) -> Finding:
    first, last = stretch
    steps = measurement.steps[first : last + 1]
    tied = recurrent_matrices(flow) if isinstance(flow, Iteration) else None
    growth = float(measurement.growth[first : last + 1].mean(axis=1).sum())
    remedy = remedies.for_stretch(steps, growth, thresholds.stable, tied)
    low, high = found.interval
    return Finding(
        kind="chaotic",
        severity="critical" if tied is not None and growth > thresholds.explosion else "warning",
        steps=tuple(range(first, last + 1)),
        module_path=steps[0].module_path,
        confidence=thresholds.confidence,
        evidence=f"largest exponent {found.exponent:+.3f} nats a step (interval {low:+.3f} to {high:+.3f}) while the "
        f"size of the states changes by {found.slope:+.4f}; {found.parting}",
        remedy=f"{remedy.text}; at the edge of chaos the exponent is zero",
        reference="Sompolinsky, Crisanti and Sommers, 1988; Engelken et al., 2023",
        numbers={"exponent": found.exponent, "low": low, "high": high, "slope": found.slope},
        actions=remedy.actions,
    )
