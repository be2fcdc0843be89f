"""All matrices, or all of a kind of layer, started so small that nothing is learnt at first, within range as they are.

What a few layers of a standard deviation of 0.01 do to states and gradients is less than what counts as vanishing, and
yet the outputs are the same for all samples until the weights have grown. Training says whether that costs anything.
"""

from __future__ import annotations

from dataclasses import replace

from stabkit.diagnosis.finding import Finding, serious
from stabkit.diagnosis.remedies.learning import beside_a_constant
from stabkit.diagnosis.remedies.outer_causes import larger_weights
from stabkit.diagnosis.remedies.usual_training import ADAM, left_only_treated
from stabkit.diagnosis.suspects import Diagnosis, Settings, ordered
from stabkit.tracing import Flow, FlowLike

_STEPS = 20  # of a trial: five convolutions of 0.01 kept .96 of the loss, and .002 drawn by He; six tanh layers alike
# of what the best constant output leaves of the loss: below it samples are told apart, whatever the weights look like.
# A network of sines of 30 x, whose weights are small by design, comes to .001 of it
_TELLS_APART = 0.5
_REFERENCE = "He et al., Delving deep into rectifiers, 2015, section 2.2"


def with_small_matrices(flow: FlowLike, found: Diagnosis, settings: Settings) -> Diagnosis:
    """A diagnosis in which nothing else is wrong, with weights that were all started far below the usual size."""
    loss = settings.loss
    if settings.trained or not isinstance(flow, Flow) or not callable(loss) or any(map(serious, found.findings)):
        return found
    if any(step.norms for step in found.measurement.steps):  # which take the size out again
        return found
    tries = larger_weights(found.measurement)
    if not tries:
        return found
    (remedy,) = tries
    now = beside_a_constant(flow.forward_pass, loss)
    if now is not None and now < _TELLS_APART:
        return found
    left = left_only_treated(flow.forward_pass, loss, remedy.actions, _STEPS)
    if left is None:
        return found
    plain, with_remedy = left
    changed = {str(action["parameter"]) for action in remedy.actions}
    steps = tuple(s.index for s in found.measurement.steps if any(w.path in changed for w in s.weights))
    finding = Finding(
        kind="vanishing",
        severity="warning",
        steps=steps,
        module_path=found.measurement.steps[steps[0]].module_path,
        confidence=1.0,
        evidence=f"{remedy.cause}; {_STEPS} steps of {ADAM} leave {plain:.0%} of the loss as it is, and "
        f"{with_remedy:.2g} of where it was with weights drawn anew",
        remedy=remedy.text,
        reference=_REFERENCE,
        numbers={"left": plain, "treated": with_remedy},
        actions=remedy.actions,
    )
    return replace(found, findings=tuple(ordered([finding, *found.findings])))
