"""What is expected of a model at initialisation beside what was measured, and both as a table of text."""

from __future__ import annotations

from dataclasses import dataclass

from stabkit.meanfield.rates import Rate
from stabkit.meanfield.weights import LayerStatistics
from stabkit.results import Result
from stabkit.tables import aligned

_HEAD = ("step", "name", "activation", "sw^2", "sb^2", "q", "expected", "c", "expected", "log chi", "expected", "")
_NAME = 28


@dataclass(frozen=True)
class StepExpectation(Result):
    """One step, measured and expected; ``None`` where there is no expectation.

    Attributes:
        index: place in ``flow.steps``.
        name: what the step is called.
        kind: ``"step"`` or ``"transition"``.
        activations: names of the activations in it.
        layers: statistics of the linear layers in it.
        q: mean square of the units after the step, over samples.
        q_expected: the same by the recursion.
        c: correlation of the units of two samples after the step, over pairs; None with a single sample.
        c_expected: the same by the recursion.
        log_chi: log of the sum of squares of the gradient before the step over that after it, mean squares over
            samples, probes and networks, in nats; half of it is the growth of the norm. -inf where a step passes
            nothing back (a head initialised at zero); what lies before it is then measured with new cotangents.
        log_chi_expected: the same by the recursion.
        width_variance: variance over weights of the log of that ratio at this width, to first order.
        restarted: whether the recursion starts from the measured state before this step.
        reason: why there is no expectation.
    """

    index: int
    name: str
    kind: str
    activations: tuple[str, ...]
    layers: tuple[LayerStatistics, ...]
    q: float
    q_expected: float | None
    c: float | None
    c_expected: float | None
    log_chi: float
    log_chi_expected: float | None
    width_variance: float | None
    restarted: bool
    reason: str


@dataclass(frozen=True)
class Initialisation(Result):
    """A model at initialisation, measured beside what mean field theory expects.

    Attributes:
        steps: step by step.
        rate: the law of the measured gradient over the longest stretch of states of one size; None when it is short.
        log_growth: log of the mean square gradient at the input over that at the output, in nats; steps that pass
            nothing back left out.
        log_growth_expected: the same by the recursion; None unless every step has an expectation.
        typical_log_growth: mean of the log instead of log of the mean.
        gap: the first less the second: fluctuation between samples, probes and networks.
        gap_expected: half the variance over weights, sum of ``width_variance`` / 2 (for ReLU layers 5 L / 2 n); None
            unless it is known for every step. A gap over networks comes close to it; that of one network does not,
            for its samples share the weights.
        deviation: by how much (one standard deviation) the gradient of one sample in a single network of this width
            differs from the expectation; averages over samples and probes lie closer to it.
        samples: inputs per network.
        probes: random cotangents per network.
        networks: how many were measured.
        seed: the seed of the cotangents and of resampling.
        notes: what the reader should know.
    """

    steps: tuple[StepExpectation, ...]
    rate: Rate | None
    log_growth: float
    log_growth_expected: float | None
    typical_log_growth: float
    gap: float
    gap_expected: float | None
    deviation: float | None
    samples: int
    probes: int
    networks: int
    seed: int
    notes: tuple[str, ...]

    def __str__(self) -> str:
        return _text(self)


def _text(found: Initialisation) -> str:
    """The table, what its columns mean, and the sums below it."""
    rows = [_HEAD, *(_row(step) for step in found.steps)]
    words = {_HEAD.index("name"), _HEAD.index("activation"), len(_HEAD) - 1}
    return "\n".join([*aligned(rows, words, gap=2), "", *_sums(found), *found.notes])


def _row(step: StepExpectation) -> tuple[str, ...]:
    name = step.name if len(step.name) <= _NAME else f"…{step.name[1 - _NAME :]}"
    return (
        str(step.index),
        name,
        _several(list(step.activations)),
        _several([f"{layer.sigma_w_squared:.3g}" for layer in step.layers]),
        _several([f"{layer.sigma_b_squared:.2g}" for layer in step.layers]),
        _number(step.q),
        _number(step.q_expected),
        _number(step.c),
        _number(step.c_expected),
        _signed(step.log_chi),
        _signed(step.log_chi_expected),
        f"no expectation: {step.reason}"
        if step.reason
        else "from the measured state"
        if step.restarted and step.index
        else "",
    )


def _several(parts: list[str]) -> str:
    return parts[0] + ("" if len(parts) == 1 else f" (+{len(parts) - 1})") if parts else ""


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.3f}"


def _sums(found: Initialisation) -> list[str]:
    draws = (
        f"{found.networks} network{'s' if found.networks > 1 else ''}, {found.samples} samples, {found.probes} probes"
    )
    lines = [
        "q: mean square of the units after the step; c: correlation of two samples there; log chi: log of the squared "
        "gradient before the step over that after it, in nats. "
        f"{draws}, seed {found.seed}."
    ]
    expected = (
        "no expectation for all steps"
        if found.log_growth_expected is None
        else f"expected {found.log_growth_expected:+.3f}"
    )
    if found.deviation is not None:
        expected += f", one network of this width within about {found.deviation:.2g} of it"
    lines.append(f"Squared gradient, input over output: log {found.log_growth:+.3f} ({expected}).")
    gap = "" if found.gap_expected is None else f", over networks of this width expected {found.gap_expected:.3g}"
    lines.append(f"Mean square against typical gradient: log {found.gap:.3g} apart{gap}.")
    if found.rate is not None:
        rate = found.rate
        low, high = rate.interval
        lines.append(
            f"States {rate.start} to {rate.stop}: chi {rate.chi:.4f} "
            f"(95 % {low:.4f} to {high:.4f}, over {rate.covers}), "
            f"depth scale {rate.depth_scale:.3g} steps; as a power of depth (L/l)^{rate.exponent:.2f}; law: {rate.law}."
        )
    return lines
