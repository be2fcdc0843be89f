"""Losses of a generator that are flat where a discriminator is sure: log(1 - D) of what it makes.

log(1 - D) of a logit l is -softplus(l), whose slope is D: nothing, where the discriminator knows what is made. -log D
has the slope 1 - D there, with the same sign, and the same outputs are its least. It is put in its place on trial, and
the gradients of the parameters are taken by both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from stabkit.diagnosis.finding import LOSS, Finding, of_last_step, serious
from stabkit.diagnosis.losses.terms import through_another_net
from stabkit.diagnosis.remedies.short_training import STEPS, short_training
from stabkit.diagnosis.training_run import TrainingRun
from stabkit.errors import StabkitError
from stabkit.tracing.recording.function_calls import FunctionCalls, name_of
from stabkit.tracing.recording.training_pass import calling_line, training_pass

_SURE = 0.02  # what a discriminator gives on average, under which log(1 - D) has lost that share of its slope at least
_GAIN = 10.0  # times the gradient of the parameters that there must be with -log D
_CROSS_ENTROPIES = frozenset({"binary_cross_entropy", "binary_cross_entropy_with_logits"})
_BITS = 1e-6  # below which a share counts as none
_REFERENCE = "Goodfellow et al., Generative adversarial nets, 2014, section 3"


class _Turned(FunctionCalls):
    """Sees losses of a share that is to be none, with a minus before them, and puts -log D in their place.

    A loss that is minimised with a minus has a gradient below zero there; so each is tried, and kept where it is so.
    """

    def __init__(self, chosen: frozenset[int] | None = None) -> None:
        super().__init__()
        self.shares: list[tuple[Tensor, Tensor, str, str]] = []  # result, D, name and line
        self._chosen = chosen

    def _called(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        out = func(*args, **kwargs)
        given = args[0] if args else kwargs.get("input")
        if not isinstance(given, Tensor) or not isinstance(out, Tensor) or not out.requires_grad:
            return out
        read = _read(name_of(func), given, args, kwargs, out)
        if read is None:
            return out
        share, instead = read
        self.shares.append((out, share.detach(), name_of(func), calling_line()))
        wanted = self._chosen is not None and len(self.shares) - 1 in self._chosen
        return instead() if wanted else out


def _read(
    name: str, given: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor
) -> tuple[Tensor, Callable[[], Tensor]] | None:
    """D, and what takes the place of an expression that is log(1 - D) but for its sign; None for any other."""
    if name == "softplus" and len(args) + len(kwargs) == 1:
        return given.sigmoid(), lambda: -functional.softplus(-given)
    if name in ("logsigmoid", "log_sigmoid"):
        return (-given).sigmoid(), lambda: -functional.logsigmoid(-given)
    if name == "log" and bool((given.detach() > 0).all()) and bool((given.detach() <= 1 + _BITS).all()):
        return 1 - given, lambda: -(1 - given).clamp_min(_BITS).log()
    if name in _CROSS_ENTROPIES:
        target = args[1] if len(args) > 1 else kwargs.get("target")
        if isinstance(target, Tensor) and not bool(target.any()):
            logits, ones = name.endswith("logits"), torch.ones_like(target)
            loss = functional.binary_cross_entropy_with_logits if logits else functional.binary_cross_entropy
            rest = {k: v for k, v in kwargs.items() if k not in ("input", "target")}
            return given.sigmoid() if logits else given, lambda: -loss(given, ones, *args[2:], **rest)
    return None


def saturating_findings(run: TrainingRun, others: Sequence[Finding]) -> list[Finding]:
    """A finding where a generator minimises log(1 - D) of a discriminator that is sure of what is made."""
    scalar = run.done.loss
    if scalar is None or any(finding.kind == "loss" and serious(finding) for finding in others):
        return []
    own = {id(p) for p in run.done.parameters.values()}
    if not through_another_net(scalar, own):
        return []
    watch = _Turned()
    try:
        with torch.enable_grad(), watch:
            again = run.loss(run.done.output)
        chosen = _minimised(watch, again)
        if not chosen:
            return []

        def instead(out: Any) -> Tensor:
            with _Turned(chosen):
                made: Tensor = run.loss(out)
            return made

        plain, other = (_size(training_pass(run.call, each).gradients) for each in (run.loss, instead))
    except (StabkitError, RuntimeError, ValueError):
        return []
    if not (math.isfinite(other) and other > _GAIN * plain):
        return []
    _, share, name, line = watch.shares[min(chosen)]
    sure = float(share.double().mean())
    evidence = (
        f"the loss is least where log(1 - D) is ({name}{f', {line}' if line else ''}), and the discriminator that it "
        f"is taken behind gives D = {sure:.2g} on average to what the model makes: the slope of log(1 - D) by its "
        f"logit is D, so that the gradient of the model is as good as gone while the discriminator is sure; tried on "
        f"a copy: with -log D in its place the gradient of the parameters is {other:.3g} and not {plain:.3g}"
    )
    evidence += _trained(run, instead, frozenset(chosen))
    return [
        of_last_step(
            run.flow,
            "loss",
            "warning",
            LOSS,
            evidence,
            "minimise -log D(G(z)) in place of log(1 - D(G(z))): binary_cross_entropy_with_logits(D(G(z)), ones), or "
            "softplus(-D(G(z))) of logits, which does not saturate; the discriminator keeps its loss",
            _REFERENCE,
            {"share": sure, "gradient": plain, "treated": other},
        )
    ]


def _minimised(watch: _Turned, scalar: Tensor) -> frozenset[int]:
    """Which of the expressions a loss falls with as D grows, where D is as good as none already."""
    found = list[int]()
    for index, (out, share, name, _) in enumerate(watch.shares):
        (slope,) = torch.autograd.grad(scalar, [out], retain_graph=True, allow_unused=True)
        if slope is None or not bool(slope.any()):
            continue
        # log(1 - D) and logsigmoid(-l) fall as D grows; softplus and the cross entropies rise
        turned = slope if name in ("log", "logsigmoid", "log_sigmoid") else -slope
        if bool((turned >= 0).all()) and float(share.double().mean()) < _SURE:
            found.append(index)
    return frozenset(found)


def _size(gradients: dict[str, Tensor | None]) -> float:
    held = [g.detach().to_dense().abs().double() for g in gradients.values() if g is not None]
    return math.sqrt(sum(float(g.square().sum()) for g in held))


def _trained(run: TrainingRun, instead: Callable[[Any], Tensor], chosen: frozenset[int]) -> str:
    """What D comes to by training on either loss, in words."""

    def given(out: Any) -> float:
        watch = _Turned()
        with torch.enable_grad(), watch:
            run.loss(out)
        return float(watch.shares[min(chosen)][1].double().mean())

    runs = [short_training(run.flow, each, watch=given) for each in (run.loss, instead)]
    if any(each is None or not each.watched for each in runs):
        return ""
    ends = [max(each.watched) for each in runs if each is not None]
    if not ends[1] > ends[0]:
        return ""
    return f"; {STEPS} steps of plain SGD take D to {ends[0]:.2g} by the loss as it is, and to {ends[1]:.2g} by -log D"
