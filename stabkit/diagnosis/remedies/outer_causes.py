"""Causes that lie before the weights of the blocks that show them: the size of the data, sums in the model's code.

They are tried first. To scale the weights of blocks would make up for them as well, and leave them where they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from stabkit.diagnosis.blocks.weights import Weight
from stabkit.diagnosis.depth.summing_operations import Summing, divided, summing_operations
from stabkit.diagnosis.inputs.features import features_of
from stabkit.diagnosis.inputs.sizes import large_inputs
from stabkit.diagnosis.measurement import Measurement
from stabkit.diagnosis.remedies.computed import Remedy, redraw, scale
from stabkit.diagnosis.remedies.made_once import once
from stabkit.tracing import Flow
from stabkit.tracing.derivatives.lost_gradient import listed

_USUAL = math.log(2.0)  # gain of a weight drawn with any of the usual gains, of which the largest is 5/3 (tanh), nats
#: half of the smallest gain that is usual, 1/sqrt(3) of torch's linear and convolutional layers, nats
_UNUSUALLY_SMALL = math.log(0.5 / math.sqrt(3.0))
_FEWEST = 2  # matrices that a statement about all of them needs


def outer_causes(flow: Flow, measurement: Measurement) -> list[Remedy]:
    """Remedies of the data and of the code that are worth a trial; sums only where the weights are of usual size."""
    words = "outer causes"
    return once(lambda: [*_of_data(flow), *_of_sums(flow, measurement)], flow.forward_pass, (flow, measurement), words)


def _of_data(flow: Flow) -> list[Remedy]:
    sizes = large_inputs(flow)
    if sizes is None or sizes.inside or _is_uneven(flow):  # of divided data a derivative is another
        return []
    cause = f"the input has the size {sizes.size:.3g} and not 1"
    return [Remedy(f"{sizes.remedy}; targets in the same units too", cause=cause, data=sizes)]


def _is_uneven(flow: Flow) -> bool:
    """Whether features differ so much that no single factor is the remedy: what standardises each is told instead."""
    given = flow.forward_pass.given
    return any((found := features_of(flow, name, t)) is not None and found.uneven for name, t in given)


def _of_sums(flow: Flow, measurement: Measurement) -> list[Remedy]:
    matrices = matrices_of(measurement)
    if matrices and median([w.gains[0] for w in matrices]) > _USUAL:
        return []
    found = summing_operations(flow.forward_pass)
    if not found:
        return []
    found = sorted(found, key=lambda each: -each.gain * each.calls)
    text = "; and ".join(map(_divide, found))  # all of them, as they are tried
    return [Remedy(text, cause=_told(found, found[0]), place=found[0].path, within=divided(found))]


def _told(found: Sequence[Summing], first: Summing) -> str:
    times = f" {first.calls} times" if first.calls > 1 else ""
    what = (
        f"multiplies by a fixed operand that makes unrelated entries {first.terms:.3g} times as large"
        if first.signed
        else f"sums over {first.terms:.3g} terms on average"
    )
    others = tuple(each.place for each in found if each is not first)
    return (
        f"what makes it grow is {first.place}, which runs{times} and {what}, and divides by nothing: the state is up "
        f"to {first.gain:.3g} times as large behind it" + (f"; so does {listed(others)}" if others else "")
    )


def _divide(first: Summing) -> str:
    if first.signed:
        return f"divide what {first.name} multiplies by ({first.line or first.place}) by {first.terms:.3g}"
    if first.name == "sum":
        return f"take the mean in the place of the sum ({first.line or first.place}): divide it by {first.terms:.3g}"
    return (
        f"divide the sum by the number of its terms ({first.line or first.place}): by the degree of each node (a mean "
        f"over its neighbours, D^-1 A; here {first.terms:.3g} on average), or symmetrically, D^-1/2 A D^-1/2"
    )


def matrices_of(measurement: Measurement) -> list[Weight]:
    """The matrices that are trained, without tables, once each."""
    held = {w.path: w for step in measurement.steps for w in step.weights}
    return [
        w for w in held.values() if w.kind == "matrix" and w.finite and not (w.tied or w.fixed) and w.gains[0] > -30
    ]


def median(values: Sequence[float]) -> float:
    """The middle of some numbers."""
    return sorted(values)[len(values) // 2]


def is_unusual(gain: float) -> bool:
    """Whether a gain, in nats, is beyond those that weights are usually started with.

    Example:
        >>> is_unusual(0.0), is_unusual(1.0), is_unusual(-3.0)
        (False, True, True)
    """
    return gain > _USUAL or gain < _UNUSUALLY_SMALL


def larger_weights(measurement: Measurement) -> list[Remedy]:
    """All matrices drawn anew with the usual size, or those of a kind of layer, where they were started far below it.

    He's gain where most activations pass one side alone, as ReLUs do, and 1 elsewhere.
    """
    kinds = _by_class(measurement)
    small = {name: held for name, held in kinds.items() if median([w.gains[0] for w in held]) < _UNUSUALLY_SMALL}
    weights = [w for held in small.values() for w in held]
    if len(weights) < _FEWEST:
        return []
    by = math.exp(median([w.gains[0] for w in weights]))
    sides = [a.facts.flat_side == "below" for step in measurement.steps for a in step.activities if not a.gate]
    gain = math.sqrt(2.0) if 2 * sum(sides) > len(sides) else 1.0
    what = f"all {len(weights)} matrices" + ("" if len(small) == len(kinds) else f" of {' and '.join(small)}")
    rule = "sqrt(2 / fan-in), He's initialisation" if gain > 1.0 else "1 / sqrt(fan-in)"
    return [
        Remedy(
            f"start {what} with the standard deviation {rule}",
            tuple(redraw(w.path, gain / w.unit) for w in weights),
            cause=f"{what} were started small: with a standard deviation of {by:.2g} / sqrt(fan-in) in the middle, "
            "where initialisations use 0.6 to 1.7",
        )
    ]


def _by_class(measurement: Measurement) -> dict[str, list[Weight]]:
    kinds: dict[str, list[Weight]] = {}
    for weight in matrices_of(measurement):
        kinds.setdefault(weight.module_class, []).append(weight)
    return kinds


def smaller_weights(measurement: Measurement) -> list[Remedy]:
    """All matrices brought to usual size, or those of a kind of layer, where they were started far above it."""
    kinds = _by_class(measurement)
    large = {name: held for name, held in kinds.items() if median([w.gains[0] for w in held]) > _USUAL}
    weights = [w for held in large.values() for w in held]
    if len(weights) < _FEWEST:
        return []
    by = math.exp(median([w.gains[0] for w in weights]))
    whole = len(large) == len(kinds)
    what = f"all {len(weights)} matrices" if whole else f"all {len(weights)} matrices of {' and '.join(large)}"
    cause = (
        f"{what} were started large: with a standard deviation of {by:.3g} / sqrt(fan-in) in the middle, where "
        "initialisations use 0.6 to 1.7"
    )
    together = Remedy(
        f"start {what} {by:.3g} times as small",
        tuple(scale(w.path, 1.0 / by) for w in weights),
        cause=cause,
    )
    each = Remedy(
        f"start {what} with the standard deviation 1 / sqrt(fan-in), about {by:.3g} times as small as they are",
        tuple(scale(w.path, math.exp(-w.gains[0])) for w in weights),
        cause=cause,
    )
    return [each, together]
