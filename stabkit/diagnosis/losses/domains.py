"""Losses whose arguments lie outside of what they are made for: logarithms, probabilities, signs, counts.

`DOMAINS` is the one table of the losses of `torch.nn.functional` that expect something of their arguments. Torch checks
few of them, and a loss of something else runs, may fall below zero, and trains towards something else. Each rule reads
the values of a call, and says how the call is meant; where that is certain, the call is made so, and the loss that was
meant is told beside the one that is trained.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from stabkit.diagnosis.finding import LOSS, Finding, of_last_step
from stabkit.diagnosis.remedies.short_training import falls, short_training, trained_on_either
from stabkit.diagnosis.training_run import TrainingRun
from stabkit.tracing import Flow
from stabkit.tracing.recording.function_calls import FunctionCalls
from stabkit.tracing.recording.randomness import seeded, unchanged_randomness
from stabkit.tracing.recording.training_pass import calling_line

NORMALISED = 0.05  # by how much probabilities may miss a sum of 1: float16 loses that in a thousand classes
_EXACTLY = 1e-3  # the same where values alone, and no operation, say that they are probabilities
_FEW = 0.05  # share of entries or rows that may be odd: padding, ignored or masked samples
_REFERENCE = "PyTorch documentation, torch.nn.functional, loss functions"

Given = Mapping[str, Any]


@dataclass(frozen=True)
class Misuse:
    """An argument outside of what a loss expects of it.

    Attributes:
        evidence: what is expected, and what was given.
        remedy: what to give.
        severity: a warning where the loss trains towards something else.
        meant: the arguments that were meant, where that is certain.
        alone: whether it is a fault only where nothing else in the loss trains the model.
        breaks: whether the loss is not finite by it.
    """

    evidence: str
    remedy: str
    severity: str = "warning"
    meant: Given = field(default_factory=dict, compare=False)
    alone: bool = False
    breaks: bool = False


def _sums(values: Tensor, dim: int) -> Tensor:
    return values.detach().double().sum(dim)


def _is_one(sums: Tensor, within: float) -> float:
    """Share of sums that are 1."""
    return float(((sums - 1).abs() <= within).double().mean())


def _axes(values: Tensor, within: float = NORMALISED) -> list[int]:
    """Axes along which values sum to 1, but for a few rows: the last and the second first, where classes are."""
    order = dict.fromkeys(d % values.dim() for d in (-1, min(1, values.dim() - 1), *range(values.dim())))
    return [d for d in order if values.shape[d] > 1 and _is_one(_sums(values, d), within) > 1 - _FEW]


def are_probabilities(values: Tensor, within: float = NORMALISED) -> bool:
    """Whether values are none below zero and sum to 1 along an axis.

    Example:
        >>> are_probabilities(torch.tensor([[0.2, 0.8]])), are_probabilities(torch.tensor([[-0.2, 1.2]]))
        (True, False)
    """
    return values.dim() > 0 and bool((values >= 0).all()) and bool(_axes(values, within))


def _are_logarithms(values: Tensor) -> bool:
    """Whether values are logarithms of probabilities."""
    return values.dim() > 0 and bool((values <= 1e-4).all()) and bool(_axes(values.detach().double().exp()))


def _span(values: Tensor) -> str:
    return f"{float(values.detach().min()):.3g} to {float(values.detach().max()):.3g}"


def _kl_div(given: Given) -> Misuse | None:
    logs, target, of_logs = given["input"], given["target"], bool(given.get("log_target", False))
    if not of_logs and bool((target < 0).any()):
        what = "logarithms of probabilities" if _are_logarithms(target) else f"numbers from {_span(target)}"
        if are_probabilities(logs) and _are_logarithms(target):
            return Misuse(
                "kl_div expects the logarithms of what is trained first and the probabilities of the target second, "
                "and is given them the other way round",
                "kl_div(log-probabilities of the output, probabilities of the target)",
                meant={"input": logs.clamp_min(torch.finfo(logs.dtype).tiny).log(), "target": target.exp()},
            )
        meant = {"log_target": True} if _are_logarithms(target) and _are_logarithms(logs) else {}
        remedy = "log_target=True, or give the target as probabilities"
        said = f"the target of kl_div is to be probabilities, and is {what}"
        return Misuse(said, remedy, meant=meant, breaks=True)  # it takes their logarithm
    if of_logs and are_probabilities(target):
        meant = {"log_target": False} if _are_logarithms(logs) else {}
        words = "with log_target=True the target of kl_div is to be log-probabilities, and is probabilities"
        return Misuse(words, "leave log_target=True away, or give log_softmax of the target", meant=meant)
    wanted = target.exp() if of_logs else target
    if are_probabilities(logs, _EXACTLY):
        return Misuse(
            "kl_div expects log-probabilities as its first argument, and is given probabilities, so that it is not "
            "bounded by zero and is least where all of them are on the most probable class",
            "give it log_softmax of the logits: LogSoftmax in place of the softmax",
            meant={"input": logs.clamp_min(torch.finfo(logs.dtype).tiny).log()},
        )
    axes = _axes(wanted) if wanted.dim() and wanted.shape == logs.shape else []
    sums = [logs.detach().double().logsumexp(dim).exp() for dim in axes]
    off = all(_is_one(each, NORMALISED) < 0.5 and float(each.median()) > 1 for each in sums)
    if not bool((logs > 0).any()) or not off or not bool((wanted >= 0).all()):
        return None
    about = f", whose exponentials sum to {float(sums[0].median()):.3g} and not to 1" if sums else ""
    remedy = "give it log_softmax of them"
    meant = {"input": logs.log_softmax(axes[0])} if axes else {}
    words = f"kl_div expects log-probabilities as its first argument, and is given numbers from {_span(logs)}{about}"
    return Misuse(words, remedy, "warning" if axes else "info", meant)


def _cross_entropy(given: Given) -> Misuse | None:
    logits, target = given["input"], given["target"]
    axis = 1 if logits.dim() > 1 else 0
    if logits.shape[axis] == 1:
        return Misuse(
            f"cross_entropy is given scores {tuple(logits.shape)} of a single class, whose softmax is 1 whatever they "
            "are",
            "binary_cross_entropy_with_logits for one score, or one score for each class",
            alone=True,
        )
    positive = bool((logits >= 0).all()) and bool((logits <= 1).all())
    if positive and _is_one(_sums(logits, axis), _EXACTLY) > 1 - _FEW:
        return Misuse(
            "cross_entropy expects logits and is given probabilities: a softmax of numbers within 0 to 1 is never "
            "sure, and the loss cannot fall far",
            "give it what the probabilities were made of: cross_entropy takes the softmax itself",
        )
    if not target.is_floating_point() or target.shape != logits.shape:
        return None
    if bool((target < 0).any()):
        sure = _are_logarithms(target)
        meant = target.exp() if sure else target.softmax(axis)
        return Misuse(
            f"a target of cross_entropy that is no class is to be probabilities, and goes from {_span(target)}: with "
            "weights below zero the loss has no least value",
            f"give it {'the exponentials of these log-probabilities' if sure else 'their softmax'}",
            meant={"target": meant},
        )
    sums = _sums(target, axis)
    if _is_one(sums, NORMALISED) >= 0.5 or float(((sums - 1).abs() > NORMALISED).double().mean()) <= _FEW:
        return None
    several = bool(((target == 0) | (target == 1)).all()) and float((sums > 1).double().mean()) > 0.5
    square = logits.dim() == 2 and logits.shape[0] == logits.shape[1]  # which samples of a batch belong together
    words = f"the targets of cross_entropy sum to {float(sums.median()):.3g} and not to 1 along axis {axis}"
    if several and not square:
        floor = float((sums * sums.clamp_min(1).log()).mean())
        return Misuse(
            f"{words}: they name several classes at once, of which a softmax can give each one over their number at "
            f"most, so that the loss cannot fall below {floor:.3g}",
            "binary_cross_entropy_with_logits, which asks after each class by itself; or divide the targets by their "
            "sum",
        )
    return Misuse(f"{words}, which weights the samples by it", "divide them by their sum", "info")


def _binary_targets(name: str) -> Callable[[Given], Misuse | None]:
    """Targets that must lie within 0 to 1, or the loss falls without end."""

    def rule(given: Given) -> Misuse | None:
        target, weight = given["target"], given.get("weight")
        if isinstance(weight, Tensor):
            target = target[weight.expand_as(target) != 0]
        ignored = given.get("reduction") == "none"  # entries may be left out afterwards
        if ignored or not target.numel() or (bool((target >= 0).all()) and bool((target <= 1).all())):
            return None
        signs = bool((target.abs() == 1).all())
        remedy = "map -1 to 0: (target + 1) / 2" if signs else "bring them into 0 to 1"
        words = (
            f"the targets of {name} are to be probabilities, within 0 to 1, and go from {_span(target)}: such a loss "
            "has no least value, and falls as long as the logits grow"
        )
        return Misuse(words, remedy, meant={"target": (given["target"] + 1) / 2} if signs else {})

    return rule


def _signs(name: str) -> Callable[[Given], Misuse | None]:
    """Targets that must be 1 or -1, and are 0 and 1: those of 0 are not held against anything, or are a constant."""

    def rule(given: Given) -> Misuse | None:
        target = given["target"]
        zeros = float((target == 0).double().mean()) if target.numel() else 0.0
        if zeros <= _FEW or bool((target < 0).any()) or not bool(((target == 0) | (target == 1)).all()):
            return None
        words = f"{name} expects targets of 1 and -1, and {zeros:.0%} of those that it is given are 0, the others 1"
        return Misuse(words, "map 0 to -1: 2 * target - 1", meant={"target": 2 * target - 1})

    return rule


def _poisson(given: Given) -> Misuse | None:
    target = given["target"]
    if not bool((target < 0).any()):
        return None
    words = f"poisson_nll_loss expects counts as targets, and they go from {_span(target)}: it has no least value"
    return Misuse(words, "give it counts, which are zero or more, or use gaussian_nll_loss or mse_loss")


def _ctc(given: Given) -> Misuse | None:
    logs = given["log_probs"]
    sums = logs.detach().double().logsumexp(-1).exp()
    if not bool(sums.isfinite().all()) or _is_one(sums, NORMALISED) >= 0.5:
        return None
    what = "probabilities" if are_probabilities(logs, _EXACTLY) else f"numbers from {_span(logs)}"
    words = (
        f"ctc_loss expects log-probabilities along its last axis, and is given {what}, whose exponentials sum to "
        f"{float(sums.median()):.3g} and not to 1"
    )
    remedy = "give it log_softmax(dim=-1) of the logits"
    return Misuse(words, remedy, meant={} if what == "probabilities" else {"log_probs": logs.log_softmax(-1)})


@dataclass(frozen=True)
class Domain:
    """A loss that expects something of its arguments.

    Attributes:
        arguments: their names, in order.
        rule: what is wrong with a call of it.
        optional: names of further arguments that the rule reads where they are given.
    """

    arguments: tuple[str, ...]
    rule: Callable[[Given], Misuse | None]
    optional: tuple[str, ...] = ()


_PAIR = ("input", "target")
#: losses of `torch.nn.functional` whose arguments have a domain that torch does not check; nll_loss is read off graphs
DOMAINS: dict[str, Domain] = {
    "kl_div": Domain(_PAIR, _kl_div),
    "cross_entropy": Domain(_PAIR, _cross_entropy),
    "binary_cross_entropy_with_logits": Domain(_PAIR, _binary_targets("binary_cross_entropy_with_logits"), ("weight",)),
    "multilabel_soft_margin_loss": Domain(_PAIR, _binary_targets("multilabel_soft_margin_loss")),
    "soft_margin_loss": Domain(_PAIR, _signs("soft_margin_loss")),
    "hinge_embedding_loss": Domain(_PAIR, _signs("hinge_embedding_loss")),
    "cosine_embedding_loss": Domain(("input1", "input2", "target"), _signs("cosine_embedding_loss")),
    "margin_ranking_loss": Domain(("input1", "input2", "target"), _signs("margin_ranking_loss")),
    "poisson_nll_loss": Domain(_PAIR, _poisson),
    "ctc_loss": Domain(("log_probs", "targets"), _ctc),
}


class _Calls(FunctionCalls):
    """Sees the calls of these losses, and makes those that are wrong as they are meant, where that is known.

    Attributes:
        found: name, line, and what is wrong, of each that is.
    """

    def __init__(self, mend: bool = False, only: int | None = None) -> None:
        super().__init__()
        self.found: list[tuple[str, Misuse]] = []
        self._mend, self._only = mend, only

    def _called(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        domain = DOMAINS.get(getattr(func, "__name__", ""))
        if domain is None:
            return func(*args, **kwargs)
        given = dict(zip((*domain.arguments, *domain.optional), args, strict=False)) | kwargs
        wrong = domain.rule(given) if _readable(given, domain) else None
        if wrong is None:
            return func(*args, **kwargs)
        self.found.append((calling_line(), wrong))
        if self._mend and wrong.meant and self._only in (None, len(self.found) - 1):
            kwargs = {k: v for k, v in kwargs.items() if k not in wrong.meant} | dict(wrong.meant)
            names = [name for name, _ in zip(domain.arguments, args, strict=False)]
            placed = [kwargs.pop(name) if name in wrong.meant else arg for name, arg in zip(names, args, strict=False)]
            args = (*placed, *args[len(names) :])
        return func(*args, **kwargs)


def _readable(given: Given, domain: Domain) -> bool:
    taken = [t for name in domain.arguments if isinstance(t := given.get(name), Tensor) and t.numel() > 0]
    floats = [t.detach() for t in taken if t.is_floating_point()]
    return len(taken) == len(domain.arguments) and all(
        bool(t.isfinite().all()) or bool((t == -math.inf).any()) for t in floats
    )


def misuses(loss: Any, output: Any, seed: int) -> tuple[list[tuple[str, Misuse]], float]:
    """What is wrong with the arguments of the losses that a loss calls, by line; and what the loss is as meant."""
    watch = _Calls()
    value = _value(loss, output, seed, watch)
    if not watch.found:
        return [], value
    return watch.found, _value(loss, output, seed, _Calls(mend=True))


def breaking(loss: Any, output: Any, seed: int, line: str) -> Misuse | None:
    """The misuse that a loss is not finite by: as meant, that call makes it finite; None where it is no misuse.

    Args:
        loss: a callable on the output that returns a scalar.
        output: of the model.
        seed: of the numbers that the loss draws.
        line: where it begins not to be finite, which decides where no single call makes it finite.
    """
    found, meant = misuses(loss, output, seed)
    for index, (_, wrong) in enumerate(found):
        if wrong.meant and math.isfinite(_value(loss, output, seed, _Calls(mend=True, only=index))):
            return wrong
    mended = math.isfinite(meant)
    return next((w for at, w in found if at == line and (w.breaks or (mended and w.meant))), None)


def _value(loss: Any, output: Any, seed: int, mode: FunctionCalls) -> float:
    with unchanged_randomness(), torch.enable_grad():
        seeded(seed)
        with mode:
            scalar = loss(output)
    return float(scalar.detach())


def loss_domain_findings(run: TrainingRun) -> list[Finding]:
    """A finding where a loss is called with what it is not made for."""
    assert run.done.loss is not None
    found, meant = misuses(run.loss, run.done.output, run.call.seed)
    if not found:
        return []
    line, wrong = max(found, key=lambda each: each[1].severity == "warning")
    value = float(run.done.loss.detach())
    trained = short_training(run.flow, run.loss) if wrong.alone else None
    if trained is not None and falls(trained):
        wrong = replace(wrong, severity="info", remedy="none is needed for the rest of the loss, which is learnt")
    evidence = wrong.evidence + (f" ({line})" if line else "")
    if wrong.meant:
        evidence += (
            f"; the loss is {value:.3g} as it is, and {meant:.3g} as it is meant{_trained(run.flow, run.loss, meant)}"
        )
    elif value < 0:
        evidence += f"; the loss is {value:.3g}"
    return [
        of_last_step(
            run.flow, "loss", wrong.severity, LOSS, evidence, wrong.remedy, _REFERENCE, {"loss": value, "meant": meant}
        )
    ]


def _trained(flow: Flow, loss: Any, meant: float) -> str:
    """What the loss that is meant comes to, by training on the loss as it is and on itself.

    Of the former the run counts that moves most: towards what else it leads is the question, not at which rate.
    """

    def as_meant(out: Any) -> Tensor:
        with _Calls(mend=True):
            scalar: Tensor = loss(out)
        return scalar

    return trained_on_either(flow, loss, as_meant, lambda ends: max(ends, key=lambda end: abs(end - meant)))
