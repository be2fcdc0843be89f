"""A loss that begins so high that training does not get down to where it would begin without its cause.

The size of the data, sums in the code and weights that were all started large make outputs of any size, also where
gradients keep theirs from block to block. Each is taken away on a copy, and both are trained for a few steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from stabkit.diagnosis.finding import LOSS, Finding, of_last_step, serious
from stabkit.diagnosis.losses.signs import signs_of
from stabkit.diagnosis.remedies.applying import carried_out
from stabkit.diagnosis.remedies.computed import Remedy
from stabkit.diagnosis.remedies.outer_causes import outer_causes, smaller_weights
from stabkit.diagnosis.remedies.short_training import (
    STEPS,
    ShortTraining,
    clearly_better,
    falls,
    short_training,
    taken_back,
    trained_with,
)
from stabkit.diagnosis.remedies.trial import follows, tried
from stabkit.diagnosis.states.batch_statistics import with_norms_of_evaluation
from stabkit.diagnosis.suspects import Diagnosis, Settings, ordered
from stabkit.diagnosis.told import with_mechanism
from stabkit.errors import StabkitError
from stabkit.tracing import Flow, FlowLike
from stabkit.tracing.recording.training_pass import training_pass

_SEVERAL = 2  # steps beyond which a growth is one of the whole stretch, and of no single block
_REFERENCE = "Karpathy, A recipe for training neural networks, 2019: verify the loss at initialisation"


def with_large_loss(flow: FlowLike, found: Diagnosis, suspects: Sequence[Finding], settings: Settings) -> Diagnosis:
    """A diagnosis with what makes the loss far too large, and with what goes with it told as what follows.

    Args:
        flow: the traced pass.
        found: the diagnosis, after remedies were tried.
        suspects: its findings before, whose evidence is that of what was measured alone.
        settings: how suspects are looked for.
    """
    loss = settings.loss
    if not isinstance(flow, Flow) or not callable(loss) or found.verdict.name == "non-finite":
        return found
    if with_norms_of_evaluation(flow.model):
        return found  # which divide by running statistics, and in training by the size of what comes
    started = [] if settings.trained else smaller_weights(found.measurement)
    tries = [*_of_errors(flow, loss, outer_causes(flow, found.measurement)), *started]
    plain = short_training(flow, loss) if tries else None
    if plain is None or not math.isfinite(plain.first):
        return found
    begun = [(remedy, _begins(flow, loss, remedy)) for remedy in tries]  # one pass each, before any is trained
    runs = [(remedy, trained_with(flow, loss, remedy)) for remedy, first in begun if first < plain.last]
    good = [(remedy, run) for remedy, run in runs if run is not None and _unlearns(remedy, run, plain)]
    if not good:
        return found
    best = min((run for _, run in good), key=lambda run: run.last)
    remedy, run = next((r, t) for r, t in good if not clearly_better(best, t))
    if any(f.remedy == remedy.text for f in found.findings):
        return found
    told = [f for f in found.findings if serious(f) and f.actions]
    others = (short_training(flow, loss, f.actions) for f in told)
    if any(other is not None and not clearly_better(run, other) for other in others):
        return found  # what is told already serves as well
    finding = _finding(flow, remedy, run, plain)
    waiting = [f for f in found.findings if serious(f)]
    gone = tried(flow, waiting[0], remedy, found, settings).gone(waiting) if waiting else []
    stretch = next((f for f in gone if f.kind in ("exploding", "vanishing") and len(f.steps) > _SEVERAL), None)
    if stretch is not None:  # the growth is what makes the loss large: one finding, with the remedy that trains better
        bare = next((f for f in suspects if _is_of(f, stretch)), stretch)  # nothing of the remedy that was told of it
        finding = replace(
            stretch,
            evidence=f"{with_mechanism(bare, suspects).evidence}; {finding.evidence}",
            remedy=remedy.text,
            actions=remedy.actions,
            module_path=remedy.place or bare.module_path,
            confidence=bare.confidence,
        )
    kept = [follows(f, finding) if any(f is g for g in gone) else f for f in found.findings]
    return replace(found, findings=(finding, *(f for f in ordered(kept) if not _is_of(f, stretch))))


def _of_errors(flow: Flow, loss: Any, remedies: Sequence[Remedy]) -> list[Remedy]:
    """Remedies but for changes of sums in the code where a loss may lie below zero: of likelihoods they are terms.

    The log-determinant of a flow over its size is another loss, and begins elsewhere whatever is learnt.
    """
    if any(_is_of_code(remedy) for remedy in remedies):
        scalar = training_pass(flow.forward_pass, loss, differentiate=False).loss
        if scalar is None or not signs_of(scalar.grad_fn).positive:
            return [remedy for remedy in remedies if not _is_of_code(remedy)]
    return list(remedies)


def _is_of_code(remedy: Remedy) -> bool:
    return not remedy.actions and remedy.data is None


def _is_of(finding: Finding, stretch: Finding | None) -> bool:
    return stretch is not None and (finding.kind, finding.steps) == (stretch.kind, stretch.steps)


def _begins(flow: Flow, loss: Any, remedy: Remedy) -> float:
    """Where the loss begins with a remedy; of divided data, with the output as it is or multiplied back."""
    call = flow.forward_pass if remedy.data is None else remedy.data.divided(flow.forward_pass)
    try:
        with carried_out(call.module, remedy.actions), remedy.within():
            passes = [training_pass(call, each, differentiate=False) for each in taken_back(loss, remedy.data)]
    except (StabkitError, RuntimeError):
        return math.inf
    return min((float(done.loss.detach()) for done in passes if done.loss is not None), default=math.inf)


def _unlearns(remedy: Remedy, treated: ShortTraining, plain: ShortTraining) -> bool:
    """Whether as it is, training does not even get to where it begins with a remedy, and stays below with it.

    Weights can be made so small that nothing is learnt any more, so that with those the loss must fall.
    """
    learns = falls(treated) if remedy.actions else treated.last <= treated.first
    return plain.last > treated.first and learns and clearly_better(treated, plain)


def _finding(flow: Flow, remedy: Remedy, run: ShortTraining, plain: ShortTraining) -> Finding:
    return of_last_step(
        flow,
        "loss",
        "warning",
        remedy.place or LOSS,
        evidence=f"the loss begins at {plain.first:.3g}, and {STEPS} steps do not bring it down to {run.first:.3g}, "
        f"where it begins treated: {remedy.cause}; {STEPS} steps of plain SGD take the loss {plain} as it is, {run} "
        "treated",
        remedy=remedy.text,
        reference=_REFERENCE,
        numbers={"loss": plain.first, "after": run.first, "left": plain.last, "treated": run.last},
        actions=remedy.actions,
    )
