"""Attention whose softmax is taken along another axis than the one that its weights are summed over.

Weights of keys that a softmax over queries, or over heads, has made do not sum to 1 for a query: what a position gets
is no mean of values, and how much it gets is decided by the others. Only scores of queries against as many keys are
looked at; assignments to clusters, slots or capsules compete for what they take, and weights that are divided
by their sum afterwards are means again.

Some models let queries compete on purpose, and learn. It is a warning where it does harm that is measured: weights for
keys that a mask hides, weights of earlier queries that change with later ones behind a causal mask, or a training along
the other axis that learns clearly more of the same batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stabkit.diagnosis.finding import Finding, of_module, serious
from stabkit.diagnosis.remedies.short_training import clearly_better, compared, short_training
from stabkit.diagnosis.remedies.usual_training import ADAM, left_only_treated
from stabkit.diagnosis.training_run import TrainingRun
from stabkit.tracing.recording.evaluation import Evaluation, evaluated
from stabkit.tracing.recording.function_calls import FunctionCalls, name_of
from stabkit.tracing.recording.training_pass import calling_line

_PRODUCTS = frozenset({"matmul", "rmatmul", "bmm", "mm", "einsum", "baddbmm"})
_MOVES = frozenset(
    {*("contiguous", "reshape", "view", "clone", "to", "type_as", "float", "half", "bfloat16", "dropout", "detach")}
)
_SUMS = frozenset({"sum", "norm", "normalize", "cumsum"})
_ONE = 1e-3  # by how much weights may miss a sum of 1: fresh scores are small, and wrong sums then within .03 of it
_UNITS = 8  # the same in units of rounding, where that is coarser
_MOST = 0.5  # share of the queries whose weights do not sum to 1; a few rows may be padded
_FEWEST = 3  # keys
_HIDDEN = 1e3  # below the largest score of a query: what masks add is far more, and biases of distance less
_SEEN = 0.1  # of the weight that an even share is: what a hidden key must get to count as seen
_STEPS = 60  # of Adam: layers that must choose a key leave .02 of a loss by then, .99 over queries at any time


@dataclass(frozen=True)
class _Softmax:
    """One softmax of scores.

    Attributes:
        scores: what it was given.
        out: what it gave.
        axis: along which it was taken, from the last: -1 for that.
        line: file and line.
        path: the module that it ran in.
    """

    scores: Tensor
    out: Tensor
    axis: int
    line: str
    path: str


@dataclass(frozen=True)
class _Wrong:
    """One that is summed over another axis; ``low`` and ``high`` are what the weights of a query sum to."""

    softmax: _Softmax
    summed: int
    low: float
    high: float

    @property
    def harm(self) -> str:
        """What it does to a mask, in words; empty where there is none, or the weights keep to it."""
        scores, out = (t.detach().double() for t in (self.softmax.scores, self.softmax.out))
        hidden = scores < scores.amax(self.summed, keepdim=True) - _HIDDEN
        if not bool(hidden.any()):
            return ""
        seen = float(out[hidden].max())
        if seen > _SEEN / out.shape[self.softmax.axis]:
            return f"keys that a mask hides get weights of up to {seen:.2g}"
        queries = -3 - self.summed
        later = torch.ones(out.shape[-2:], dtype=torch.bool, device=out.device).triu(1)
        later = later if queries == -2 else later.T
        if self.softmax.axis != queries or not bool(hidden[..., later].all()) or bool(hidden[..., ~later].all()):
            return ""
        others = scores.clone()
        others.select(queries, -1).add_(1.0)
        change = float((others.softmax(queries) - out).abs().narrow(queries, 0, out.shape[queries] - 1).max())
        return (
            f"weights of earlier queries change by up to {change:.2g} with a score of the last, which they are not "
            "to see"
            if change > _ONE * _ONE
            else ""
        )


class _Watch(FunctionCalls):
    """Sees softmaxes of scores and what they are factors of; those in some places may be taken along other axes."""

    def __init__(self, running: Evaluation | None = None, axes: dict[tuple[int, int], int] | None = None) -> None:
        super().__init__()
        self.wrong: list[_Wrong] = []
        self._running, self._axes = running, axes or {}
        self._scores: dict[int, Tensor] = {}
        self._weights: dict[int, tuple[Tensor, _Softmax]] = {}
        self._divided: set[int] = set()

    def _called(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = name_of(func)
        given = [a for a in _flat(args) if isinstance(a, Tensor)]
        if name == "softmax" and given and id(given[0]) in self._scores:
            return self._softmax(func, args, kwargs, given[0])
        out = func(*args, **kwargs)
        if name in _SUMS and given and (held := self._weights.get(id(given[0]))):
            self._divided.add(id(held[1].out))
        if not isinstance(out, Tensor):
            return out
        if name in _PRODUCTS:
            self._product(name, args, given, out)
        elif any(id(a) in self._scores and a.numel() == out.numel() for a in given):
            self._scores[id(out)] = out
        held = next((self._weights[id(a)] for a in given if id(a) in self._weights), None)
        if held is not None and (name in _MOVES and out.shape == held[0].shape):
            self._weights[id(out)] = out, held[1]
        return out

    def found(self) -> list[_Wrong]:
        """Those whose weights are not divided by their sum either."""
        return [each for each in self.wrong if id(each.softmax.out) not in self._divided]

    def _softmax(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], scores: Tensor) -> Any:
        dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
        if not isinstance(dim, int):
            dim = 0 if scores.dim() in (0, 1, 3) else 1  # what torch takes where none is given
        axis = dim if dim < 0 else dim - scores.dim()
        other = self._axes.get((scores.dim(), axis))
        out = func(*args, **kwargs) if other is None else scores.softmax(other)
        if isinstance(out, Tensor):
            path = "" if self._running is None else self._running.recording.running
            self._weights[id(out)] = out, _Softmax(scores, out, axis, calling_line(), path)
        return out

    def _product(self, name: str, args: tuple[Any, ...], given: Sequence[Tensor], out: Tensor) -> None:
        if len(given) == 2 and not any(isinstance(a, nn.Parameter) for a in given):
            self._scores[id(out)] = out
        for place, each in enumerate(given):
            held = self._weights.get(id(each))
            if held is None or held[0].shape != each.shape:
                continue
            axis = _summed(name, args, place, each)
            if axis is None or each.dim() < 2 or each.shape[-1] != each.shape[-2] or each.shape[-1] < _FEWEST:
                continue
            sums = each.detach().double().sum(axis)
            off = (sums - 1).abs() > max(_ONE, _UNITS * torch.finfo(each.dtype).eps)
            if axis != held[1].axis and axis in (-1, -2) and float(off.double().mean()) > _MOST:
                self.wrong.append(_Wrong(held[1], axis, float(sums.min()), float(sums.max())))


def _flat(args: Sequence[Any]) -> list[Any]:
    return [each for a in args for each in (a if isinstance(a, list | tuple) else (a,))]


def _summed(name: str, args: tuple[Any, ...], place: int, operand: Tensor) -> int | None:
    """The axis of an operand that a product sums over, from the last; None where that cannot be told."""
    if name != "einsum":
        left = place == (1 if name == "rmatmul" else 0)
        return (-1 if left else -2) if name != "baddbmm" else None
    if not isinstance(args[0], str) or "." in args[0]:
        return None
    terms, _, result = args[0].replace(" ", "").partition("->")
    letters = terms.split(",")[place]
    gone = [index for index, letter in enumerate(letters) if letter not in result]
    return gone[0] - operand.dim() if result and len(gone) == 1 else None


def softmax_axis_findings(run: TrainingRun, others: Sequence[Finding]) -> list[Finding]:
    """A finding where the weights of attention are summed over keys and were made to sum to 1 over something else.

    Where that is samples, a model that mixes them is told already. The softmax is taken along the other axis on trial.
    """
    if any(finding.kind == "mixed_samples" and serious(finding) for finding in others):
        return []
    watches: list[_Watch] = []

    def watching(running: Evaluation) -> _Watch:
        watches.append(_Watch(running))
        return watches[-1]

    evaluated(run.call, mode=watching)
    found = watches[0].found() if watches else []
    if not found:
        return []
    axes = {(each.softmax.out.dim(), each.softmax.axis): each.summed for each in found}
    first = next((each for each in found if each.harm), found[0])
    plain = short_training(run.flow, run.loss)
    treated = short_training(run.flow, run.loss, within=lambda: _Watch(axes=axes))
    how = f"with the softmax along axis {first.summed}"
    better = treated is not None and plain is not None and clearly_better(treated, plain)
    harm = first.harm or ("" if better else _learns_only(run, axes, how))
    harmful = bool(harm) or better
    shape, axis = tuple(first.softmax.out.shape), first.softmax.axis
    over = "queries" if axis in (-1, -2) else "heads"
    line = f" ({first.softmax.line})" if first.softmax.line else ""
    more = f" (and in {len(found) - 1} more)" if len(found) > 1 else ""
    evidence = (
        f"the softmax of the scores{line} in {first.softmax.path or 'the model'}{more} is taken along axis {axis} of "
        f"{shape}, over {over}, and its weights are then summed over axis {first.summed}, the keys: those of a query "
        f"sum to {first.low:.3g} to {first.high:.3g} and not to 1{harm and f'; {harm}'}"
        f"{compared(plain, treated, how)}"
    )
    return [
        of_module(
            run.flow,
            "axes",
            "warning" if harmful else "info",
            first.softmax.path,
            evidence=evidence,
            remedy=f"dim={first.summed} in that softmax: the weights of a query are to sum to 1 over the keys"
            if harmful
            else f"none is needed if it is meant: it trains no better along the keys (dim={first.summed})",
            reference="Vaswani et al., Attention is all you need, 2017, section 3.2.1",
            numbers={"softmax": float(len(found)), "low": first.low, "high": first.high},
        )
    ]


def _learns_only(run: TrainingRun, axes: dict[tuple[int, int], int], how: str) -> str:
    """What Adam leaves of the loss, where it learns along the keys alone; or nothing."""
    left = left_only_treated(run.call, run.loss, (), _STEPS, within=lambda: _Watch(axes=axes))
    if left is None:
        return ""
    return f"{_STEPS} steps of {ADAM} leave {left[0]:.0%} of the loss as it is, {left[1]:.2g} {how}"
