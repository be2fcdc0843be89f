"""Dropout of so much that little is learnt: of nearly all hidden units, or of half of what a model is given.

It is no fault by itself: on a copy less is dropped, and a short training, read without dropout, says what that gains
for the samples that are trained on, and that it costs those that are held out nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stabkit.diagnosis.finding import Action, Finding, of_module, serious
from stabkit.diagnosis.losses.regressions import regressions
from stabkit.diagnosis.remedies import computed as remedies
from stabkit.diagnosis.remedies.applying import is_small
from stabkit.diagnosis.remedies.held_out import Dropping, learnt
from stabkit.diagnosis.remedies.usual_training import ADAM
from stabkit.diagnosis.training_run import TrainingRun
from stabkit.errors import StabkitError
from stabkit.tracing import Flow
from stabkit.tracing.derivatives.lost_gradient import listed
from stabkit.tracing.graph.values import operation
from stabkit.tracing.recording.forward_pass import ForwardPass
from stabkit.tracing.recording.training_pass import Observer, calling_line, nodes_above, training_pass

_HIDDEN = 0.75  # of hidden units: half of them is the usual share, and most that is recommended
_GIVEN = 0.4  # of what a model is given: a fifth is the usual share
_LESS = (0.5, 0.2)  # the usual shares, which are tried in turn
_STEPS = 100  # of every trial, and a fifth of that for large models
_LEARNT = 0.7  # of the loss of its samples: a model that learns as much by heart is not held back
_FALL = 0.2  # of that loss: what dropping less must bring
_TIMES = 1.5  # and how many times as much must be learnt with it
_COST = 0.05  # of the loss of the samples held out
_PRODUCTS = frozenset({"Addmm", "Mm", "Bmm", "Baddbmm", "Convolution"})
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
_REFERENCE = "Srivastava et al., Dropout, 2014, appendix A.4: 0.2 of what is given, 0.5 of hidden units"


class _Shares(Dropping):
    """Notes what is dropped, and whether it is given or made by a layer."""

    def __init__(self) -> None:
        super().__init__(1.0)
        self.heavy: dict[str, float] = {}

    def _called(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        known = len(self.dropped)
        out = super()._called(func, args, kwargs)
        if len(self.dropped) > known:
            share, given = self.dropped[-1], args[0] if args else kwargs.get("input")
            if isinstance(given, Tensor) and share >= (_GIVEN if _is_given(given) else _HIDDEN):
                self.heavy.setdefault(calling_line(), share)
        return out


def _is_given(tensor: Tensor) -> bool:
    """Whether no layer has made it but an embedding."""
    return not any(operation(node) in _PRODUCTS for node in nodes_above(tensor)) if tensor.requires_grad else True


def heavy_dropout_findings(run: TrainingRun, others: Sequence[Finding]) -> list[Finding]:
    """A finding where much is dropped, and training is better where less is.

    Dropout of the predictions themselves is told as such.
    """
    if any("dropout" in finding.evidence and serious(finding) for finding in others):
        return []
    if not any(module.training for module in run.call.module.modules()):
        return []
    shares = _Shares()
    try:
        training_pass(run.call, run.loss, Observer(shares), differentiate=False)
    except (StabkitError, RuntimeError):
        return []
    if not shares.heavy or _is_denoised(run):
        return []
    steps = _STEPS if is_small(run.call.module) else _STEPS // 5
    plain = learnt(run.call, run.loss, steps)
    if plain is None or plain.by_heart > _LEARNT:
        return []
    most = max(shares.heavy.values())
    for less in [share for share in _LESS if share < most]:
        treated = learnt(run.call, run.loss, steps, within=lambda less=less: Dropping(less))  # type: ignore[misc]
        if treated is None or treated.other < plain.other - _COST:
            continue
        if treated.by_heart > max(plain.by_heart + _FALL, _TIMES * plain.by_heart):
            texts = (f"{max(each, 0):.0%}" for each in (plain.by_heart, treated.by_heart))
            return [_finding(run.flow, run.call, shares, less, (*texts,), steps)]
    return []


def _is_denoised(run: TrainingRun) -> bool:
    """Whether a model is asked for what it is given, of which much is dropped on purpose."""
    given = [t for _, t in run.call.given]
    targets = [found.targets for found in regressions(run.done)]
    return any(t.shape == target.shape and torch.equal(t.to(target), target) for t in given for target in targets)


def _finding(
    flow: Flow, call: ForwardPass, shares: _Shares, less: float, learnt_of: tuple[str, ...], steps: int
) -> Finding:
    limit = min(shares.heavy.values())
    modules = [(path, m) for path, m in call.module.named_modules() if isinstance(m, _DROPOUTS)]
    paths = tuple(path for path, module in modules if module.training and module.p >= limit)
    actions: tuple[Action, ...] = tuple(remedies.set_option(path, "p", less) for path in paths)
    lines = tuple(line for line in shares.heavy if line)
    where = listed(paths or lines) or "the model"
    most = max(shares.heavy.values())
    evidence = (
        f"dropout ({where}) sets {most:.0%} of what it is given to zero while training; tried on a copy: with no more "
        f"than {less:.0%}, up to {steps} steps of {ADAM} on half of the batch take {learnt_of[1]} of its loss away, "
        f"read without dropout, and {learnt_of[0]} as it is; the other half is predicted no worse"
    )
    return of_module(
        flow,
        "dropout",
        "warning",
        paths[0] if paths else "",
        evidence=evidence,
        remedy=f"drop less: p={less:g} at {where}; p is the share that is set to zero, not the one that is kept",
        reference=_REFERENCE,
        numbers={"share": most, "less": less},
        actions=actions,
    )
