"""Parameters that get a gradient from a part of the loss alone, since the rest is cut off from them by mistake."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.distributions import Distribution

from stabkit.diagnosis.finding import Finding, serious
from stabkit.diagnosis.remedies.short_training import compared, short_training, worse
from stabkit.tracing import Flow
from stabkit.tracing.derivatives.lost_gradient import FIRST_ORDER, Cut, listed
from stabkit.tracing.derivatives.partial_cuts import NORMAL, partial_cuts
from stabkit.tracing.recording.forward_pass import ForwardPass
from stabkit.tracing.recording.function_calls import FunctionCalls
from stabkit.tracing.recording.training_pass import TrainingPass

_KINGMA = "Kingma and Welling, Auto-encoding variational Bayes, 2014, section 2.4"
_RAISSI = "Raissi, Perdikaris and Karniadakis, Physics-informed neural networks, 2019"


def cut_by_a_draw(findings: Sequence[Finding]) -> bool:
    """Whether a draw that passes back zeros is among some findings: states behind it are then cut off, and no layer."""
    return any(f.kind == "no_gradient" and serious(f) and f"stops at {NORMAL}" in f.evidence for f in findings)


def hidden_cut_findings(subject: Flow | ForwardPass, loss: Any, call: ForwardPass, done: TrainingPass) -> list[Finding]:
    """One finding for every place.

    Args:
        subject: the traced pass, or the call where nothing leads from the input to the output.
        loss: a callable on the output that returns a scalar; without one nobody knows what is to be trained by what.
        call: the pass as training makes it.
        done: its loss, on the graph.
    """
    if not callable(loss):
        return []
    return [_finding(cut, subject, loss, call, done) for cut in partial_cuts(call, loss, done)]


def _finding(cut: Cut, subject: Flow | ForwardPass, loss: Any, call: ForwardPass, done: TrainingPass) -> Finding:
    derivative = cut.operation == FIRST_ORDER
    plain = short_training(subject, loss)
    treated = short_training(subject, loss, within=_FirstOrderKept if derivative else drawn_on_the_graph)
    given = [done.gradients.get(path) for path in cut.parameters]
    none = bool(done.gradients) and not any(g is not None and bool((g != 0).any()) for g in given)
    evidence = (
        f"the gradient stops at {cut.place}, whose result is in the loss: {len(cut.parameters)} of "
        f"{len(done.parameters)} parameters that are to be trained ({listed(cut.parameters)}) "
        f"{'get none' if none else 'learn from the rest of the loss alone'}"
    )
    how = "with create_graph=True" if derivative else "with a gradient through the draw"
    evidence += compared(plain, treated, how)
    remedy = "draw with rsample(), which passes the gradient on to what it is drawn with"
    if derivative:
        remedy = "take the derivative with create_graph=True, so that it is trained like any other output"
    elif cut.operation == NORMAL:
        remedy = "draw with mean + std * torch.randn_like(std); the derivative of torch.normal is set to zero"
    harm = call.module.training and not worse(treated, plain)
    return Finding(
        kind="no_gradient",
        severity="warning" if harm else "info",
        steps=(len(subject.steps) - 1,) if isinstance(subject, Flow) else (),
        module_path=cut.behind or cut.path,
        confidence=1.0,
        evidence=evidence,
        remedy=remedy,
        reference=_RAISSI if derivative else _KINGMA,
        numbers={"parameters": float(len(cut.parameters))},
    )


class _FirstOrderKept(FunctionCalls):
    """Every derivative is taken with a graph of its own."""

    def _called(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func is torch.autograd.grad and len(args) <= 4:
            return func(*args, **{**kwargs, "create_graph": True, "retain_graph": True})
        return func(*args, **kwargs)


class _NormalOnTheGraph(FunctionCalls):
    """``torch.normal`` of tensors as a mean and a multiple of a standard draw."""

    def _called(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func is torch.normal and not kwargs and any(isinstance(a, torch.Tensor) and a.requires_grad for a in args):
            mean, std = (*args, 1.0)[:2]
            like = torch.as_tensor(mean) + 0 * torch.as_tensor(std)
            return mean + std * torch.randn_like(like)
        return func(*args, **kwargs)


@contextlib.contextmanager
def drawn_on_the_graph() -> Iterator[None]:
    """Distributions that have ``rsample`` draw by it, and ``torch.normal`` draws as they do."""

    def classes(parent: type[Distribution]) -> Iterator[type[Distribution]]:
        yield parent
        for child in parent.__subclasses__():
            yield from classes(child)

    own = {each: each.__dict__["sample"] for each in classes(Distribution) if "sample" in each.__dict__}

    def drawn(original: Any) -> Any:
        def sample(self: Distribution, sample_shape: Any = torch.Size()) -> Any:  # noqa: B008
            return self.rsample(sample_shape) if self.has_rsample else original(self, sample_shape)

        return sample

    try:
        for each, original in own.items():
            each.sample = drawn(original)  # type: ignore[method-assign]
        with _NormalOnTheGraph():
            yield
    finally:
        for each, original in own.items():
            each.sample = original  # type: ignore[method-assign]
