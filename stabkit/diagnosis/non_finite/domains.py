"""Where operations have no value: poles, ends of domains, ranges of exponentials, divisors that are zero.

Each is read off the arguments of one operation by their values, with what to do about it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Cause:
    """Why, and what to do.

    Attributes:
        text: why, with the numbers.
        remedy: what to do.
        numbers: the numbers, by name.
        overflow: whether the range of the dtype is the reason.
        given: whether it came from outside.
        zero: the argument whose being zero is the reason, where that is one of several.
    """

    text: str
    remedy: str
    numbers: Mapping[str, float] = field(default_factory=dict)
    overflow: bool = False
    given: bool = False
    zero: Tensor | None = field(default=None, compare=False)


Arguments = tuple[Any, ...]

_ROOTS = frozenset({"sqrt", "rsqrt"})
_LOGS = frozenset({"log", "log2", "log10", "log1p", "special_xlogy", "xlogy"})
_EXPS = frozenset({"exp", "exp2", "expm1", "sinh", "cosh", "_foreach_exp"})
_DIVISIONS = frozenset({"div", "true_divide", "reciprocal", "remainder", "fmod", "floor_divide"})
_SOFTMAXES = frozenset({"_softmax", "_log_softmax", "_safe_softmax", "softmax", "log_softmax", "logsumexp"})
_INVERSES = frozenset({"acos", "asin", "atanh", "erfinv", "special_erfinv"})
_CTC = frozenset({"_ctc_loss", "_cudnn_ctc_loss"})
_DETERMINANTS = frozenset({"logdet", "_linalg_slogdet", "linalg_slogdet", "slogdet"})
_NORMS = frozenset({"native_layer_norm", "native_group_norm", "native_batch_norm", "_native_batch_norm_legit"})


def known_cause(base: str, x: Tensor, args: Arguments, tensors: Sequence[Tensor]) -> Cause | None:
    """Of the operations that have a pole, an end of their domain, or an exponential."""
    if base in _CTC:
        return _ctc(args)
    tests: list[tuple[bool, Callable[[], Cause | None]]] = [
        (base in _SOFTMAXES, lambda: _masked(x, args)),
        (base in _ROOTS, lambda: _root(base, x)),
        (base in _LOGS, lambda: _log(base, x if "xlogy" not in base else tensors[-1])),
        (base in _EXPS, lambda: _exp(base, x)),
        (base in _DIVISIONS, lambda: _division(base, args)),
        (base.startswith("pow") or base == "float_power", lambda: _power(args)),
        (base in _INVERSES, lambda: _inverse(base, x)),
        (base in _DETERMINANTS, lambda: determinant(x)),
        (base == "_weight_norm_interface", lambda: _weight_norm(x, args)),
        (base in _NORMS, lambda: _norm_of_equals(base, x, args)),
        (base == "logit", lambda: _logit(x, args)),
        (base == "acosh", lambda: _below_one(x)),
        (base in ("lgamma", "digamma", "special_digamma"), lambda: _gamma(base, x)),
    ]
    for applies, cause in tests:
        if applies:
            return cause()
    return None


def _ctc(args: Arguments) -> Cause | None:
    """Transcripts that do not fit into the frames that they are given.

    A transcript needs a frame for each of its symbols, and one for the blank between two that are equal (Graves et
    al., 2006, section 3.1).
    """
    frames, symbols = (list(map(int, torch.as_tensor(a).reshape(-1).tolist())) for a in args[2:4])
    rows, start = [], 0
    for i, length in enumerate(symbols):
        taken = args[1][i, :length] if args[1].dim() > 1 else args[1][start : start + length]
        rows.append(length + int((taken[1:] == taken[:-1]).sum()))
        start += length
    short = [i for i, (held, needed) in enumerate(zip(frames, rows, strict=True)) if held < needed]
    if not short:
        return None
    worst = max(short, key=lambda i: rows[i] - frames[i])
    repeats = rows[worst] - symbols[worst]
    needs = f"{symbols[worst]} symbols" + f" and {repeats} blanks between equal ones" * bool(repeats)
    text = (
        f"the input is shorter than its target in {len(short)} of {len(frames)} samples, so that no path gives it: "
        f"sample {worst} has {frames[worst]} frames for {needs}"
    )
    remedy = (
        f"shorten time less: at least {max(rows)} frames are needed here (a smaller stride, longer inputs), or leave "
        "such samples out; zero_infinity=True trains on the others alone"
    )
    return Cause(text, remedy, {"short": float(len(short)), "frames": float(frames[worst]), "needed": float(max(rows))})


def _masked(x: Tensor, args: Arguments) -> Cause | None:
    dim = next((a for a in args[1:] if isinstance(a, int | list)), -1)
    rows = torch.isneginf(x).all(dim if isinstance(dim, int) else tuple(dim)) if x.dim() else torch.isneginf(x)
    count = int(rows.sum())
    if not count:
        return None
    return Cause(
        f"{count} of {rows.numel()} rows have every key masked with -inf: 0 / 0",
        "let every row see at least one key, or mask with a large finite number, as torch.finfo(dtype).min",
        {"rows": float(count)},
    )


def _root(base: str, x: Tensor) -> Cause | None:
    low = float(x.min())
    if low < 0:
        text = f"a root of negative numbers: {count(x < 0)}, down to {low:.3g}"
        return Cause(text, "clamp what is under the root: x.clamp_min(0)")
    if base == "rsqrt" and low == 0:
        return Cause(f"one over the root of zero: {count(x == 0)}", "add a small number under the root: x + eps")
    return None


def _log(base: str, x: Tensor) -> Cause | None:
    pole = -1.0 if base == "log1p" else 0.0
    low = float(x.min())
    if low < pole:
        text = f"a logarithm of negative numbers: {count(x < pole)}, down to {low:.3g}"
        remedy = (
            "build what it is taken of so that it is positive (softplus, exp, a map that stays invertible); of a "
            "determinant take log |det|; a clamp hides what is wrong"
        )
        return Cause(text, remedy)
    if low == pole:
        return Cause(
            f"a logarithm of zero: {count(x == pole)}",
            "compute it without leaving logarithms (log_softmax, logsigmoid, a loss on logits), or clamp: "
            "x.clamp_min(eps)",
        )
    return None


def _exp(base: str, x: Tensor) -> Cause | None:
    finite = x[x.isfinite()]
    if not finite.numel():
        return None
    end = math.log(torch.finfo(x.dtype).max) / (math.log(2.0) if base == "exp2" else 1.0)
    reach = float(finite.abs().max() if base in ("sinh", "cosh") else finite.max())
    return Cause(
        f"{base} of {reach:.4g}, which overflows {dtype_name(x.dtype)} beyond {end:.1f}",
        "bound what it is taken of (clamp, or c * tanh(s / c)), or start the layer that makes it at zero; "
        "in a softmax or a loss, use logsumexp",
        {"argument": reach, "limit": end},
    )


def _division(base: str, args: Arguments) -> Cause | None:
    if base == "reciprocal":
        over, under = 1.0, args[0]
    else:
        over, under = args[0], args[1]
    zero = torch.as_tensor(under == 0)
    if not bool(zero.any()):
        return None
    both = torch.as_tensor(over == 0) & zero
    what = "0 / 0" if bool(both.any()) else "division by zero"
    return Cause(
        f"{what}: {count(both if bool(both.any()) else zero)}",
        "keep the divisor from zero: x / (d + eps), or d.clamp_min(eps); a norm with an eps",
        {"zeros": float(zero.sum())},
    )


def _power(args: Arguments) -> Cause | None:
    base, exponent = (torch.as_tensor(a) for a in args[:2])
    if base.is_complex() or exponent.is_complex():
        return None
    if bool(((base == 0) & (exponent < 0)).any()):
        return Cause(f"a negative power of zero: {count(base == 0)}", "add a small number to the base: (x + eps) ** p")
    if bool(((base < 0) & (exponent != exponent.round())).any()):
        text = f"a fractional power of negative numbers: {count(base < 0)}"
        return Cause(text, "clamp the base to be positive, or use sign(x) * abs(x) ** p")
    return None


def determinant(x: Tensor) -> Cause | None:
    """Of a logarithm of determinants ``(..., n, n)``: those that are negative, or zero."""
    sign, size = torch.linalg.slogdet(x.detach().double() if not x.is_complex() else x.detach())
    matrices = f"of {sign.numel()} matrices"
    if not sign.is_complex() and bool((sign < 0).any()):
        return Cause(
            f"a logarithm of a negative determinant: {int((sign < 0).sum())} {matrices}, "
            f"|det| {float(size[sign < 0].exp().min()):.3g}",
            "take log |det|, torch.linalg.slogdet(w)[1], which is what a change of variables asks for; or start from "
            "matrices whose determinant is positive (turn one column round) and keep it so (an LU factorisation)",
            {"negative": float((sign < 0).sum())},
        )
    if bool((sign == 0).any()):
        return Cause(
            f"a logarithm of a determinant that is zero: singular {int((sign == 0).sum())} {matrices}",
            "keep the matrices from being singular: add a small multiple of the identity, or factorise them (LU)",
            {"singular": float((sign == 0).sum())},
        )
    return None


#: functions of torch that are made of several operations, with the cause as their first argument shows it
COMPOSED: dict[str, Callable[[Tensor], Cause | None]] = {"logdet": determinant}


def _weight_norm(v: Tensor, args: Arguments) -> Cause | None:
    """A weight g v / |v| where a row of v is zero."""
    dim = next((a for a in args if isinstance(a, int)), 0)
    sizes = v.detach().double().movedim(dim, 0).flatten(1).norm(dim=1)
    none = sizes == 0
    if not bool(none.any()):
        return None
    return Cause(
        f"g v / |v| with |v| = 0, which is 0 / 0: v is all zero in {int(none.sum())} of {none.numel()} rows",
        "give v numbers other than zero, as the layer is drawn by default, before weight_norm is put on it; for a "
        "layer that is to start at zero set its gain g to zero and leave v as it is",
        {"zeros": float(none.sum())},
        zero=v,
    )


def _norm_of_equals(base: str, x: Tensor, args: Arguments) -> Cause | None:
    """A norm of numbers that are all equal, whose deviation is zero, and an eps that does not help."""
    eps = next((a for a in args[::-1] if isinstance(a, float)), math.nan)
    if not eps < torch.finfo(x.dtype).tiny:
        return None
    kind = base.strip("_").removeprefix("native_").removesuffix("_legit")
    return Cause(
        f"a {kind} of numbers that are all equal, 0 / 0: its eps, {eps:g}, does not keep it from zero in "
        f"{dtype_name(x.dtype)}",
        f"give the norm an eps of {max(least_eps(x.dtype), 1e-5):g} or more",
        {"eps": eps},
    )


def _logit(x: Tensor, args: Arguments) -> Cause | None:
    if any(isinstance(a, float) for a in args):
        return None
    at = (x <= 0) | (x >= 1)
    if not bool(at.any()):
        return None
    text = f"logit at or beyond 0 and 1: {count(at)}, from {float(x.min()):.3g} to {float(x.max()):.9g}"
    return Cause(
        text, "stay with the logits that the probabilities were made of, or give it an eps: logit(p, eps=1e-6)"
    )


def _below_one(x: Tensor) -> Cause | None:
    if not bool((x < 1).any()):
        return None
    text = f"acosh below 1: {count(x < 1)}, down to {float(x.min()):.9g}"
    return Cause(text, "clamp its argument: x.clamp_min(1 + eps)")


def _gamma(base: str, x: Tensor) -> Cause | None:
    at = (x <= 0) & (x == x.round())
    if not bool(at.any()):
        return None
    return Cause(f"{base} at a pole, zero or a negative whole number: {count(at)}", "keep its argument positive")


def _inverse(base: str, x: Tensor) -> Cause | None:
    outside = x.abs() >= 1.0 if base in ("atanh", "erfinv", "special_erfinv") else x.abs() > 1.0
    if not bool(outside.any()):
        return None
    where = "outside of" if base in ("acos", "asin") else "at or outside of"
    text = f"{base} {where} -1 to 1: {count(outside)}, up to {float(x.abs().max()):.9g}"
    return Cause(text, "clamp its argument to within -1 + eps and 1 - eps")


def least_eps(dtype: torch.dtype) -> float:
    """The least power of ten that keeps a divisor from zero in a dtype: a normal number, whose inverse is finite."""
    limits = torch.finfo(dtype)
    return float(f"1e{math.ceil(math.log10(max(limits.tiny, 1.0 / limits.max)))}")


def count(where: Tensor) -> str:
    """How many entries, of how many."""
    return f"{int(where.sum())} of {where.numel()} entries"


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype without its package."""
    return str(dtype).removeprefix("torch.")
