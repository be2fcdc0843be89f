"""Inputs far smaller than 1, of which a network with biases makes the same for all samples: pixels scaled twice.

What the first matrices are given counts, whatever the model divided before them. It is brought to size 1 on a copy:
what the states show, if anything, must go with it, and training must learn only so.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from stabkit.diagnosis.blocks.weights import step_of
from stabkit.diagnosis.finding import Finding, serious
from stabkit.diagnosis.inputs.derivatives import differentiates
from stabkit.diagnosis.inputs.first_matrices import rows_given
from stabkit.diagnosis.remedies import computed as remedies
from stabkit.diagnosis.remedies.trial import follows, tried
from stabkit.diagnosis.remedies.usual_training import RATES, adam, learns_only_treated, left_after
from stabkit.diagnosis.suspects import Diagnosis, Settings, ordered
from stabkit.diagnosis.verdict import judged_without
from stabkit.tracing import Flow
from stabkit.tracing.derivatives.lost_gradient import listed
from stabkit.tracing.recording.training_pass import training_pass

_SMALL = 0.1  # root mean square from which on a size is worth a trial, which decides; pixels over 255 twice have .002
_PIXELS = 255.0
_STEPS = 20  # of a trial: of pixels scaled twice .75 to .97 of the loss stays, .0002 of those brought to size 1
_OF_SIZE = ("rank_collapse", "vanishing", "dead")
_REFERENCE = "LeCun, Bottou, Orr and Müller, Efficient backprop, 1998, section 4.3"


def with_small_inputs(flow: Flow, found: Diagnosis, settings: Settings) -> Diagnosis:
    """A diagnosis in which what small inputs make of the states is told as what follows from them.

    Args:
        flow: the traced pass.
        found: the diagnosis so far.
        settings: how suspects are looked for.
    """
    accused = [f for f in found.findings if serious(f) and f.kind in _OF_SIZE]
    call, loss = flow.forward_pass, settings.loss
    if not callable(loss) or any(serious(f) for f in found.findings if f not in accused):
        return found
    rows = rows_given(call)
    sizes = {path: _rms(given) for path, given in rows.items()}
    if not sizes or not all(0 < size < _SMALL for size in sizes.values()):
        return found
    actions = tuple(remedies.scale_input(path, 1.0 / size) for path, size in sizes.items())
    trial = tried(flow, accused[0], actions, found, settings) if accused else None
    gone = [] if trial is None else trial.gone(accused)
    if trial is not None and (not gone or trial.after is None):
        return found
    begun = training_pass(call, loss, differentiate=False).loss
    rates = [adam(rate) for rate in RATES]
    plain, treated = (left_after(call, loss, rates, each, steps=_STEPS) for each in ((), actions))
    if begun is None or plain is None or treated is None or not (first := float(begun.detach())) > 0:
        return found
    if not learns_only_treated(first, plain * first, treated * first):
        return found
    size, largest = max(sizes.values()), max(float(given.abs().max()) for given in rows.values())
    twice = 0.5 < largest * _PIXELS <= 1.01
    where = "in front of these layers" if differentiates(call, loss) else "where the data are read, or there"
    cause = Finding(
        kind="input_scale",
        severity="warning",
        steps=(step_of(flow, next(iter(sizes))),),
        module_path=next(iter(sizes)),
        confidence=1.0,
        evidence=f"what {listed(tuple(sizes))} is given has the size {size:.2g} and not 1"
        + (f", at most {largest:.3g}, as pixels have that were divided by 255 twice" if twice else "")
        + f": beside the biases it is next to nothing; {_STEPS} steps of Adam leave {plain:.0%} of the loss as it is, "
        f"{treated:.2g} of it with that brought to size 1",
        remedy=("divide pixels by 255 once; what is given so far: " if twice else "")
        + f"divide by {size:.2g}, or standardise, {where}",
        reference=_REFERENCE,
        numbers={"input_size": size, "left": plain, "treated": treated},
        actions=actions,
    )
    verdict = found.verdict
    if trial is not None and trial.after is not None and any(f.kind == verdict.name for f in gone):
        verdict = judged_without(verdict, trial.after.verdict, "the size of the input")
    told = [follows(f, cause) if any(f is g for g in gone) else f for f in found.findings]
    return replace(found, verdict=verdict, findings=tuple(ordered([cause, *told])))


def _rms(given: Tensor) -> float:
    return float(given.double().square().mean().sqrt())
