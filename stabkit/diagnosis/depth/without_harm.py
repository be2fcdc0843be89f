"""Gradients that vanish over depth, and states that become alike, in a model that learns all the same: facts.

Optimizers that divide a gradient by its size do not mind how large it is. So the model is trained as it is for a few
usual steps: where it learns from its input, or as well as with what takes the finding away, no harm was measured.

Where nothing at all comes back to the first state, layers stand still, unless all of their matrices get a gradient
by other ways: the slope of a network of ReLUs changes with every weight, and not with the point where it is taken.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from stabkit.diagnosis.finding import Finding, as_fact, serious
from stabkit.diagnosis.no_gradient.closed_operations import any_entry
from stabkit.diagnosis.remedies.learning import left_beside_a_constant
from stabkit.diagnosis.remedies.short_training import STEPS
from stabkit.diagnosis.remedies.trial import is_stretch
from stabkit.diagnosis.remedies.usual_training import ADAM
from stabkit.diagnosis.suspects import Diagnosis, Settings, ordered
from stabkit.diagnosis.verdict import judged_harmless
from stabkit.tracing import Flow, FlowLike
from stabkit.tracing.recording.training_pass import training_pass

#: of what the best constant output leaves of the loss. Tanh nets of 4 to 8 layers on derivatives kept .27 to .36 after
#: twenty steps and trained on; plain ReLUs, tanhs and sigmoids of 12 to 30 layers kept .66 and above
_LEARNS = 0.5
_BEGINS = 0.9  # of the same: clearly more than a constant, where what takes the finding away is no better
_NO_BETTER = 0.05  # of the same, by which a remedy must end lower to be one


def with_harmless_as_facts(flow: FlowLike, found: Diagnosis, settings: Settings) -> Diagnosis:
    """A diagnosis in which what does no measured harm is a fact to know, also in its verdict."""
    if not isinstance(flow, Flow) or not callable(settings.loss):
        return found
    found = _reached_otherwise(flow, found, settings.loss)
    suspects = [finding for finding in found.findings if serious(finding) and _is_over_depth(finding)]
    if not suspects:
        return found
    left = left_beside_a_constant(flow.forward_pass, settings.loss)
    if left is None or not left < _BEGINS:
        return found
    told = {id(suspect): _without_harm(flow, suspect, left, settings) for suspect in suspects}
    findings = tuple(ordered([told.get(id(finding), finding) for finding in found.findings]))
    verdict = found.verdict
    if verdict.name == "vanishing" and not any(serious(f) and f.kind in ("vanishing", "dead") for f in findings):
        verdict = judged_harmless(verdict, f"{STEPS} steps of {ADAM} leave {left:.0%} of what the best constant leaves")
    return replace(found, verdict=verdict, findings=findings)


def _reached_otherwise(flow: Flow, found: Diagnosis, loss: Any) -> Diagnosis:
    """A diagnosis in which a first state that nothing comes back to is a fact, where all matrices get a gradient."""
    lost = next((f for f in found.findings if serious(f) and f.kind == "vanishing" and not _is_over_depth(f)), None)
    if lost is None or found.verdict.growth != -math.inf or any(f is not lost and serious(f) for f in found.findings):
        return found
    # of a slope that is the same within a region no bias tells
    gradients = [g for g in training_pass(flow.forward_pass, loss).gradients.values() if g is not None and g.dim() > 1]
    if not gradients or not all(any_entry(g) for g in gradients):
        return found
    why = f"all {len(gradients)} matrices that the loss is made of get a gradient that is not zero"
    told = as_fact(
        lost, f"{why}, by ways that do not lead through the first state", "none is needed: all of them train"
    )
    verdict = judged_harmless(found.verdict, why, "the weights are reached all the same")
    return replace(found, verdict=verdict, findings=tuple(ordered([told if f is lost else f for f in found.findings])))


def _is_over_depth(finding: Finding) -> bool:
    """Whether it is about growth that is finite over the whole stretch, or about states that become alike over it.

    Where nothing at all comes back, layers stand still, whatever the others learn.
    """
    if finding.kind == "vanishing":
        return "rate" in finding.numbers and "growth" in finding.numbers
    return finding.kind in ("overdamped", "rank_collapse") and is_stretch(finding)


def _is_of_the_start(suspect: Finding) -> bool:
    """Whether weights were started far from every usual initialisation, and are better drawn anew.

    Such a model learns with Adam, which divides by the size of gradients, and not with plain descent: convolutions of
    standard deviation .01 keep 97 % of their loss with it, and 58 % when drawn anew.
    """
    return bool(suspect.actions) and all(action["action"] == "redraw" for action in suspect.actions)


def _without_harm(flow: Flow, suspect: Finding, left: float, settings: Settings) -> Finding:
    """A suspect as a fact, where a few steps show no harm of it."""
    evidence = f"{STEPS} steps of {ADAM} as it is leave {left:.1%} of what the best constant output leaves of the loss"
    if _is_of_the_start(suspect):
        return suspect
    if not left < _LEARNS:
        if not suspect.actions:
            return suspect
        treated = left_beside_a_constant(flow.forward_pass, settings.loss, suspect.actions)
        if treated is None or treated < left - _NO_BETTER:
            return suspect
        evidence += f", and {treated:.1%} with what takes it away"
    return as_fact(suspect, evidence, f"none is needed for these samples; if training stalls: {suspect.remedy}")
