"""One intervention, measured: a remedy stands in a model for a while, and the same suspects are looked for again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stabkit.diagnosis.finding import Action, Finding, as_fact, serious
from stabkit.diagnosis.inputs.sizes import Sizes
from stabkit.diagnosis.measurement import Measurement
from stabkit.diagnosis.remedies.applying import carried_out
from stabkit.diagnosis.remedies.computed import Remedy
from stabkit.diagnosis.states.batch_statistics import traced_anew
from stabkit.diagnosis.suspects import Diagnosis, Settings, suspected
from stabkit.diagnosis.verdict import nats
from stabkit.errors import StabkitError
from stabkit.tracing import FlowLike, Iteration
from stabkit.tracing.flow_checks import traced

_SINGLE = 3  # steps up to which a finding is about one block: the layer, its norm, its activation
_GROWTHS = ("exploding", "vanishing")
_NOTICED = 0.05  # change of a share that is worth telling
_NOTICED_NATS = 0.1
#: nats within which states and gradients of a sample are the same with data in other units: the eps of a norm in front
#: of all else moved them by 4e-5 at most, the bias of a linear layer in front of the norm by .019 and more
_SAME = 0.005


@dataclass(frozen=True)
class Trial:
    """A suspect, what was done about it, and what was measured then.

    Attributes:
        suspect: the finding that was tried.
        before: the diagnosis in which it stands.
        after: the diagnosis with its remedy; None where that could not be carried out or traced.
    """

    suspect: Finding
    before: Diagnosis
    after: Diagnosis | None

    @property
    def cured(self) -> bool:
        """Whether the suspect is below warning now and nothing else has come to it."""
        if self.after is None:
            return False
        left = [finding for finding in self.after.findings if serious(finding)]
        if self.suspect.kind == "non_finite":  # which hid all else there may be
            return not any(finding.kind == "non_finite" for finding in left)
        known = [finding for finding in self.before.findings if serious(finding)]
        same = self._same_chain
        return not any(alike(self.suspect, finding, same) for finding in left) and all(
            any(alike(finding, other, same) for other in known) for finding in left
        )

    @property
    def left(self) -> int:
        """How many findings at warning or above there are with the remedy."""
        return 0 if self.after is None else sum(serious(finding) for finding in self.after.findings)

    def gone(self, others: Sequence[Finding]) -> list[Finding]:
        """Those of some other suspects that are below warning now as well."""
        if self.after is None:
            return []
        left = [finding for finding in self.after.findings if serious(finding)]
        return [other for other in others if not any(alike(other, finding, self._same_chain) for finding in left)]

    @property
    def changes(self) -> str:
        """What the remedy changed, in words: ``"growth -24.8 -> -0.3 nats"``."""
        assert self.after is not None
        if self.suspect.kind == "non_finite":
            return "all is finite with it"
        parts = []
        if is_stretch(self.suspect) or not self._same_chain:
            parts.append(f"growth {nats(self.before.verdict.growth)} -> {nats(self.after.verdict.growth)}")
        else:
            parts += self._at_its_steps
        return ", ".join(parts) or "no other reading moved"

    @property
    def moved(self) -> bool:
        """Whether the remedy changed anything that is measured beside what was suspected."""
        return is_stretch(self.suspect) or not self._same_chain or bool(self._at_its_steps)

    @property
    def same_behind_first(self) -> bool:
        """Whether all states, and all gradients of the loss, behind the first step of the suspect are what they were.

        A remedy in front of that step then changes nothing that a parameter behind it feels, nor one in a step that
        does not mind the size of what it is given.
        """
        after = self.after
        if after is None or not self._same_chain:
            return False
        start = self.suspect.steps[0] + 1
        pairs = ((self.before.measurement, after.measurement, name) for name in ("log_states", "log_gradients"))
        return all(
            np.allclose(getattr(one, name)[start:], getattr(other, name)[start:], rtol=0.0, atol=_SAME)
            for one, other, name in pairs
        )

    @property
    def _at_its_steps(self) -> list[str]:
        assert self.after is not None
        return _at_steps(self.suspect, self.before.measurement, self.after.measurement)

    @property
    def share(self) -> float:
        """Share of samples and probes whose growth came nearer to none; what the suspect had where it is no growth."""
        assert self.after is not None
        first, last = self.before.verdict.stretch
        start, stop = self.after.verdict.stretch
        before = np.abs(self.before.measurement.growth[first : last + 1].sum(axis=0))
        after = np.abs(self.after.measurement.growth[start : stop + 1].sum(axis=0))
        if before.shape != after.shape or not (np.isfinite(before).all() and self.suspect.kind in _GROWTHS):
            return self.suspect.confidence
        return float((after < before).mean())

    @property
    def _same_chain(self) -> bool:
        after = self.after
        return after is not None and len(after.measurement.steps) == len(self.before.measurement.steps)


def is_stretch(finding: Finding) -> bool:
    """Whether a finding is about many steps and not about one block."""
    return len(finding.steps) > _SINGLE


def alike(one: Finding, other: Finding, same_chain: bool) -> bool:
    """Whether two findings say the same of the same place."""
    if is_stretch(one) != is_stretch(other):
        return False
    if is_stretch(one):
        return one.kind == other.kind
    if one.module_path == other.module_path:
        return True
    return same_chain and bool(set(one.steps) & set(other.steps))


def tried(
    flow: FlowLike, suspect: Finding, remedy: Remedy | Sequence[Action], before: Diagnosis, settings: Settings
) -> Trial:
    """The same flow, with the same cotangents, while a remedy is carried out on its model, its code or its data."""
    remedy = remedy if isinstance(remedy, Remedy) else Remedy("", tuple(remedy))
    after = None
    try:
        with carried_out(flow.model, remedy.actions, settings.seed), remedy.within():
            after = suspected(_anew(flow, remedy.data), settings)
    except StabkitError:
        after = None  # this remedy does not fit the model, and is not told
    return Trial(suspect, before, after)


def _anew(flow: FlowLike, data: Sizes | None) -> FlowLike:
    if isinstance(flow, Iteration):
        return flow.again()
    of_depth = traced(flow, "a trial")
    if data is None:
        return traced_anew(of_depth)
    call = data.divided(of_depth.forward_pass)
    return of_depth.again(given=(call.inputs, call.kwargs))


def follows(follower: Finding, cause: Finding, how: str = "gone") -> Finding:
    """A suspect that went with the remedy of another."""
    where = cause.module_path or f"step {cause.steps[0]}"
    words = f"it is {how} with the remedy of {cause.kind} at {where}"
    return as_fact(follower, words, f"that of {cause.kind} at {where}")


def _at_steps(suspect: Finding, before: Measurement, after: Measurement) -> list[str]:
    """The readings of the steps of a suspect that a remedy moved."""
    parts = []
    for index in suspect.steps:
        one, two = before.steps[index], after.steps[index]
        name = one.module_path or one.name
        if _moved(one.mean_gain, two.mean_gain):
            parts.append(f"gain of {name} {nats(one.mean_gain)} -> {nats(two.mean_gain)}")
        for old, new in zip(one.merges, two.merges, strict=False):
            if _moved(old.gain, new.gain):
                parts.append(f"gain of its branch {old.module_path} {nats(old.gain)} -> {nats(new.gain)}")
        for a, b in zip(one.activities, two.activities, strict=False):
            for what in ("dead", "saturated"):
                x, y = getattr(a, what), getattr(b, what)
                if abs(x - y) > _NOTICED:
                    parts.append(f"{what} {a.operation} in {name} {x:.0%} -> {y:.0%}")
        for w, v in zip(one.weights, two.weights, strict=False):
            if w.path == v.path and _moved(w.log_rank, v.log_rank):
                parts.append(f"effective rank of {w.path} {math.exp(w.log_rank):.1%} -> {math.exp(v.log_rank):.1%}")
            if w.path == v.path and _moved(w.gains[0], v.gains[0]) and math.isfinite(w.gains[0]):
                parts.append(f"size of {w.path} {w.gains[0]:+.2f} -> {v.gains[0]:+.2f} nats")
    return parts[:3]


def _moved(one: float, two: float) -> bool:
    if math.isnan(one) or math.isnan(two):
        return False
    return one != two and (math.isinf(one) or math.isinf(two) or abs(one - two) > _NOTICED_NATS)
