"""A loss that broadcasts outputs against targets of another rank, so that every sample is held against all targets.

A column (N, 1) beside a row (N,) makes (N, N), without an error. Outer products that are meant are written as such, by
an index of None or an unsqueeze, or hold something against itself; those are left alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stabkit.diagnosis.finding import LOSS, Finding, of_last_step
from stabkit.diagnosis.remedies.short_training import trained_on_either
from stabkit.diagnosis.training_run import TrainingRun
from stabkit.tracing import Flow
from stabkit.tracing.recording.function_calls import FunctionCalls, name_of
from stabkit.tracing.recording.randomness import seeded, unchanged_randomness
from stabkit.tracing.recording.training_pass import calling_line

_ARITHMETIC = frozenset(
    {
        *("add", "sub", "rsub", "mul", "div", "truediv", "rtruediv", "rdiv", "pow", "rpow", "maximum", "minimum"),
        *("true_divide", "subtract", "multiply", "divide", "radd", "rmul", "squared_difference"),
        *("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "gaussian_nll_loss", "poisson_nll_loss"),
    }
)
#: how a dimension is written in on purpose
_OUTER = frozenset({"unsqueeze", "getitem", "reshape", "view", "expand", "broadcast_to", "repeat"})
_SAME = 1e-5  # relative change of a loss that is rounding of its sum in another order
_REFERENCE = "https://numpy.org/doc/stable/user/basics.broadcasting.html"

Change = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class _Mixing(FunctionCalls):
    """Sees operations that broadcast samples against samples, and may change what they are given.

    Attributes:
        found: name, shapes and line of each.
    """

    def __init__(self, change: Change | None = None) -> None:
        super().__init__()
        self.found: list[tuple[str, Tensor, Tensor, str]] = []
        self._change = change
        self._meant: list[Tensor] = []

    def _called(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = name_of(func)
        if name in _ARITHMETIC:
            args, kwargs = self._seen(name, args, kwargs)
        result = func(*args, **kwargs)
        if name in _OUTER and isinstance(result, Tensor) and result.dim() > args[0].dim():
            self._meant.append(result)
        return result

    def _seen(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        named = {key: kwargs[key] for key in ("input", "target", "other") if key in kwargs}
        given = [*args, *named.values()][:2]
        if len(given) < 2 or not all(isinstance(each, Tensor) for each in given):
            return args, kwargs
        one, other = given
        if not mixes(one, other) or any(each is meant for each in given for meant in self._meant):
            return args, kwargs
        self.found.append((name, one, other, calling_line()))
        if self._change is None:
            return args, kwargs
        changed = self._change(one, other)
        places = dict(zip([*range(len(args)), *named][:2], changed, strict=True))
        return tuple(places.get(i, a) for i, a in enumerate(args)), {k: places.get(k, v) for k, v in kwargs.items()}


def mixes(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold as many numbers in the same order, and are broadcast to more for a dimension of one.

    One of them must carry a gradient: what is made of the data alone is not the loss's doing.

    Example:
        >>> column = torch.zeros(8, 1, requires_grad=True)
        >>> mixes(column, torch.zeros(8)), mixes(column, torch.zeros(8, 1)), mixes(torch.zeros(8, 1), torch.zeros(8))
        (True, False, False)
    """
    if one.dim() == other.dim() or not (one.requires_grad or other.requires_grad):
        return False
    if [n for n in one.shape if n > 1] != [n for n in other.shape if n > 1] or _same_memory(one, other):
        return False
    return bool(math.prod(np.broadcast_shapes(one.shape, other.shape)) > one.numel())


def _same_memory(one: Tensor, other: Tensor) -> bool:
    return bool(one.untyped_storage()._cdata == other.untyped_storage()._cdata)


def mixed_sample_findings(run: TrainingRun) -> list[Finding]:
    """A finding where a loss mixes its samples in this way, with what it is when they are held one to one."""
    watch = _Mixing()
    value = _value(run, watch)
    if not watch.found:
        return []
    name, one, other, line = watch.found[0]
    aligned = _value(run, _Mixing(_aligned))
    still = _value(run, _Mixing(_shuffled))
    apart = [_value(run, _Mixing(change)) for change in (_among_targets, _among_shuffled_targets)]
    blind = abs(still - value) <= _SAME * abs(value) and abs(apart[0] - apart[1]) > _SAME * max(
        abs(apart[0]), abs(value)
    )
    shapes, made = f"{_shape(one)} against {_shape(other)}", tuple(np.broadcast_shapes(one.shape, other.shape))
    count = max(one.shape)
    evidence = (
        f"{name} in the loss{f', {line},' if line else ''} broadcasts {shapes} to {made}: each of {count} samples "
        f"meets the targets of all {count}"
    )
    if blind:
        evidence += (
            f", and the loss stays {value:.3g} when the targets are shuffled among the samples: what it is least at is "
            "the same for all of them"
        )
    evidence += f"; with both of one shape the loss is {aligned:.3g}" + _trained(run.flow, run.loss)
    wider = one if one.dim() > other.dim() else other
    return [
        of_last_step(
            run.flow,
            "loss",
            "warning" if blind else "info",
            LOSS,
            evidence=evidence,
            remedy=f"give both the same shape: squeeze the dimension of 1 of {_shape(wider)}, or unsqueeze the other",
            reference=_REFERENCE,
            numbers={"loss": value, "aligned": aligned, "samples": float(count)},
        )
    ]


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def _value(run: TrainingRun, mode: _Mixing) -> float:
    with unchanged_randomness(), torch.enable_grad():
        seeded(run.call.seed)
        with mode:
            scalar = run.loss(run.done.output)
    return float(scalar.detach())


def _aligned(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    return (one, other.reshape(one.shape)) if one.dim() > other.dim() else (one.reshape(other.shape), other)


def _shuffled(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """The numbers of the one without gradient in another order."""
    return (one, _turned(other, 0)) if one.requires_grad else (_turned(one, 0), other)


def _among_targets(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Both of one shape, and numbers of the targets in another order where the outputs were."""
    targets = other if one.requires_grad else one
    values = _turned(targets.detach(), 1)
    return (
        _aligned(values.reshape(one.shape), other) if one.requires_grad else _aligned(one, values.reshape(other.shape))
    )


def _among_shuffled_targets(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    values, targets = _among_targets(one, other)
    return (values, _turned(targets, 0)) if one.requires_grad else (_turned(values, 0), targets)


def _turned(tensor: Tensor, seed: int) -> Tensor:
    order = torch.randperm(tensor.numel(), generator=torch.Generator().manual_seed(seed)).to(tensor.device)
    return tensor.reshape(-1)[order].reshape(tensor.shape)


def _trained(flow: Flow, loss: Any) -> str:
    """What the loss of equal shapes comes to, by training on it and on the loss as it is."""

    def aligned(out: Any) -> Tensor:
        with _Mixing(_aligned):
            scalar: Tensor = loss(out)
        return scalar

    return trained_on_either(flow, loss, aligned, min)
