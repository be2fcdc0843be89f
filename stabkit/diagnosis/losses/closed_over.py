"""Tensors that a loss closes over: which are not finite, where, and whether boxes beside them are of another format."""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stabkit.tracing.derivatives.lost_gradient import listed

_SHOWN = 4  # places that are told
_CORNERS = 4  # numbers of a box
_DEPTH = 3


def closed_over(loss: Any, depth: int = _DEPTH) -> dict[str, Tensor]:
    """The tensors of a loss by name: those of the functions around it, and those that an object keeps.

    Args:
        loss: a callable, which may call another that it closes over.
        depth: callables within callables, at most.
    """
    found: dict[str, Tensor] = {}
    inner: list[Any] = []
    for name, held in _names(loss):
        if isinstance(held, Tensor):
            found.setdefault(name, held)
        elif callable(held) and not isinstance(held, nn.Module | type):
            inner.append(held)
    for each in inner if depth else ():
        found = closed_over(each, depth - 1) | found
    return found


def _names(loss: Any) -> Iterator[tuple[str, Any]]:
    """What a callable closes over, reads of its module, or keeps, by name."""
    function = loss.__func__ if isinstance(loss, types.MethodType) else loss
    if not isinstance(function, types.FunctionType):
        yield from getattr(loss, "__dict__", {}).items()
        return
    try:
        held = inspect.getclosurevars(function)
    except ValueError:  # a name that is not bound yet
        return
    yield from held.nonlocals.items()
    yield from ((name, each) for name, each in held.globals.items() if isinstance(each, Tensor))


def broken_targets(loss: Any) -> tuple[str, str]:
    """Which tensors of a loss are not finite and where, and what explains it, as evidence and remedy; empty for none.

    Boxes of which the third number lies below the first are no pairs of corners: they hold widths and heights.
    """
    held = closed_over(loss)
    broken = {n: t for n, t in held.items() if t.is_floating_point() and not bool(t.detach().isfinite().all())}
    if not broken:
        return "", ""
    evidence = "; ".join(f"of {name} {_places(t.detach())}" for name, t in broken.items())
    for name, boxes in held.items():
        if name not in broken and (words := _as_corners(boxes.detach())):
            evidence += f"; {name} {words}, as boxes (x, y, w, h) do that are read as (x1, y1, x2, y2)"
            remedy = (
                f"if {name} holds (x, y, w, h), convert it before {listed(tuple(broken))} is made of it: x2 = x + w, "
                "y2 = y + h (torchvision.ops.box_convert); the logarithm of a negative width is NaN. Not tried"
            )
            return evidence, remedy
    return evidence, ""


def _places(tensor: Tensor) -> str:
    """Kinds, columns and rows of what is not finite."""
    odd = ~tensor.isfinite()
    nan, count = int(tensor.isnan().sum()), int(odd.sum())
    kinds = " and ".join(f"{number} {what}" for number, what in ((nan, "NaN"), (count - nan, "infinite")) if number)
    words = f"{kinds} of {tensor.numel()} entries"
    if tensor.dim() < 1 or tensor.numel() == count:
        return words
    rows = odd.flatten(1).any(1) if tensor.dim() > 1 else odd
    words += f", in {int(rows.sum())} of {len(rows)} rows ({_named(rows.nonzero().flatten().tolist())})"
    if tensor.dim() > 1:
        columns = odd.flatten(0, -2).any(0)
        words += (
            f", all in column{'s' if int(columns.sum()) > 1 else ''} {_named(columns.nonzero().flatten().tolist())}"
        )
    return words


def _named(indices: Sequence[int]) -> str:
    return ", ".join(map(str, indices[:_SHOWN])) + (", ..." if len(indices) > _SHOWN else "")


def _as_corners(boxes: Tensor) -> str:
    """What is odd of boxes that are read as two corners, where some have none to their right or below; empty else."""
    if boxes.dim() < 2 or boxes.shape[-1] != _CORNERS or not boxes.is_floating_point() or not boxes.numel():
        return ""
    x1, y1, x2, y2 = boxes.flatten(0, -2).unbind(1)
    wide, high = int((x2 < x1).sum()), int((y2 < y1).sum())
    if not (wide or high) or not bool((boxes.isfinite().all() & (torch.minimum(x2, y2) > 0)).all()):
        return ""
    return f"has x2 < x1 in {wide} of its {len(x1)} rows and y2 < y1 in {high}"
