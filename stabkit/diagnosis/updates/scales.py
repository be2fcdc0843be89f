"""Updates that blow up since inputs or targets lie far from unit scale: the rate is no cause of that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from stabkit.diagnosis.finding import Finding
from stabkit.diagnosis.losses.scales import Scaling, scalings
from stabkit.diagnosis.remedies.trial import follows
from stabkit.diagnosis.training_run import TrainingRun
from stabkit.diagnosis.updates.measured import STEPS, UpdateMeasurement, UpdateRun, run_with

_LEARNS = 0.9  # of its first loss, below which updates with what is standardised must end
#: a learning rate that nobody means, and of the present one: what asks for it are scales, or the conditioning
_ABSURD, _FAR_BELOW = 1e-6, 1e-3


def with_scales(
    findings: Sequence[Finding],
    update: Finding,
    found: UpdateMeasurement,
    run: TrainingRun,
    optimizer: torch.optim.Optimizer,
    seed: int,
) -> tuple[list[Finding], Finding]:
    """Findings and one on updates, with what is standardised as the remedy where updates at the same rate learn then.

    Args:
        findings: all others.
        update: what is told of the updates.
        found: what was measured of them.
        run: of the model as training makes it.
        optimizer: the optimizer, whose own rate is taken.
        seed: of what the model draws.
    """
    # what was a fact, since Adam learns with it, is a fault for an optimizer that does not
    blamed = [f for f in findings if f.kind == "input_scale" or {"mean", "spread"} <= set(f.numbers)]
    tries = scalings(run) if found.present is not None and found.present.raises else []
    runs = [(each, run_with(run.call.module, each.call, each.loss, optimizer, seed)) for each in tries]
    known = [(each, made) for each, made in runs if made is not None]
    cured = next(((each, made) for each, made in known if _learns(made)), None)
    if cured is None:
        return list(findings), _symptom(update, known)
    each, made = cured
    others = "".join(f", with {other.what} standardised {run}" for other, run in known[: known.index(cured)])
    told = (
        f"; {STEPS} updates of {found.optimizer} at its own rate of {found.learning_rate:.3g} take the loss "
        f"{found.present} as it is{others}, and with {each.what} standardised {made}"
    )
    if not blamed:
        remedy = each.remedy if _is_absurd(update) else f"{each.remedy}; or {update.remedy}"
        return list(findings), replace(update, evidence=update.evidence + told, remedy=remedy)
    first = replace(blamed[0], evidence=blamed[0].evidence + told, remedy=each.remedy, severity=update.severity)
    kept = [first if f is blamed[0] else f for f in findings]
    return kept, replace(follows(update, first), severity="info")


def _learns(run: UpdateRun) -> bool:
    return run.lowers and run.end < _LEARNS * run.losses[0]


def _is_absurd(update: Finding) -> bool:
    """Whether no rate was found, or one that nobody means."""
    rate = update.numbers.get("proposed_rate", 0.0)
    return rate < min(_ABSURD, _FAR_BELOW * update.numbers["learning_rate"])


def _symptom(update: Finding, known: Sequence[tuple[Scaling, UpdateRun]]) -> Finding:
    """A finding on updates without a remedy by scales: a rate that nobody means is told as a symptom of something."""
    rate = update.numbers.get("proposed_rate")
    if rate is None or not _is_absurd(update):
        return update
    tried = "".join(f"; with {each.what} standardised they take it {run}" for each, run in known)
    return replace(
        update,
        evidence=f"{update.evidence}{tried}",
        remedy=f"no rate: one of {rate:.3g}, which is what keeps this loss from rising, says that something before "
        "the optimizer is far from unit scale, and learns along its largest features alone; bring inputs, targets, "
        "weights and the terms of the loss to the size of 1",
    )
