"""Why an operation puts out NaN or infinity, read off its arguments, and what would hold."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.utils._pytree import tree_leaves, tree_map

from stabkit.diagnosis.non_finite.domains import Arguments, Cause, count, dtype_name, known_cause, least_eps
from stabkit.tracing.graph.values import operation
from stabkit.tracing.recording.inputs import differentiable

_CHOICES = frozenset({"where", "masked_scatter", "index_put", "cat", "stack", "copy"})
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
    found = known_cause(base, x, args, tensors)
    if found is None and base in _CHOICES and not _all_finite(tensors):
        text = f"{base} puts a NaN or an infinity that the code itself writes into its result"
        return Cause(text, "write a finite number there, and mind why that case comes up at all")
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


def with_lost_eps(cause: Cause, eps: float, dtype: torch.dtype) -> Cause:
    """A cause at zero where the small number that is to keep a value from it is zero itself in its dtype."""
    if not eps or cause.overflow or cause.given:
        return cause
    smallest, least = float(torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps), least_eps(dtype)
    name = dtype_name(dtype)
    text = f"; the {eps:g} that is to keep it from zero is 0 in {name}, whose smallest number is {smallest:.2g}"
    remedy = f"take an eps that {name} holds, {least:g} or more, in the place of {eps:g}, or compute it in float32"
    return replace(cause, text=cause.text + text, remedy=remedy, numbers={**cause.numbers, "eps": eps, "least": least})


def _range(func: Any, args: Arguments, kwargs: Mapping[str, Any], results: Sequence[Tensor], base: str) -> Cause:
    """The value that does not fit, computed in float64, the limit, and the dtype that holds it."""
    spoiled = next(r for r in results if not bool(r.isfinite().all()))
    narrow = spoiled.dtype
    limit = float(torch.finfo(narrow).max)
    reach, held = _reach(func, args, kwargs)
    if held and reach <= limit:  # float64 holds all of it: a sum on the way was too large
        text = f"a sum inside {base} leaves the range of {dtype_name(narrow)} (largest {limit:.5g})"
        return Cause(text, _wider(narrow, limit * 2), {"limit": limit}, overflow=True)
    if held:
        return Cause(
            f"range of {dtype_name(narrow)}: {base} reaches {reach:.4g}, beyond its largest number, {limit:.5g}",
            _wider(narrow, reach),
            {"value": reach, "limit": limit},
            overflow=True,
        )
    wider = narrow != torch.float64 and not math.isnan(reach)
    also = ", and in float64 as well, so that it is no matter of range" if wider else ""
    return Cause(
        f"{base} puts out {'NaN' if bool(spoiled.isnan().any()) else 'infinity'} of finite arguments{also}"
        + _zeros_in(_floats(args, kwargs)),
        "look at its arguments: they leave its domain" + ("" if wider else ", or the range of every dtype"),
        {} if wider else {"limit": limit},
    )


def _zeros_in(tensors: Sequence[Tensor]) -> str:
    """Which arguments hold zeros, in words: a division inside a fused operation shows there."""
    found = [
        f"argument {i} {'is zero everywhere' if not bool(t.any()) else f'is zero in {count(t == 0)}'}"
        for i, t in enumerate(tensors, 1)
        if t.numel() and bool((t == 0).any())
    ]
    return f": {'; '.join(found)}" if found else ""


def _reach(func: Any, args: Arguments, kwargs: Mapping[str, Any]) -> tuple[float, bool]:
    """Largest finite magnitude of the result in float64, and whether all of it is finite there.

    Infinite where nothing of it is finite; NaN where the operation does not run in float64.
    """

    def widen(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.detach().to(torch.float64)
        return torch.float64 if isinstance(value, torch.dtype) and value.is_floating_point else value

    try:
        with torch.no_grad():
            wide = func(*tree_map(widen, args), **tree_map(widen, dict(kwargs)))
    except (RuntimeError, NotImplementedError, TypeError):
        return math.nan, False  # no kernel of it in float64: the value stays unknown
    made = [t.detach() for t in tree_leaves(wide) if isinstance(t, Tensor) and t.numel() and differentiable(t)]
    sizes = [float(t[t.isfinite()].abs().max()) for t in made if bool(t.isfinite().any())]
    return max(sizes, default=math.inf), all(bool(t.isfinite().all()) for t in made)


def _wider(narrow: torch.dtype, reach: float) -> str:
    names = [torch.bfloat16, torch.float32, torch.float64]
    holding = [
        dtype_name(d)
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
        "add a small diagonal of different numbers to the matrix before eigh, or give it more samples than it has "
        "rows, so that no two eigenvalues are equal; a root or an inverse root can be had without eigenvectors by "
        "Newton-Schulz steps",
    ),
    "LinalgSvd": (
        "the derivative of singular vectors of equal or zero singular values is infinite",
        "add a small matrix of noise before svd that tells the singular values apart; a projection or an orthogonal "
        "factor can be had without singular vectors by Newton-Schulz steps",
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
    wide, held = _reach(func, args, kwargs)
    spoiled = next(r for r in results if not bool(r.isfinite().all()))
    limit = float(torch.finfo(spoiled.dtype).max)
    found = int((~spoiled.isfinite()).sum())
    key = operation(node)
    known = _AT.get(_SAME.get(key, key))
    base = getattr(node, "_saved_self", None) if key == "Pow" else None
    if isinstance(base, Tensor) and not base.is_complex() and bool((base.detach() < 0).any()):
        # at an exponent that is whole the power itself is finite
        text = f"the derivative of a power by its exponent holds the logarithm of its base: {count(base.detach() < 0)}"
        return Cause(f"{text} are negative", "keep the base positive: x.clamp(min=eps) ** p", {"entries": float(found)})
    if known is not None and not (held and wide > limit):
        text = f"{known[0]}: {found} of {spoiled.numel()} entries of the gradient"
        return Cause(text, known[1], {"entries": float(found)})
    if held and wide > limit:
        remedy = f"scale the loss down, or {_wider(spoiled.dtype, wide)}"
        return Cause(
            f"range of {dtype_name(spoiled.dtype)}: the gradient reaches {wide:.4g}, beyond its largest number, "
            f"{limit:.5g}",
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
