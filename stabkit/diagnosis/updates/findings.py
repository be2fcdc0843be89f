"""Updates that are too long for the curvature of the loss, where they were seen to raise it."""

from __future__ import annotations

import math

from stabkit.diagnosis.finding import Finding, of_training
from stabkit.diagnosis.updates.idle import idle_finding
from stabkit.diagnosis.updates.measured import SHARES, STEPS, UpdateMeasurement, UpdateRun

_FAILS = 10.0  # times the first loss by which it has risen, or not finite: no training goes on from there
_REFERENCE = (
    "Cohen et al., Gradient descent on neural networks typically occurs at the edge of stability, 2021, and Adaptive "
    "gradient methods at the edge of stability, 2022; Gilmer et al., A loss curvature perspective, 2022"
)


def update_findings(found: UpdateMeasurement) -> list[Finding]:
    """A rate that raises the loss, or leads to a constant output, where a lower one learns; else nothing.

    A ratio above 1 alone is no finding: full-batch training goes there by itself and stays, and the first updates of
    Adam begin there. What decides are real updates on a copy.
    """
    present, proposed = found.present, found.proposed
    if found.idle is not None:
        return [idle_finding(found.idle, found.optimizer, found.learning_rate)]
    if present is None:
        return []
    first, last = present.losses[0], present.losses[-1]
    fails = not math.isfinite(last) or last - first > _FAILS * abs(first)
    told, bound = _measured(found)
    if proposed is None:
        return [] if math.isfinite(last) else [_without_rate(found, present, told)]
    if found.lower:
        return [_ruined(found, present, proposed, told)]
    return [
        of_training(
            kind="unstable_update",
            severity="critical" if fails else "warning",
            evidence=f"{told}; on a copy, {STEPS} updates on this batch take the loss {present}, and {proposed} at a "
            f"rate of {proposed.rate:.3g}{_leading(found)}",
            remedy=f"lower the learning rate from {present.rate:.3g} to {proposed.rate:.3g} ({_part(proposed, found)} "
            f"{bound}), or begin there and warm up while the curvature falls",
            reference=_REFERENCE,
            numbers=_numbers(found, present, proposed),
        )
    ]


def _without_rate(found: UpdateMeasurement, present: UpdateRun, told: str) -> Finding:
    """Of updates that blow up where no rate that was tried lowers the loss."""
    return of_training(
        kind="unstable_update",
        severity="critical",
        evidence=f"{told}; on a copy, {STEPS} updates on this batch take the loss {present}{_leading(found)}",
        remedy="none is told: no lower rate that was tried lowers the loss, so that the rate alone is no cause",
        reference=_REFERENCE,
        numbers=_numbers(found, present, None),
    )


def _ruined(found: UpdateMeasurement, present: UpdateRun, proposed: UpdateRun, told: str) -> Finding:
    """Of a rate that does not blow up, and ends where a constant output does while lower ones learn."""
    ends = ", ".join(f"{run.end:.3g} at {run.rate:.3g}" for run in found.lower)
    return of_training(
        kind="unstable_update",
        severity="warning",
        evidence=f"{told}; on a copy, {STEPS} updates on this batch take the loss from {present.losses[0]:.3g} by way "
        f"of {max(present.losses):.3g} to {present.end:.3g}, where an output that is the same for every input leaves "
        f"{found.constant:.3g}; as many at lower rates end at {ends}{_leading(found)}",
        remedy=f"lower the learning rate from {present.rate:.3g} to {proposed.rate:.3g} or less, or warm up to that",
        reference=_REFERENCE,
        numbers=_numbers(found, present, proposed),
    )


def _measured(found: UpdateMeasurement) -> tuple[str, str]:
    """What the rate exceeds, and what the bound is called."""
    rate, sharpness = found.learning_rate, found.sharpness
    if sharpness is None:
        return (
            f"the coming update of {found.optimizer} at a learning rate of {rate:.3g} is {found.excess:.3g} times as "
            "long as the longest along it that does not raise the loss",
            f"of the critical rate along it, {found.bound:.3g}",
        )
    return (
        f"the learning rate {rate:.3g} of {found.optimizer} is {found.excess:.3g} times the largest stable one: the "
        f"curvature {float(sharpness.preconditioned[0]):.3g} stands against {sharpness.threshold:.3g}, the most that "
        "its update bears at that rate",
        f"of the largest stable rate, {found.bound:.3g}",
    )


def _part(proposed: UpdateRun, found: UpdateMeasurement) -> str:
    share = min(SHARES, key=lambda s: abs(s * found.bound - proposed.rate))
    return "half" if share == SHARES[0] else "a tenth"


def _leading(found: UpdateMeasurement) -> str:
    if found.sharpness is None or len(found.sharpness.by_block) < 2:
        return ""
    block = found.sharpness.by_block[0]
    return f"; {block.share:.0%} of the steepest direction lies in {block.name or 'the model itself'}"


def _numbers(found: UpdateMeasurement, present: UpdateRun, proposed: UpdateRun | None) -> dict[str, float]:
    of_proposed = {}
    if proposed is not None:
        of_proposed = {"proposed_rate": proposed.rate, "loss_at_proposed_rate": proposed.losses[-1]}
    numbers = {
        "learning_rate": present.rate,
        **of_proposed,
        "loss": present.losses[0],
        "loss_at_present_rate": present.losses[-1],
        "excess": math.inf if found.excess is None else found.excess,
    }
    if found.sharpness is not None and found.sharpness.threshold is not None:
        numbers |= {
            "curvature": float(found.sharpness.preconditioned[0]),
            "threshold": found.sharpness.threshold,
        }
    return numbers
