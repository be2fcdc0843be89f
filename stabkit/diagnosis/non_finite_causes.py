"""Why an operation puts out NaN or infinity, read off its arguments, and what would hold."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.utils._pytree import tree_leaves, tree_map

from stabkit.tracing.inputs import differentiable
from stabkit.tracing.values import operation


@dataclass(frozen=True)
class Cause:
    """Why, and what to do.

    Attributes:
        text: why, with the numbers.
        remedy: what to do.
        numbers: the numbers, by name.
        overflow: whether the range of the dtype is the reason.
        given: whether it came from outside.
    """

    text: str
    remedy: str
    numbers: Mapping[str, float] = field(default_factory=dict)
    overflow: bool = False
    given: bool = False


Arguments = tuple[Any, ...]

_ROOTS = frozenset({"sqrt", "rsqrt"})
_LOGS = frozenset({"log", "log2", "log10", "log1p", "special_xlogy", "xlogy"})
_EXPS = frozenset({"exp", "exp2", "expm1", "sinh", "cosh", "_foreach_exp"})
_DIVISIONS = frozenset({"div", "true_divide", "reciprocal", "remainder", "fmod"})
_SOFTMAXES = frozenset({"_softmax", "_log_softmax", "_safe_softmax", "softmax", "log_softmax", "logsumexp"})
_CTC = frozenset({"_ctc_loss", "_cudnn_ctc_loss"})
_INVERSES = {"acos": 1.0, "asin": 1.0, "atanh": 1.0}
_DEVIATIONS = frozenset({"std", "var", "std_mean", "var_mean"})
_LABELLED = frozenset({"nll_loss_forward", "nll_loss2d_forward", "nll_loss", "cross_entropy_loss"})


def forward_cause(func: Any, name: str, args: Arguments, kwargs: Mapping[str, Any], results: Sequence[Tensor]) -> Cause:
    """Why the result of an operation on finite arguments (or on infinities filled in on purpose) is not finite."""
    tensors = _floats(args, kwargs)
    base = name.removesuffix("_")
    x = tensors[0] if tensors else None
    empty = _of_nothing(base, args, tensors)
    if empty is not None or x is None:
        return empty or Cause(f"{base} makes it of no input", "look at the constant that is written here")
    found = _known(base, x, args, tensors)
    if found is None and any(bool(r.isnan().any()) for r in results) and not _all_finite(tensors):
        text = "0 * inf or inf - inf: an infinity that was filled in meets a zero or another"
        found = Cause(text, "fill with a large finite number, as torch.finfo(dtype).min, instead of -inf")
    return found or _range(func, args, kwargs, results, base)


def _of_nothing(base: str, args: Arguments, tensors: Sequence[Tensor]) -> Cause | None:
    """A mean, a deviation or a loss over no numbers."""
    if base in _LABELLED and len(args) > 1 and isinstance(args[1], Tensor):
        labels, ignored = args[1], next((a for a in args[::-1] if isinstance(a, int)), -100)
        if labels.numel() and bool((labels == ignored).all()):
            text = f"all {labels.numel()} labels are {ignored}, which is ignored: the mean is over no label, 0 / 0"
            return Cause(text, "leave such batches out, or divide the sum (reduction='sum') by max(count, 1)")
    if base in _DEVIATIONS and tensors and tensors[0].numel():
        members = _members(tensors[0], args)
        if members == 1:
            text = "the deviation of one number: the unbiased estimate divides by 0"
            return Cause(text, "take unbiased=False (correction=0), or more than one number")
    if base in {"mean", "nanmean", *_DEVIATIONS} and tensors and tensors[0].numel() == 0:
        return Cause(f"the {base} of no numbers, 0 / 0", "skip what is empty, or divide the sum by max(count, 1)")
    return None


def _members(x: Tensor, args: Arguments) -> int:
    dims = args[1] if len(args) > 1 and isinstance(args[1], list | tuple) else None
    return math.prod(x.shape[d] for d in dims) if dims else x.numel()


def _known(base: str, x: Tensor, args: Arguments, tensors: Sequence[Tensor]) -> Cause | None:
    """The operations that have a pole, an end of their domain, or an exponential."""
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
        text = f"a root of negative numbers: {_count(x < 0)}, down to {low:.3g}"
        return Cause(text, "clamp what is under the root: x.clamp_min(0)")
    if base == "rsqrt" and low == 0:
        return Cause(f"one over the root of zero: {_count(x == 0)}", "add a small number under the root: x + eps")
    return None


def _log(base: str, x: Tensor) -> Cause | None:
    pole = -1.0 if base == "log1p" else 0.0
    low = float(x.min())
    if low < pole:
        text = f"a logarithm of negative numbers: {_count(x < pole)}, down to {low:.3g}"
        remedy = (
            "build what it is taken of so that it is positive (softplus, exp, a map that stays invertible); of a "
            "determinant take log |det|; a clamp hides what is wrong"
        )
        return Cause(text, remedy)
    if low == pole:
        return Cause(
            f"a logarithm of zero: {_count(x == pole)}",
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
        f"{base} of {reach:.4g}, which overflows {_name(x.dtype)} beyond {end:.1f}",
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
        f"{what}: {_count(both if bool(both.any()) else zero)}",
        "keep the divisor from zero: x / (d + eps), or d.clamp_min(eps); a norm with an eps",
        {"zeros": float(zero.sum())},
    )


def _power(args: Arguments) -> Cause | None:
    base, exponent = (torch.as_tensor(a) for a in args[:2])
    if base.is_complex() or exponent.is_complex():
        return None
    if bool(((base == 0) & (exponent < 0)).any()):
        return Cause(f"a negative power of zero: {_count(base == 0)}", "add a small number to the base: (x + eps) ** p")
    if bool(((base < 0) & (exponent != exponent.round())).any()):
        text = f"a fractional power of negative numbers: {_count(base < 0)}"
        return Cause(text, "clamp the base to be positive, or use sign(x) * abs(x) ** p")
    return None


def _inverse(base: str, x: Tensor) -> Cause | None:
    outside = x.abs() >= 1.0 if base == "atanh" else x.abs() > 1.0
    if not bool(outside.any()):
        return None
    text = f"{base} outside of -1 to 1: {_count(outside)}, up to {float(x.abs().max()):.9g}"
    return Cause(text, "clamp its argument to within -1 + eps and 1 - eps")


def _range(func: Any, args: Arguments, kwargs: Mapping[str, Any], results: Sequence[Tensor], base: str) -> Cause:
    """The value that does not fit, computed in float64, the limit, and the dtype that holds it."""
    spoiled = next(r for r in results if not bool(r.isfinite().all()))
    narrow = spoiled.dtype
    limit = float(torch.finfo(narrow).max)
    reach = _reach(func, args, kwargs)
    if not math.isfinite(reach) or reach <= limit:
        if reach <= limit:  # float64 holds all of it: a sum on the way was too large
            text = f"a sum inside {base} leaves the range of {_name(narrow)} (largest {limit:.5g})"
            return Cause(text, _wider(narrow, limit * 2), {"limit": limit}, overflow=True)
        return Cause(
            f"{base} puts out {'NaN' if bool(spoiled.isnan().any()) else 'infinity'} of finite arguments",
            "look at its arguments: they leave its domain, or the range of every dtype",
            {"limit": limit},
        )
    return Cause(
        f"range of {_name(narrow)}: {base} reaches {reach:.4g}, beyond its largest number, {limit:.5g}",
        _wider(narrow, reach),
        {"value": reach, "limit": limit},
        overflow=True,
    )


def _reach(func: Any, args: Arguments, kwargs: Mapping[str, Any]) -> float:
    """Largest magnitude of the result in float64; NaN where the operation does not run there."""

    def widen(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.detach().to(torch.float64)
        return torch.float64 if isinstance(value, torch.dtype) and value.is_floating_point else value

    try:
        with torch.no_grad():
            wide = func(*tree_map(widen, args), **tree_map(widen, dict(kwargs)))
    except (RuntimeError, NotImplementedError, TypeError):
        return math.nan  # no kernel of it in float64: the value stays unknown
    sizes = [float(t.detach().abs().max()) for t in tree_leaves(wide) if isinstance(t, Tensor) and t.numel()]
    return max((size for size in sizes if not math.isnan(size)), default=math.nan)


def _wider(narrow: torch.dtype, reach: float) -> str:
    names = [torch.bfloat16, torch.float32, torch.float64]
    holding = [
        _name(d)
        for d in names
        if torch.finfo(d).max > reach and torch.finfo(d).bits >= torch.finfo(narrow).bits and d != narrow
    ]
    if narrow == torch.float16:
        return f"run in {' or '.join(holding[:2])}, which hold it, or scale down what leads here"
    if holding:
        return f"scale down what leads here, as growth over depth brings it there; {holding[0]} would still hold it"
    return "scale down what leads here: no dtype holds it"


_AT = {
    "Sqrt": ("the derivative of a root at zero is infinite", "add a small number under the root: sqrt(x + eps)"),
    "Rsqrt": ("the derivative of 1 / sqrt(x) at zero is infinite", "add a small number under the root: rsqrt(x + eps)"),
    "Pow": (
        "the derivative of a power below 1 at zero is infinite",
        "add a small number to the base: (x + eps) ** p",
    ),
    "Log": ("the derivative of a logarithm at zero, 1 / 0", "clamp before the logarithm, not after it"),
    "Log1p": ("the derivative of log(1 + x) at -1, 1 / 0", "clamp before the logarithm, not after it"),
    "Div": (
        "the derivative of a division by zero",
        "make the divisor safe before dividing, not what comes of it after",
    ),
    "Reciprocal": ("the derivative of 1 / x at zero", "make x safe before the division, not what comes of it after"),
    "Exp": ("0 * inf: exp overflowed where its result is thrown away", "bound the argument of exp, not its result"),
    "Std": (
        "the derivative of a standard deviation of equal numbers is infinite",
        "take sqrt(var + eps) in its place",
    ),
    "Acos": ("the derivative of acos at 1 or -1 is infinite", "clamp its argument to within -1 + eps and 1 - eps"),
    "Asin": ("the derivative of asin at 1 or -1 is infinite", "clamp its argument to within -1 + eps and 1 - eps"),
    "Acosh": ("the derivative of acosh at 1 is infinite", "clamp its argument to at least 1 + eps"),
    "Atanh": ("the derivative of atanh at 1 or -1 is infinite", "clamp its argument to within -1 + eps and 1 - eps"),
    "Atan2": ("the derivative of atan2 at (0, 0), 0 / 0", "keep its arguments from being zero together"),
    "LinalgEigh": (
        "the derivative of eigenvectors of equal eigenvalues is infinite",
        "use the eigenvalues alone, or add a small diagonal of different numbers",
    ),
    "LinalgSvd": (
        "the derivative of singular vectors of equal or zero singular values is infinite",
        "use the singular values alone, or add noise that tells them apart",
    ),
    "Cumprod": ("the derivative of a product that holds zero", "sum logarithms in its place"),
    "Softmax": ("a softmax of rows in which every key is masked", "let every row see at least one key"),
    "Logsumexp": ("a logsumexp of rows in which all is masked with -inf", "let every row hold one finite number"),
}
# names of nodes that share a derivative with one above
_SAME = {"Log2": "Log", "Log10": "Log", "StdMean": "Std", "LogSoftmax": "Softmax", "Exp2": "Exp", "Expm1": "Exp"}
_SAME["SafeSoftmax"] = "Softmax"


def backward_cause(
    node: Node, func: Any, name: str, args: Arguments, kwargs: Mapping[str, Any], results: Sequence[Tensor]
) -> Cause:
    """Why the derivative of an operation is not finite although what comes back to it is."""
    wide = _reach(func, args, kwargs)
    spoiled = next(r for r in results if not bool(r.isfinite().all()))
    limit = float(torch.finfo(spoiled.dtype).max)
    found = int((~spoiled.isfinite()).sum())
    key = operation(node)
    known = _AT.get(_SAME.get(key, key))
    if known is not None and not (math.isfinite(wide) and wide > limit):
        text = f"{known[0]}: {found} of {spoiled.numel()} entries of the gradient"
        return Cause(text, known[1], {"entries": float(found)})
    if math.isfinite(wide) and wide > limit:
        remedy = f"scale the loss down, or {_wider(spoiled.dtype, wide)}"
        return Cause(
            f"range of {_name(spoiled.dtype)}: the gradient reaches {wide:.4g}, beyond its largest number, {limit:.5g}",
            remedy,
            {"value": wide, "limit": limit},
            overflow=True,
        )
    return Cause(
        f"the derivative of {key} is not finite at this value: {found} of {spoiled.numel()} entries",
        "keep its argument from where its derivative is infinite",
        {"entries": float(found)},
    )


def _floats(args: Arguments, kwargs: Mapping[str, Any]) -> list[Tensor]:
    leaves = tree_leaves((args, dict(kwargs)))
    return [t for t in leaves if isinstance(t, Tensor) and differentiable(t)]


def _all_finite(tensors: Sequence[Tensor]) -> bool:
    return all(bool(t.isfinite().all()) for t in tensors)


def _count(where: Tensor) -> str:
    return f"{int(where.sum())} of {where.numel()} entries"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
