"""Losses in units that the usual optimizers are not made for: targets far from the output, gradients below Adam's eps.

Nothing else in a diagnosis depends on the units of a loss. These do, since a rate of 0.01 and an eps of 1e-8 are
numbers that people leave as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from stabkit.diagnosis.finding import LOSS, Finding, of_last_step
from stabkit.diagnosis.losses.loud_logits import cross_entropies
from stabkit.diagnosis.losses.regressions import Regression, regressions
from stabkit.diagnosis.remedies.short_training import STEPS
from stabkit.diagnosis.remedies.usual_training import EPSILON, RATES, adam, left_after, sgd
from stabkit.diagnosis.training_run import TrainingRun
from stabkit.tracing.recording.containers import map_tensors, named_tensors
from stabkit.tracing.recording.training_pass import TrainingPass

_FAR = 30.0  # times its size that an output is from its targets, from which it is tried; what it does decides
_SMALL = 10 * EPSILON  # root mean square of a gradient from which eps shortens a step by a tenth
_UNLEARNT = 0.05  # of what equal chances, or the mean of the targets, cost: below, a loss is small since it was learnt
_MOVES = 0.05  # of a loss that a few steps take away where they move something
_STILL = 0.01  # of a loss that they take away where they move nothing
_DIVERGED = 1e3  # times as large as at the start
_LECUN = "LeCun, Bottou, Orr and Müller, Efficient backprop, 1998, section 4.3"
_KINGMA = "Kingma and Ba, Adam: a method for stochastic optimization, 2015"


def unit_findings(run: TrainingRun) -> list[Finding]:
    """What the units of a loss keep from training, tried with the usual optimizers."""
    found = list(regressions(run.done))
    return _far_targets(run, found) or _below_eps(run, found)


def _rms(tensor: Tensor) -> float:
    return float(tensor.detach().double().square().mean().sqrt()) if tensor.numel() else 0.0


def _far_targets(run: TrainingRun, found: Sequence[Regression]) -> list[Finding]:
    """Targets that the output is so far from that the first steps are as large as they are."""
    assert run.done.loss is not None
    for each in found:
        residual, size = _rms(each.targets.double() - each.output.double()), _rms(each.output)
        if not math.isfinite(residual) or residual < _FAR * max(1.0, size):
            continue
        found_by = _standardised(run, each)
        if found_by is None:
            continue
        standard, floor = found_by
        tries = [
            left_after(run.call, some, [by(r) for r in RATES]) for some in (run.loss, standard) for by in (sgd, adam)
        ]
        known = [share for share in tries if share is not None]
        if len(known) < len(tries) or not min(known[2:]) <= 1 - _MOVES:
            continue
        plain, cured, first = known[:2], known[2:], float(run.done.loss.detach())
        diverges, stands = plain[0] > 1.0, plain[1] > 1 - _MOVES
        # where activations are bounded it does not diverge: they saturate, and what is left is a constant
        constant = plain[0] * first > (1 - _STILL) * floor
        if not (diverges or stands):
            continue
        mean, spread = float(each.targets.double().mean()), float(each.targets.double().std(correction=0))
        rates = " or ".join(f"{rate:g}" for rate in RATES)
        learns = f", no better than a constant ({floor / first:.1%})" if constant and not diverges else ""
        evidence = (
            f"the targets of the loss lie at {mean:.3g} with a spread of {spread:.3g}, and the output is of size "
            f"{size:.3g}: the loss begins at {first:.3g}, which the usual rates are not made "
            f"for; tried on a copy, {STEPS} steps at {rates}: SGD {_left(plain[0])}{learns}, "
            f"Adam {_left(plain[1])}; with standardised targets SGD {_left(cured[0])}, Adam {_left(cured[1])}"
        )
        remedy = (
            f"standardise the targets, (y {_minus(mean)}) / {spread:.3g}, and undo it in predictions; or let the model "
            f"end in {mean:.3g} + {spread:.3g} * output, and divide a squared error by {spread**2:.3g}"
        )
        # where plain gradient descent learns, there is an optimizer that these units suit
        severity = "warning" if stands and (diverges or constant) else "info"
        numbers = {"residual": residual, "output": size, "mean": mean, "spread": spread}
        return [of_last_step(run.flow, "loss", severity, LOSS, evidence, remedy, _LECUN, numbers)]
    return []


def _minus(number: float) -> str:
    return f"{'-' if number >= 0 else '+'} {abs(number):.3g}"


def _left(share: float) -> str:
    return f"leaves {share:.1%} of it" if share < _DIVERGED else "diverges"


def _standardised(run: TrainingRun, found: Regression) -> tuple[Callable[[Any], Tensor], float] | None:
    """The loss of an output that is stretched to where the targets lie, over what their mean leaves of it, and that.

    Of a squared error it is the loss of standardised targets, whatever the loss is besides. None where it is not clear
    which output that is, or where a constant is all that there is to learn.
    """
    named = [(path, t) for path, t in named_tensors(run.done.output) if t.requires_grad]
    paths = {path: t.shape for path, t in named if t.grad_fn is found.node or len(named) == 1}
    if len(paths) != 1:
        return None
    columns = found.targets.dim() > 1 and list(paths.values()) == [found.targets.shape]
    dims = [d for d in range(found.targets.dim()) if d != 1] if columns else list(range(found.targets.dim()))
    mean = found.targets.mean(dims, keepdim=True) if columns else found.targets.mean()
    spread = found.targets.std(dims, correction=0, keepdim=True) if columns else found.targets.std(correction=0)

    def stretched(output: Any, by: Tensor) -> Any:
        chosen = {id(t) for path, t in named_tensors(output) if path in paths}
        return map_tensors(output, lambda t: mean + by * t if id(t) in chosen else t)

    with torch.no_grad():
        floor = float(run.loss(stretched(run.done.output, torch.zeros_like(spread))))
    if not (math.isfinite(floor) and floor > 0 and bool((spread > 0).all())):
        return None
    return (lambda output: run.loss(stretched(output, spread)) / floor), floor


def _below_eps(run: TrainingRun, found: Sequence[Regression]) -> list[Finding]:
    """Gradients so small that Adam divides them by its eps instead of by their size."""
    sizes = {path: _rms(g.to_dense()) for path, g in run.done.gradients.items() if g is not None}
    largest = max(sizes.values(), default=0.0)
    if not 0 < largest < _SMALL or not _unlearnt(run.done, found):
        return []
    plain, scaled = (
        left_after(run.call, run.loss, [adam(r, factor) for r in RATES]) for factor in (1.0, 1.0 / largest)
    )
    if plain is None or scaled is None or not scaled <= 1 - _MOVES:
        return []
    limited = 1 - plain < _MOVES * (1 - scaled)
    evidence = (
        f"the gradients of all {len(sizes)} parameters are of size {largest:.2g} at most, and Adam adds {EPSILON:g} to "
        f"their size before it divides by it, so that its first steps are {largest / (largest + EPSILON):.2g} of what "
        f"the rate says; tried on a copy, {STEPS} steps of Adam leave {plain:.1%} of the loss, and {scaled:.1%} with "
        f"the loss multiplied by {1 / largest:.2g}"
    )
    remedy = f"multiply the loss by {_decade(1 / largest)}"
    spread = max((_rms(each.targets) for each in found), default=0.0)
    if spread > 0:
        remedy += f", or divide outputs and targets by {spread:.2g}, their size, before they meet"
    remedy += f"; or give Adam an eps far below {largest:.2g}"
    numbers = {"gradient": largest, "epsilon": EPSILON, "plain": plain, "scaled": scaled}
    return [of_last_step(run.flow, "loss", "warning" if limited else "info", LOSS, evidence, remedy, _KINGMA, numbers)]


def _decade(number: float) -> str:
    return f"{10.0 ** round(math.log10(number)):.0e}"


def _unlearnt(done: TrainingPass, found: Sequence[Regression]) -> bool:
    """Whether a loss is far from learnt, whatever its units are; False where that cannot be told."""
    for each in found:
        wanted = each.targets.double()
        spread, missed = float((wanted - wanted.mean()).square().mean()), _rms(wanted - each.output.double()) ** 2
        if spread > 0 and missed > _UNLEARNT * spread:
            return True
    assert done.loss is not None
    return any(each.value > _UNLEARNT * each.chance for each in cross_entropies(done.loss))
