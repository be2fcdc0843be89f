"""Suspects: the verdict on one measurement of a flow, and what in it might be at fault, generously.

Nothing here has been tried. `stabkit.diagnosis.examination` tries what is suspected before it tells anything.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from stabkit.attribution import Mechanism, mechanisms
from stabkit.diagnosis.blocks.outliers import local_findings, rank_findings
from stabkit.diagnosis.blocks.small_start import from_small_start
from stabkit.diagnosis.depth.chaos import chaos_finding, recurrent_matrices
from stabkit.diagnosis.depth.findings import growth_finding, mechanism_findings, transient
from stabkit.diagnosis.depth.structure import missing_norm_findings, missing_skip_findings
from stabkit.diagnosis.depth.unsettled import settles
from stabkit.diagnosis.finding import Finding, serious
from stabkit.diagnosis.kinds import FINDINGS, rank
from stabkit.diagnosis.losses.faults import loss_findings
from stabkit.diagnosis.measurement import Measurement, measure
from stabkit.diagnosis.non_finite.findings import (
    all_finite,
    as_facts,
    finite_end,
    non_finite_findings,
    reach_no_parameter,
)
from stabkit.diagnosis.over_time.verdict import of_rounds
from stabkit.diagnosis.states.attention import attention_findings
from stabkit.diagnosis.states.batch_statistics import by_batch
from stabkit.diagnosis.states.collapse import collapse_finding, precision_findings, spread, underflow
from stabkit.diagnosis.states.constant_outputs import constant_output_findings
from stabkit.diagnosis.states.copied_units import copied_units_findings
from stabkit.diagnosis.states.dead_units import dead_findings, saturated_findings
from stabkit.diagnosis.states.erased_inputs import erased_input_findings
from stabkit.diagnosis.thresholds import Thresholds
from stabkit.diagnosis.verdict import Verdict, judge, judged_without, not_judged
from stabkit.growth.rate_laws import rate_law
from stabkit.identification import Identification, by_step, identify
from stabkit.jacobians.method_choice import DENSE_SIZE
from stabkit.jacobians.shared import SharedSpectra
from stabkit.parallel import SERIAL, Parallel
from stabkit.tracing import Flow, FlowLike, Iteration

_FEWEST_RATES = 6  # steps that telling a power from an exponential needs


@dataclass(frozen=True)
class Diagnosis:
    """A verdict with its findings and the measurement behind both.

    Attributes:
        verdict: on the stretch of blocks.
        findings: those at warning or above in one or two steps first, then the others by severity.
        measurement: what they rest on.
        untried: suspects whose remedies were not tried, since the trials of a diagnosis are limited in number.
    """

    verdict: Verdict
    findings: tuple[Finding, ...]
    measurement: Measurement
    untried: tuple[Finding, ...] = ()


@dataclass(frozen=True)
class Settings:
    """How suspects are looked for; the same before and after a remedy.

    Attributes:
        loss: a callable on the model's output, or None for random cotangents.
        thresholds: the limits.
        probes: random cotangents per sample when there is no loss.
        seed: the seed of every random choice.
        parallel: who measures what.
        trained: whether the weights are known to have been trained, so that no remedy of how they start is one.
        optimizer: that trains the model, where it is known.
    """

    loss: object = None
    thresholds: Thresholds = field(default_factory=Thresholds)
    probes: int = 4
    seed: int = 0
    parallel: Parallel = SERIAL
    trained: bool = False
    optimizer: torch.optim.Optimizer | None = None


def suspected(
    flow: FlowLike,
    settings: Settings,
    methods: Callable[[], Sequence[Identification]] | None = None,
    spectra: SharedSpectra | None = None,
) -> Diagnosis:
    """The verdict on a flow and every suspect in it; ``methods`` and ``spectra`` are shared."""
    limits, seed = settings.thresholds, settings.seed
    of_loss = loss_findings(flow, settings.loss, limits) if isinstance(flow, Flow) else []
    kept = {} if spectra is None else {"kept": spectra.samples}  # whose growth is attributed from the same walk
    measurement = measure(flow, settings.loss, probes=settings.probes, seed=seed, parallel=settings.parallel, **kept)
    verdict = of_rounds(flow, judge(measurement.growth, measurement.kinds, limits), measurement)
    lossless = any(finding.kind == "non_finite" for finding in of_loss)
    within = verdict.name != "non-finite" and all_finite(measurement)  # on the way from the input to the output
    if lossless or not within or not finite_end(flow, settings.loss):
        broken = of_loss or non_finite_findings(flow, measurement, limits, settings.loss)
        unread = bool(broken) and not of_loss and callable(settings.loss)
        if unread and isinstance(flow, Flow) and reach_no_parameter(flow, settings.loss):
            why = "gradients are not finite before the first parameter, where nothing is trained"
            return Diagnosis(not_judged(verdict, why), tuple(as_facts(broken)), measurement)
        if broken or not within:
            return Diagnosis(broken_verdict(verdict) if broken else verdict, tuple(broken), measurement)
    first = measurement.steps[verdict.stretch[0]]
    start = (first.module_path, first.owed)
    verdict, of_start = from_small_start(verdict, measurement.growth, measurement.kinds, start, limits)
    verdict = _of_batch_norms(flow, _by_rate_law(verdict, measurement, limits), measurement)
    settled = settles(flow, measurement, verdict.stretch) if verdict.name == "vanishing" else ""
    verdict = _renamed(verdict, "stable", settled) if settled else verdict
    spreads = spread(flow)
    blocks = _block_findings(flow, measurement, limits)
    explained = _explains(blocks, verdict, limits) or _at_the_loss(of_loss, verdict, measurement, limits)
    if any(finding.kind == "saturated" and finding.severity == "info" for finding in of_loss) and explained:
        verdict = _but_for_the_end(of_loss, verdict, measurement, limits)
    found = list(blocks)
    blamed = {index for finding in blocks for index in finding.steps}
    blamed |= {index for finding in of_loss for index in finding.steps if finding.kind == "saturated"}
    if settled:  # the attractors of a memory lie where its activations are flat
        blamed |= set(range(verdict.stretch[0], verdict.stretch[1] + 1))
    found += [*of_loss, *saturated_findings(measurement, limits, blamed)]
    if isinstance(flow, Flow):
        # copies, and norms over a single value, are the cause of a rank that is lost, and are tried first
        causes = [*copied_units_findings(flow, measurement), *erased_input_findings(flow, measurement, limits)]
        found = [*causes, *found, *attention_findings(flow, limits)]
    tied = recurrent_matrices(flow) if isinstance(flow, Iteration) else {}
    if not explained:
        found += growth_finding(verdict, measurement, tied, limits)
        found += [] if settled or of_start else _mechanism(flow, verdict, measurement, limits, methods, spectra)
        passing = None
        if verdict.name != "not judged" and abs(verdict.growth) <= limits.explosion:
            passing = transient(measurement, verdict.stretch, verdict.growth, limits)
        if passing is not None and not _accounts(blocks, passing, limits):
            found.append(passing)
            verdict = _renamed(verdict, "transient growth", passing.evidence)
        chaos = []
        if not _normalised_by_batch(flow, measurement, verdict.stretch):  # they part neighbours as they grow gradients
            chaos = chaos_finding(flow, measurement, spreads, verdict.stretch, limits)
        # of layers that grow beyond range it is said that they explode; a tied map has no other name for it
        if chaos and verdict.name == "exploding" and isinstance(flow, Flow):
            found += chaos
        elif chaos:
            found = [*chaos, *found]
            verdict = _renamed(verdict, "chaotic", chaos[0].evidence)
    if not any(finding.kind == "dead" for finding in found):
        found += collapse_finding(measurement, spreads, verdict.stretch, limits)
    if isinstance(flow, Flow) and not any(finding.kind in ("dead", "rank_collapse") for finding in found):
        found += constant_output_findings(flow, settings.loss)
    found += [*precision_findings(flow, measurement), *of_start]
    return Diagnosis(verdict, tuple(ordered(found)), measurement)


def _by_rate_law(verdict: Verdict, measurement: Measurement, limits: Thresholds) -> Verdict:
    """A drift instead of an explosion where growth is decisively a power of depth, not an exponential.

    Normalised residual networks grow so: log growth goes with the log of depth, and no depth makes it explode.
    """
    first, last = verdict.stretch
    rows = measurement.growth[first : last + 1]
    merged = sum(bool(step.merges) for step in measurement.steps[first : last + 1])
    if verdict.name not in ("exploding", "vanishing") or merged < len(rows) / 2 or len(rows) < _FEWEST_RATES:
        return verdict
    if not np.isfinite(rows).all():
        return verdict
    law = rate_law(np.concatenate([[0.0], rows.mean(axis=1).cumsum()]), decisive=limits.rate_law)
    if law.margin > -limits.rate_law:
        return verdict
    return _renamed(
        verdict, "drift", f"the growth of {verdict.growth:+.1f} nats is a {law.law} of depth, no exponential"
    )


def _of_batch_norms(flow: FlowLike, verdict: Verdict, measurement: Measurement) -> Verdict:
    """A drift instead of an explosion where most blocks normalise by their batch whatever their matrices make.

    Gradients grow through batch norms of a fresh network, and no size of the weights changes that: the loss is blind
    to it. A large gradient makes such weights grow until their steps are small beside them, so that training brings
    the layers into balance; with running statistics, after it, growth is judged like any other.
    """
    if verdict.name != "exploding" or not math.isfinite(verdict.growth):
        return verdict
    if not _normalised_by_batch(flow, measurement, verdict.stretch):
        return verdict
    why = (
        f"the growth of {verdict.growth:+.1f} nats is that of batch norms, which the size of no weight changes; "
        "weights whose gradient is large grow until their steps are small beside them (Arora, Li and Lyu, 2019)"
    )
    return _renamed(verdict, "drift", why)


def _normalised_by_batch(flow: FlowLike, measurement: Measurement, stretch: tuple[int, int]) -> bool:
    """Whether batch norms take the size of the weights out again in most blocks, by the batch at hand."""
    if not isinstance(flow, Flow) or not by_batch(flow):
        return False
    inside = [step.weights for step in measurement.steps[stretch[0] : stretch[1] + 1] if step.weights]
    blind = [weights for weights in inside if all(w.normed for w in weights if w.kind == "matrix")]
    return len(blind) > len(inside) / 2


def _block_findings(flow: FlowLike, measurement: Measurement, limits: Thresholds) -> list[Finding]:
    """Single blocks at fault, one finding each: what says most about the cause goes first."""
    local = local_findings(measurement, limits)
    by_weight = [finding for finding in local if any("weight_deviation" in key for key in finding.numbers)]
    weighed = {index for finding in by_weight for index in finding.steps}
    causes = [
        *dead_findings(measurement, limits),
        *missing_skip_findings(flow, measurement),
        *missing_norm_findings(flow, measurement),
        *rank_findings(measurement, limits),
    ]
    causes = [finding for finding in causes if not weighed & set(finding.steps)]
    blamed = weighed | {index for finding in causes for index in finding.steps}
    rest = [f for f in local if f not in by_weight and not blamed & set(f.steps)]
    lost = underflow(flow, measurement)
    if lost.size:  # nothing of what follows is the fault of its block
        causes, rest = ([f for f in fs if f.kind != "dead" or min(f.steps) < lost[0]] for fs in (causes, rest))
    return [*by_weight, *causes, *rest]


def _explains(blocks: Sequence[Finding], verdict: Verdict, limits: Thresholds) -> bool:
    """Whether the growth would be within range but for the blocks at fault."""
    if verdict.name not in ("exploding", "vanishing"):
        return False
    if not math.isfinite(verdict.growth):
        return any(f.kind == "dead" and f.severity == "critical" for f in blocks)
    excess = sum(f.numbers.get("gain_deviation", 0.0) for f in blocks if serious(f))
    return math.isfinite(excess) and abs(verdict.growth - excess) < min(limits.explosion, abs(verdict.growth))


def _at_the_loss(of_loss: Sequence[Finding], verdict: Verdict, measurement: Measurement, limits: Thresholds) -> bool:
    """Whether growth would be within range but for a last activation that belongs into the loss."""
    steps = {index for finding in of_loss if finding.kind == "saturated" for index in finding.steps}
    first, last = verdict.stretch
    at = [float(measurement.growth[index].mean()) for index in steps if first <= index <= last]
    return bool(at) and abs(verdict.growth - sum(at)) < limits.explosion


def _but_for_the_end(
    of_loss: Sequence[Finding], verdict: Verdict, measurement: Measurement, limits: Thresholds
) -> Verdict:
    """The verdict without a last sigmoid that is flat where it is right, as it is when a classifier is sure."""
    kept = [index for index in range(len(measurement.kinds)) if all(index not in f.steps for f in of_loss)]
    rest = judge(measurement.growth[kept], [measurement.kinds[index] for index in kept], limits)
    return judged_without(verdict, rest, "the sigmoid before the loss, which is flat where it is right")


def _accounts(blocks: Sequence[Finding], passing: Finding, limits: Thresholds) -> bool:
    """Whether transient growth is that of single blocks at fault."""
    inside = [f for f in blocks if serious(f) and set(f.steps) & set(passing.steps)]
    excess = sum(f.numbers.get("gain_deviation", 0.0) for f in inside)
    return math.isfinite(excess) and passing.numbers["growth"] - excess < limits.stable


def _mechanism(
    flow: FlowLike,
    verdict: Verdict,
    measurement: Measurement,
    limits: Thresholds,
    methods: Callable[[], Sequence[Identification]] | None,
    spectra: SharedSpectra | None,
) -> list[Finding]:
    """The mechanism, where growth asks for one and the states are small enough for whole spectra."""
    if not isinstance(flow, Flow) or not math.isfinite(verdict.growth) or abs(verdict.growth) <= limits.stable:
        return []
    first, last = verdict.stretch
    with_branch = sum(bool(step.merges) for step in measurement.steps[first : last + 1])
    if 2 * with_branch < last - first + 1 or max(state.size for state in flow.states) > DENSE_SIZE:
        return []
    read = identify(flow, checks=False) if methods is None else methods()
    found: tuple[Mechanism, ...] = mechanisms(
        flow, samples=1, krylov=0, identifications=read, pulled=measurement.pulled, spectra=spectra
    )
    return mechanism_findings(
        verdict, measurement, found, [method.skip for method in by_step(read, len(flow.steps))], limits
    )


def broken_verdict(verdict: Verdict) -> Verdict:
    """The verdict on what is not finite."""
    return replace(
        verdict,
        name="non-finite",
        summary="Gradients, states or weights are not finite.",
        growth=math.nan,
        interval=(math.nan, math.nan),
    )


def _renamed(verdict: Verdict, name: str, evidence: str) -> Verdict:
    return replace(verdict, name=name, summary=f"{name.capitalize()}: {evidence}.")


def ordered(found: Sequence[Finding]) -> list[Finding]:
    """Blocks at fault first, but for kinds that usually follow from another; then all others by severity."""
    blocks = [f for f in found if len(f.steps) <= 2 and serious(f) and not FINDINGS[f.kind].consequence]
    rest = sorted((f for f in found if f not in blocks), key=lambda f: -rank(f.severity))
    return [*blocks, *rest]
