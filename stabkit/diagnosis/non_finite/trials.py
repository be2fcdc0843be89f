"""What would keep an operation finite, tried: a pass and a short training in which its argument is another.

Only what is confirmed so is told as tried.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stabkit.diagnosis.non_finite.domains import least_eps
from stabkit.diagnosis.non_finite.origin import Origin
from stabkit.diagnosis.remedies.other_arguments import Arguments, Change, OtherArguments
from stabkit.diagnosis.remedies.short_training import STEPS, short_training
from stabkit.errors import StabkitError
from stabkit.tracing import Flow
from stabkit.tracing.recording.training_pass import Observer, training_pass

_TILT = 1e-3  # of the mean of the diagonal: what is added to a matrix to tell its eigenvalues apart
_SMALL = 1e-12  # a number that keeps a value from zero, where the dtype holds it
#: functions of torch, by the operation that they run
_FUNCTIONS = {
    "div": ("div", "true_divide", "truediv", "rtruediv", "itruediv", "reciprocal", "divide"),
    "pow": ("pow", "ipow", "float_power"),
    "linalgeigh": ("linalg_eigh",),
    "linalgsvd": ("linalg_svd", "svd"),
}
#: functions that keep a divisor from zero by a number which their caller need not give
_WITH_EPS = ("normalize", "cosine_similarity", "pairwise_distance")


@dataclass(frozen=True)
class Guard:
    """What keeps an operation finite, in words, and how its arguments are changed to see whether it does."""

    words: str
    short: str
    change: Change


@dataclass(frozen=True)
class Guarded:
    """A guard that was tried and holds: its words, and what was measured with it."""

    words: str
    evidence: str


def guarded(flow: Flow, loss: Any, origin: Origin) -> Guarded | None:
    """The first guard of an operation that was tried and leaves all finite; None where none does."""
    if not origin.line:
        return None
    names = () if origin.cause.numbers.get("eps") else _FUNCTIONS.get(origin.operation, (origin.operation,))
    for guard in _guards(origin):
        evidence = _tried(flow, loss, guard, names, origin.line)
        if evidence:
            return Guarded(guard.words, evidence)
    return None


def _tried(flow: Flow, loss: Any, guard: Guard, names: tuple[str, ...], line: str) -> str:
    """What was measured with a guard; empty where it does not leave all finite, or the code does not stand it."""
    instead = OtherArguments(names, line, guard.change)
    try:
        done = training_pass(flow.forward_pass, loss, Observer(instead))
    except (StabkitError, RuntimeError):
        return ""
    ends = [done.loss, *done.gradients.values(), *done.inputs]
    if not instead.applied or not all(_finite(t) for t in ends if t is not None):
        return ""
    trained = short_training(flow, loss, within=lambda: OtherArguments(names, line, guard.change))
    if trained is None:
        return f"tried on a copy: with {guard.short} all is finite"
    if not math.isfinite(trained.last):
        return ""
    return f"tried on a copy: with {guard.short} all is finite, and {STEPS} steps of plain SGD take the loss {trained}"


def _finite(tensor: Tensor) -> bool:
    entries = tensor.coalesce().values() if tensor.is_sparse else tensor
    return bool(entries.detach().isfinite().all())


def _guards(origin: Origin) -> list[Guard]:
    """What would keep an operation from where it is not finite, the mildest first."""
    numbers: Mapping[str, float] = origin.cause.numbers
    name, remedy = origin.operation, origin.cause.remedy
    if eps := numbers.get("eps"):
        return [_with_eps(eps, numbers["least"] * by, numbers["least"], remedy) for by in (1.0, 10.0, 100.0)]
    if "argument" in numbers and "limit" in numbers:
        # a loss may square what it is given, and sum it
        return [_bounded(origin, numbers["limit"] / by, both=name in ("sinh", "cosh")) for by in (2, 4)]
    if "negative" in origin.cause.text:
        return []  # a clamp hides what is wrong
    known: dict[str, tuple[str, Change]] = {
        "sqrt": ("a small number there", _plus_small),
        "rsqrt": ("a small number there", _plus_small),
        "log": ("such a clamp", _at_least_small),
        "div": ("the divisor kept from zero", _safe_divisor),
        "linalgeigh": (f"such a diagonal, from 0 to {_TILT:g} of the mean of its own,", _tilted),
        "acos": ("such a clamp", _inside),
        "asin": ("such a clamp", _inside),
    }
    return [Guard(remedy, *known[name])] if name in known else []


def _bounded(origin: Origin, end: float, both: bool) -> Guard:
    name, end = origin.operation, float(f"{end:.2g}")
    clamp = f"x.clamp({-end:g}, {end:g})" if both else f"x.clamp(max={end:g})"
    if origin.reaches == "gradient":
        words = (
            f"bound the argument and not the result, which is thrown away where it overflows, while 0 * inf is NaN on "
            f"the way back: {name}({clamp}), or give it a harmless number there, {name}(torch.where(taken, x, 0))"
        )
    else:
        words = f"bound what it is taken of: {name}({clamp}), or c * tanh(x / c)"
        if name.startswith("exp"):
            words += (
                "; where it is divided by its sum, as in a softmax, subtract the largest score before it "
                "(torch.softmax, logsumexp)"
            )

    def change(_name: str, args: Arguments, kwargs: dict[str, Any]) -> tuple[Arguments, dict[str, Any]]:
        return (args[0].clamp(-end if both else None, end), *args[1:]), kwargs

    return Guard(words, f"{name}({clamp})", change)


def _with_eps(eps: float, by: float, least: float, remedy: str) -> Guard:
    """Another number for one that is zero in its dtype."""

    def change(name: str, args: Arguments, kwargs: dict[str, Any]) -> tuple[Arguments, dict[str, Any]]:
        args = tuple(by if isinstance(a, float) and a == eps else a for a in args)
        kwargs = {key: by if isinstance(a, float) and a == eps else a for key, a in kwargs.items()}
        if name in _WITH_EPS and not any(isinstance(a, float) and a == by for a in args):
            kwargs["eps"] = max(by, kwargs.get("eps", 0.0))  # which the caller need not give
        return args, kwargs

    return Guard(remedy.replace(f"{least:g} or more", f"{by:g} or more"), f"an eps of {by:g}", change)


def _plus_small(_name: str, args: Arguments, kwargs: dict[str, Any]) -> tuple[Arguments, dict[str, Any]]:
    return (args[0] + max(least_eps(args[0].dtype), _SMALL), *args[1:]), kwargs


def _at_least_small(_name: str, args: Arguments, kwargs: dict[str, Any]) -> tuple[Arguments, dict[str, Any]]:
    return (args[0].clamp_min(max(least_eps(args[0].dtype), _SMALL)), *args[1:]), kwargs


def _safe_divisor(name: str, args: Arguments, kwargs: dict[str, Any]) -> tuple[Arguments, dict[str, Any]]:
    place = 0 if name in ("rtruediv", "reciprocal") else 1
    if len(args) <= place or not isinstance(args[place], Tensor):
        return args, kwargs
    divisor = args[place]
    safe = torch.where(divisor == 0, torch.full_like(divisor, max(least_eps(divisor.dtype), _SMALL)), divisor)
    return (*args[:place], safe, *args[place + 1 :]), kwargs


def _tilted(_name: str, args: Arguments, kwargs: dict[str, Any]) -> tuple[Arguments, dict[str, Any]]:
    matrix = args[0]
    size = matrix.detach().diagonal(dim1=-2, dim2=-1).abs().mean(-1)[..., None, None]
    steps = torch.linspace(0, 1, matrix.shape[-1]).to(matrix)
    return (matrix + _TILT * size * torch.diag(steps), *args[1:]), kwargs


def _inside(_name: str, args: Arguments, kwargs: dict[str, Any]) -> tuple[Arguments, dict[str, Any]]:
    end = 1 - 4 * torch.finfo(args[0].dtype).eps
    return (args[0].clamp(-end, end), *args[1:]), kwargs
