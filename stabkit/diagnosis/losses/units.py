"""Losses in units that the usual optimizers are not made for: targets far from the output, gradients below Adam's eps.

Nothing else in a diagnosis depends on the units of a loss. These do, since a rate of 0.01 and an eps of 1e-8 are
numbers that people leave as they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from stabkit.diagnosis.finding import LOSS, Finding, of_last_step
from stabkit.diagnosis.losses.loud_logits import cross_entropies
from stabkit.diagnosis.losses.regressions import Regression, regressions
from stabkit.diagnosis.losses.scales import Standardised, far_targets, rms, standardised_inputs, standardised_targets
from stabkit.diagnosis.remedies.given_optimizer import named_settings, steps_of_given
from stabkit.diagnosis.remedies.short_training import STEPS
from stabkit.diagnosis.remedies.usual_training import EPSILON, RATES, adam, left_after, sgd
from stabkit.diagnosis.training_run import TrainingRun
from stabkit.tracing.recording.forward_pass import ForwardPass
from stabkit.tracing.recording.training_pass import TrainingPass

_SHORTENS = 10  # times eps: root mean square of a gradient from which eps shortens a step by a tenth
_UNLEARNT = 0.05  # of what equal chances, or the mean of the targets, cost: below, a loss is small since it was learnt
_MOVES = 0.05  # of a loss that a few steps take away where they move something
_FURTHER = 5.0  # times as far as it falls, that a loss of other units must
_STILL = 0.01  # of a loss that they take away where they move nothing
_DIVERGED = 1e3  # times as large as at the start
_LECUN = "LeCun, Bottou, Orr and Müller, Efficient backprop, 1998, section 4.3"
_KINGMA = "Kingma and Ba, Adam: a method for stochastic optimization, 2015"


def unit_findings(run: TrainingRun) -> list[Finding]:
    """What the units of a loss keep from training, tried with the usual optimizers."""
    found = list(regressions(run.done))
    return _far_targets(run) or _below_eps(run, found)


def _far_targets(run: TrainingRun) -> list[Finding]:
    """Targets that the output is so far from that the first steps are as large as they are."""
    assert run.done.loss is not None
    for each in far_targets(run):
        standard = standardised_targets(run, each)
        if standard is None:
            continue
        pairs = [_ends(run.call, some) for some in (run.loss, standard.loss)]
        if pairs[0] is None or pairs[1] is None or not pairs[1][1] <= 1 - _MOVES:
            continue
        plain, cured, first = pairs[0], pairs[1], float(run.done.loss.detach())
        diverges, stands = plain[0] > 1.0, plain[1] > 1 - _MOVES
        # where activations are bounded it does not diverge: they saturate, and what is left is a constant
        constant = plain[0] * first > (1 - _STILL) * standard.floor
        given = _by_the_given(run, standard)
        if not (diverges or stands or given):
            continue
        residual, size = rms(each.targets.double() - each.output.double()), rms(each.output)
        rates = " or ".join(f"{rate:g}" for rate in RATES)
        learns = f", no better than a constant ({standard.floor / first:.1%})" if constant and not diverges else ""
        evidence = (
            f"the targets of the loss lie at {standard.mean:.3g} with a spread of {standard.spread:.3g}, and the "
            f"output is of size {size:.3g}: the loss begins at {first:.3g}, which the usual rates are not made "
            f"for; tried on a copy, {STEPS} steps at {rates}: SGD {_left(plain[0])}{learns}, "
            f"Adam {_left(plain[1])}; with standardised targets SGD {_left(cured[0])}, Adam {_left(cured[1])}{given}"
        )
        remedy = standard.remedy
        if cured[0] > 1.0:
            more, remedy = _with_inputs(run, standard, remedy)
            evidence += more
        # where plain gradient descent learns, there is an optimizer that these units suit, unless another one is given
        severity = "warning" if given or (stands and (diverges or constant)) else "info"
        numbers = {"residual": residual, "output": size, "mean": standard.mean, "spread": standard.spread}
        return [of_last_step(run.flow, "loss", severity, LOSS, evidence, remedy, _LECUN, numbers)]
    return []


def _by_the_given(run: TrainingRun, standard: Standardised) -> str:
    """What the optimizer that is given leaves, in words, where it stands still and moves with standardised targets."""
    if run.optimizer is None:
        return ""
    plain, cured = (steps_of_given(run.call, some, run.optimizer) for some in (run.loss, standard.loss))
    if plain is None or cured is None or not plain.left > 1 - _MOVES or not cured.left <= 1 - _MOVES:
        return ""
    if not 1 - cured.left > _FURTHER * (1 - plain.left):
        return ""
    return (
        f"; {STEPS} steps of the {type(run.optimizer).__name__} that is given, at its own settings: "
        f"{_left(plain.left)}, and with standardised targets {_left(cured.left)}"
    )


def _with_inputs(run: TrainingRun, standard: Standardised, remedy: str) -> tuple[str, str]:
    """More evidence and the remedy, where standardised targets alone leave plain gradient descent to diverge."""
    inputs = standardised_inputs(run)
    both = None if inputs is None else _ends(inputs[0], standard.loss)
    alone = None if inputs is None else _ends(inputs[0], run.loss)
    if inputs is None or both is None or alone is None or not max(both[0], both[1]) <= 1 - _MOVES:
        return "", f"{remedy}; and train with Adam: plain SGD at these rates diverges with that as well"
    return (
        f"; with standardised inputs SGD {_left(alone[0])}, Adam {_left(alone[1])}; with both SGD {_left(both[0])}, "
        f"Adam {_left(both[1])}",
        f"{inputs[1]}; and {remedy}" + ": both, since either alone leaves SGD to diverge" * (alone[0] > 1.0),
    )


def _ends(call: ForwardPass, loss: Any) -> tuple[float, float] | None:
    """What a few steps of SGD and of Adam leave of a loss; None where they were not made."""
    left = [left_after(call, loss, [by(rate) for rate in RATES]) for by in (sgd, adam)]
    return None if left[0] is None or left[1] is None else (left[0], left[1])


def _left(share: float) -> str:
    return f"leaves {share:.1%} of it" if share < _DIVERGED else "diverges"


def _below_eps(run: TrainingRun, found: Sequence[Regression]) -> list[Finding]:
    """Gradients so small that Adam divides them by its eps instead of by their size."""
    sizes = {path: rms(g.to_dense()) for path, g in run.done.gradients.items() if g is not None}
    largest = max(sizes.values(), default=0.0)
    name, epsilon = "Adam", EPSILON
    if run.optimizer is not None:
        name, epsilon = type(run.optimizer).__name__, max(named_settings(run.optimizer, "eps"), default=0.0)
    if not 0 < largest < _SHORTENS * epsilon or not _unlearnt(run.done, found):
        return []
    plain, scaled = (_left_of_scaled(run, factor) for factor in (1.0, 1.0 / largest))
    if plain is None or scaled is None or not scaled <= 1 - _MOVES:
        return []
    limited = 1 - plain < _MOVES * (1 - scaled)
    evidence = (
        f"the gradients of all {len(sizes)} parameters are of size {largest:.2g} at most, and {name} adds {epsilon:g} "
        f"to their size before it divides by it, so that its first steps are {largest / (largest + epsilon):.2g} of "
        f"what the rate says; tried on a copy, {STEPS} steps of {name} leave {plain:.1%} of the loss, and {scaled:.1%} "
        f"with the loss multiplied by {1 / largest:.2g}"
    )
    eps = f"give {name} an eps far below {largest:.2g}"
    # an eps that somebody set is what is odd, and not the size of the loss
    remedy = f"{eps}, as the usual {EPSILON:g}; or " * (epsilon > EPSILON)
    remedy += f"multiply the loss by {_decade(1 / largest)}"
    spread = max((rms(each.targets) for each in found), default=0.0)
    if spread > 0:
        remedy += f", or divide outputs and targets by {spread:.2g}, their size, before they meet"
    remedy += f"; or {eps}" * (epsilon <= EPSILON)
    numbers = {"gradient": largest, "epsilon": epsilon, "plain": plain, "scaled": scaled}
    return [of_last_step(run.flow, "loss", "warning" if limited else "info", LOSS, evidence, remedy, _KINGMA, numbers)]


def _left_of_scaled(run: TrainingRun, factor: float) -> float | None:
    """What Adam, or the optimizer that is given, leaves of the loss where that is multiplied by a factor."""
    if run.optimizer is None:
        return left_after(run.call, run.loss, [adam(r, factor) for r in RATES])
    steps = steps_of_given(run.call, lambda out: factor * run.loss(out), run.optimizer)
    return None if steps is None else steps.left


def _decade(number: float) -> str:
    return f"{10.0 ** round(math.log10(number)):.0e}"


def _unlearnt(done: TrainingPass, found: Sequence[Regression]) -> bool:
    """Whether a loss is far from learnt, whatever its units are; False where that cannot be told."""
    for each in found:
        wanted = each.targets.double()
        spread, missed = float((wanted - wanted.mean()).square().mean()), rms(wanted - each.output.double()) ** 2
        if spread > 0 and missed > _UNLEARNT * spread:
            return True
    assert done.loss is not None
    return any(each.value > _UNLEARNT * each.chance for each in cross_entropies(done.loss))
