"""Norms behind the additions of a deep stack, and a short training that shows what they cost.

Gradients of such a stack may keep their size at the start, and yet it does not train without a warm-up: every update
moves the output by more, the more branches there are. That is seen in a few steps of training and in nothing else, so
it is looked for where there is a loss, and the stack is deep.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import nn

from stabkit.diagnosis.finding import Finding
from stabkit.diagnosis.measurement import Measurement, StepMeasurement
from stabkit.diagnosis.remedies import computed as remedies
from stabkit.diagnosis.remedies.alternatives import deep_norm
from stabkit.diagnosis.remedies.computed import Remedy
from stabkit.diagnosis.remedies.short_training import STEPS, ShortTraining, short_training
from stabkit.diagnosis.remedies.usual_training import adam, left_after
from stabkit.tracing import Flow

#: additions from which post-norm networks are known to need a warm-up (12 layers: Liu et al., 2020, figure 1); on
#: shallower ones no training is spent
_DEEP = 24
_STUCK = 0.75  # share of its first loss that a stack keeps which does not train, and one that does falls below
#: rates of Adam at which networks of this size train when their norms stand in the branches, and those with the norms
#: behind do not without a warm-up: stacks of 18 and 24 layers keep over .9 of their loss at both, one of 12 does not
_RATES = (1e-2, 3e-3)
_HELD = 0.9
_BELOW = 0.85  # of what the untreated loss falls to: .66 to .84 where norm_first trains to .003 and post-norm does not
_REFERENCE = "Liu et al., Understanding the difficulty of training transformers, 2020; Wang et al., DeepNet, 2022"


def post_norm_findings(flow: Flow, measurement: Measurement, loss: Any) -> list[Finding]:
    """A deep post-norm stack that does not train, where one with another place or weight of its norms does."""
    steps = [step for step in measurement.steps if step.merges and step.renormalised and step.kind == "step"]
    additions = sum(len(step.merges) for step in steps)
    if not callable(loss) or additions < _DEEP:
        return []
    untreated = short_training(flow, loss)
    if untreated is None or not untreated.last > _STUCK * untreated.first:
        return []
    choices = _remedies(flow, steps)
    for remedy in choices:
        treated = short_training(flow, loss, remedy.actions)
        if treated is not None and _trains(treated, untreated):
            return [_finding(steps, additions, untreated, treated, remedy, "of plain SGD")]
    held = [_by_adam(flow, loss, rate, untreated) for rate in _RATES]
    if not all(training.last > _HELD * training.first for training in held):
        return []
    for remedy in choices:
        treated = short_training(flow, loss, remedy.actions)
        if treated is None or not math.isfinite(treated.first):
            continue
        tried = [_by_adam(flow, loss, rate, treated, remedy) for rate in _RATES]
        if all(new.last < _BELOW * old.last for new, old in zip(tried, held, strict=True)):
            return [_finding(steps, additions, held[-1], tried[-1], remedy, f"of Adam at a rate of {_RATES[-1]:g}")]
    return []


def _by_adam(flow: Flow, loss: Any, rate: float, plain: ShortTraining, remedy: Remedy | None = None) -> ShortTraining:
    """Losses of as many steps of Adam, from where a training with plain SGD began."""
    left = left_after(flow.forward_pass, loss, [adam(rate)], remedy.actions if remedy is not None else ())
    return ShortTraining(plain.first, math.inf if left is None else left * plain.first)


def _trains(treated: ShortTraining, untreated: ShortTraining) -> bool:
    return treated.last < min(_STUCK * treated.first, _STUCK * untreated.first, _BELOW * untreated.last)


def _remedies(flow: Flow, steps: Sequence[StepMeasurement]) -> list[Remedy]:
    """The norms moved into the branches, where the blocks have that option; the skips weighed by DeepNorm's alpha."""
    modules = dict(flow.model.named_modules())
    blocks = [step.module_path for step in steps if _is_switched(modules.get(step.module_path))]
    found = []
    if len(blocks) == len(steps):
        text = f"move the norms into the branches, x + f(LN(x)): norm_first=True in these {len(blocks)} blocks"
        found.append(Remedy(text, tuple(remedies.set_option(path, "norm_first", True) for path in blocks)))
    weighed = deep_norm(steps)
    return [*found, *([weighed] if weighed is not None else [])]


def _is_switched(module: nn.Module | None) -> bool:
    return getattr(module, "norm_first", None) is False


def _finding(
    steps: Sequence[StepMeasurement],
    additions: int,
    untreated: ShortTraining,
    treated: ShortTraining,
    remedy: Remedy,
    optimizer: str,
) -> Finding:
    return Finding(
        kind="post_norm",
        severity="warning",
        steps=tuple(step.index for step in steps),
        module_path=steps[0].module_path,
        confidence=1.0,
        evidence=f"a norm stands behind each of {additions} additions, LN(x + f(x)), and the stack does not train: "
        f"{STEPS} steps {optimizer} take the loss {untreated} as it is; tried on a copy: {treated} treated",
        remedy=f"{remedy.text}; or warm the learning rate up over the first few hundred steps",
        reference=_REFERENCE,
        numbers={"additions": float(additions), "untreated": untreated.last, "treated": treated.last},
        actions=remedy.actions,
    )
