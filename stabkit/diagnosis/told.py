"""What is told of a suspect after its trials: severity, evidence, remedy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from stabkit.diagnosis.blocks.initialisation import Known
from stabkit.diagnosis.finding import Finding, as_fact
from stabkit.diagnosis.remedies.computed import Remedy
from stabkit.diagnosis.remedies.short_training import STEPS, ShortTraining, clearly_better, learns_well
from stabkit.diagnosis.remedies.trial import Trial, is_stretch
from stabkit.diagnosis.thresholds import Thresholds

#: growth that does not last, or has a mechanism, within the limits: a fault only where an intervention takes it away
IN_DOUBT = ("transient_growth", "unstable_step", "overdamped")
GROWS = ("exploding", "transient_growth", "chaotic", "unstable_step")
_MECHANISMS = ("unstable_step", "overdamped", "saturated")
_LEARNT = 0.01  # of the first loss, left after a short training: growth kept nothing from being learnt
NOTHING_HELPED = "nothing that was tried brings it below a warning"


@dataclass(frozen=True)
class Cure:
    """A remedy that cures a suspect, and its trial.

    Attributes:
        trial: what was measured with it.
        remedy: itself.
        trains: a short training with it, where there is a loss; cures are compared by that.
        ends: short trainings with it and without, of the optimizer that speaks for it.
    """

    trial: Trial
    remedy: Remedy
    trains: ShortTraining | None = None
    ends: tuple[ShortTraining, ShortTraining] | None = None

    @property
    def worth(self) -> tuple[float, int]:
        """Smaller is better: the loss after a short training, then how many suspects are left."""
        return (math.inf if self.trains is None else self.trains.last, self.trial.left)

    @property
    def outer(self) -> bool:
        """Whether it takes away what lies before the weights."""
        return self.remedy.data is not None or not self.remedy.actions

    @property
    def whole(self) -> bool:
        """Whether it starts all weights anew, or all of a kind of layer."""
        return bool(self.remedy.cause and self.remedy.actions)


def by_weight(finding: Finding) -> bool:
    """Whether a finding is that of a weight far from those of its peers."""
    return any("weight_deviation" in name for name in finding.numbers)


def of_same_stretch(suspect: Finding, others: Sequence[Finding]) -> list[Finding]:
    """Other suspects of a stretch that lies in this one for the most part."""
    if not is_stretch(suspect):
        return []
    own = set(suspect.steps)
    return [o for o in others if is_stretch(o) and 2 * len(own & set(o.steps)) > len(o.steps)]


def with_mechanism(told: Finding, others: Sequence[Finding]) -> Finding:
    """A cured stretch with why it grew or shrank, where that was found in it: its mechanism, or what saturates."""
    if told.kind not in ("exploding", "vanishing"):
        return told
    for other in of_same_stretch(told, others):
        if other.kind in _MECHANISMS and other.evidence not in told.evidence:
            return replace(told, evidence=f"{told.evidence}; why: {other.evidence}")
    return told


def _harmless(suspect: Finding, limits: Thresholds) -> bool:
    """Whether a block acts unlike its peers with weights like theirs, and no gradient leaves its range by it."""
    if suspect.kind != "exploding" or is_stretch(suspect) or by_weight(suspect):
        return False
    return abs(suspect.numbers.get("gain_deviation", math.inf)) < limits.stable


def told_of(suspect: Finding, cure: Cure | None, limits: Thresholds) -> Finding:
    """A suspect with what its trial says."""
    if cure is None:
        severity = "info" if suspect.kind in IN_DOUBT or _harmless(suspect, limits) else suspect.severity
        if suspect.kind == "non_finite":  # its remedy begins with the weights, and goes on with the operation
            by_hand = suspect.remedy.partition("; or ")[2] or suspect.remedy
            remedy = f"{by_hand} (no change of weights that was tried keeps it finite)"
            return replace(suspect, remedy=remedy, actions=())
        return replace(suspect, severity=severity, remedy=NOTHING_HELPED, actions=())
    if is_of_units(suspect, cure):
        return replace(
            suspect,
            severity="info",
            evidence=f"{cure.remedy.cause}, which a norm takes out again, and the gradient is one over it; "
            f"{suspect.evidence}; with the input divided by it: {cure.trial.changes}",
            remedy="none is needed: it is the unit of the input alone",
            actions=(),
        )
    moved = cure.trial.moved or suspect.kind == "non_finite"  # beside which there is no other reading
    severity = suspect.severity if moved else "info"  # what can be taken away unnoticed does no harm
    cause = f"{cure.remedy.cause}; " if cure.remedy.cause else ""
    evidence = f"{cause}{suspect.evidence}; tried on a copy: {cure.trial.changes}"
    if cure.ends is not None:
        treated, untreated = cure.ends
        evidence += f"; {STEPS} steps of {treated.optimizer} take the loss {untreated} as it is, {treated} treated"
    return replace(
        suspect,
        severity=severity,
        confidence=cure.trial.share if is_stretch(suspect) else suspect.confidence,
        evidence=evidence,
        remedy=cure.remedy.text + f"; or {suspect.remedy}" * (suspect.kind == "non_finite" and cure.outer),
        actions=cure.remedy.actions,
        module_path=cure.remedy.place or suspect.module_path,
    )


def is_of_units(suspect: Finding, cure: Cure) -> bool:
    """Whether a gradient vanishes since a first norm takes the size of large data out again, and training minds not.

    Where nothing behind it changes with the size of the data, no training does, whatever a short one says by chance.
    """
    first = cure.trial.before.measurement.steps[suspect.steps[0]]
    if suspect.kind != "vanishing" or cure.remedy.data is None:
        return False
    if cure.trial.same_behind_first:
        return True
    if not first.norms:
        return False
    return cure.ends is None or not clearly_better(*cure.ends)


def of_no_help(
    suspect: Finding, plain: ShortTraining, tries: Sequence[Remedy], undone: ShortTraining | None
) -> Finding:
    """A suspect that can be taken away, without which training ends no lower, or far above where the loss is now.

    What is known to help deep stacks, skips and other activations, may take longer than a trial, and is told as such.
    Activations that are flat do no harm where opening them undoes what the model has learnt, nor does a block of large
    growth that few steps learn well with, or whose remedy leaves far more of the loss than there is without it. Heads
    30 and 100 times too large are learnt as well by Adam and plain descent in 300 steps, and are facts by this; 300
    times too large ones are not, and stay warnings. So do 348 runs of 29 planted local faults.

    Args:
        suspect: what was tried.
        plain: the training without any remedy.
        tries: the remedies.
        undone: the training with one that leaves far more of the loss than there is without it; None where none does.
    """
    cause = f"{tries[0].cause}; " if tries[0].cause else ""
    known = [each.text for each in tries if any(a["action"] in ("add_skip", "activate") for a in each.actions)]
    vanishes = is_stretch(suspect) and suspect.kind == "vanishing"
    learnt = abs(plain.last) < _LEARNT * abs(plain.first)
    if not is_stretch(suspect):
        learnt = learnt or undone is not None or learns_well(plain)
    trained = (
        f"{STEPS} steps of plain SGD take the loss {plain} as it is, and end no lower with anything that takes it "
    )
    trained += "away"
    if undone is not None:
        trained = (
            f"the loss is {plain.first:.3g} as it is, and far more is left with what takes it away: {STEPS} steps "
        )
        trained += f"of plain SGD take it {undone} then"
    return replace(
        suspect,
        severity="info" if (learnt and suspect.kind in GROWS) or suspect.kind == "saturated" else suspect.severity,
        evidence=f"{cause}{suspect.evidence}; {trained}",
        remedy=f"not shown to help within {STEPS} steps: {'; or '.join(dict.fromkeys(known))}"
        if known and vanishes
        else "none is told: what was tried takes it away, and trains no better",
        actions=(),
    )


def of_no_use(suspect: Finding, ends: tuple[ShortTraining | None, ShortTraining]) -> Finding:
    """A weight of odd size that training does not mind, and gains nothing by when it is changed."""
    treated, plain = ends
    steps = (
        f"{STEPS} steps of {plain.optimizer} take the loss {plain} as it is, {treated} with weights of the usual size"
    )
    return as_fact(suspect, steps, "none is needed: it trains as well as it is, or better")


def as_made(suspect: Finding, known: Known) -> Finding:
    """A suspect that is nothing but a known initialisation."""
    words = f"it comes of {known.words}, and is gone with weights of ordinary size there"
    return as_fact(suspect, words, "none is needed: training moves these weights first")
