"""Which scaling of a large input trains best: every feature standardised, or all divided by one size."""

from __future__ import annotations

from typing import Any

from stabkit.diagnosis.inputs.features import changed, features_of
from stabkit.diagnosis.inputs.sizes import Sizes
from stabkit.diagnosis.remedies.short_training import STEPS
from stabkit.diagnosis.remedies.usual_training import RATES, adam, left_after, sgd
from stabkit.tracing import Flow
from stabkit.tracing.recording.containers import named_tensors
from stabkit.tracing.recording.evaluation import evaluated
from stabkit.tracing.recording.forward_pass import ForwardPass
from stabkit.tracing.recording.training_pass import training_pass


def best_scaling(flow: Flow, loss: Any, call: ForwardPass, sizes: Sizes) -> str:
    """What to do about large inputs, in words, that which trains best in front.

    Args:
        flow: the traced pass.
        loss: a callable on the output that returns a scalar.
        call: the pass as training makes it.
        sizes: of its inputs.
    """
    given = [*named_tensors(list(call.inputs)), *named_tensors(call.kwargs)]
    found = {id(t): f for name, t in given if (f := features_of(flow, name, t)) is not None and f.uneven}
    if not found or sizes.inside:
        return sizes.remedy
    standard = changed(call, lambda t: found[id(t)].standardised(t) if id(t) in found else t)
    ends = [_end(each, loss) for each in (standard, sizes.divided(call))]
    if ends[0] is None or ends[1] is None or not ends[0] < ends[1]:
        return sizes.remedy
    return (
        "standardise every feature where the data are read, (x - mean) / std with the numbers of the training set: "
        f"{STEPS} steps of SGD or Adam take the loss to {ends[0]:.3g} at best, and to {ends[1]:.3g} with all divided "
        f"by {sizes.size:.3g}"
    )


def _end(call: ForwardPass, loss: Any) -> float | None:
    """The loss after a few steps, at the best of the usual optimizers and rates."""
    if evaluated(call, training=True).output is None:
        return None
    first = training_pass(call, loss, differentiate=False).loss
    left = [left_after(call, loss, [by(rate) for rate in RATES]) for by in (sgd, adam)]
    known = [share for share in left if share is not None]
    return min(known) * float(first.detach()) if first is not None and known else None
