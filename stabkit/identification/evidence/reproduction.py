"""A step made anew of its tableau and its fields as they were recorded: numbers that make another are withdrawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from stabkit.identification.fields.recorded_fields import RecordedField
from stabkit.identification.form.pieces import Piece, pull
from stabkit.identification.names.single import NO_STEP
from stabkit.identification.record import Identification
from stabkit.integrators import GeneralLinearMethod
from stabkit.tracing.graph.values import meta_of, random_tensors

_READ = 1e-3  # relative; a coefficient that is counted twice is off by the size of the branch, roundings by far less
_ROUNDINGS = (
    4.0  # rounding units of the dtype: Euler's and midpoint steps in bfloat16 and float16 are off by .2 to .4 of one
)


def confirmed(record: Identification, piece: Piece) -> Identification:
    """A record whose numbers make the step that was recorded; one without numbers where they make another.

    Only what is called proven is tried, and only where the way to every field can be told.

    Args:
        record: the reading of a step whose result nothing follows but the tableau's own additions.
        piece: from its old states to its new ones, in the order of the tableau.
    """
    method = record.method
    if record.evidence != "proven" or record.after or not isinstance(method, GeneralLinearMethod):
        return record
    away = deviation(piece, method, record.recorded)
    eps = max(torch.finfo(dtype).eps for dtype in _dtypes(piece))
    if away is None or not away > max(_READ, _ROUNDINGS * eps):  # what is not finite tells nothing
        return record
    why = f"made anew of its fields the step is another ({away:.1e} of its products away): no number is claimed"
    return replace(record, evidence="measured", step_size=None, convention=NO_STEP, notes=(why, *record.notes))


def _dtypes(piece: Piece) -> set[torch.dtype]:
    """What a step is computed in: branches may run in another dtype than its states."""
    return {meta_of(value).dtype for node in piece.nodes for value in piece.inputs(node)} | {
        meta_of(value).dtype for value in (*piece.sources, *piece.targets)
    }


def deviation(piece: Piece, method: GeneralLinearMethod, recorded: Sequence[RecordedField | None]) -> float | None:
    """||J^T w - J_M^T w|| / ||J^T w|| for one random w, J_M that of the method; None where it cannot be told.

    With K_i = h J_i (U_i x + A_i K) and x' = V x + B K, products with the transpose go through the stages backwards.
    """
    fields = [field for field in recorded if field is not None]
    sizes = {meta_of(v).numel for v in (*piece.sources, *piece.targets)}
    complex_numbers = any(meta_of(v).dtype.is_complex for v in (*piece.sources, *piece.targets))
    if len(fields) != method.stages or len(recorded) != method.stages or not method.is_explicit or len(sizes) > 1:
        return None
    if complex_numbers or method.states != len(piece.sources) or len(set(piece.targets)) != method.states:
        return None
    drawn = random_tensors(piece.targets, seed=0)
    arrived = pull(piece.graph, piece.nodes, {n: piece.inputs(n) for n in piece.nodes},
                   dict(zip(piece.targets, drawn, strict=True)))  # fmt: skip
    w = torch.stack([_flat(t) for t in drawn])
    true = torch.stack([_flat(arrived[s]) if s in arrived else torch.zeros_like(w[0]) for s in piece.sources])
    A, U, B, V = (torch.tensor(np.array(x, dtype=float)) for x in (method.A, method.U, method.B, method.V))
    inputs: list[Tensor] = [torch.zeros_like(w[0])] * method.stages  # cotangents of what the stages are evaluated at
    for i in reversed(range(method.stages)):
        given = B[:, i] @ w + sum((A[m, i] * inputs[m] for m in range(i + 1, method.stages)), torch.zeros_like(w[0]))
        pulled = _pulled(piece, fields[i], given)
        if pulled is None:
            return None
        inputs[i] = pulled
    made = V.T @ w + (U.T @ torch.stack(inputs) if inputs else 0.0)
    size = float(true.norm())
    return float((true - made).norm()) / size if size else None


def _flat(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1).double().cpu()


def _pulled(piece: Piece, field: RecordedField, cotangent: Tensor) -> Tensor | None:
    """A cotangent of h times a field pulled back to where it is evaluated; None where their sizes differ."""
    graph = piece.graph
    source, target, edges = field.way(graph)
    meta = meta_of(target)
    if meta.numel != cotangent.numel() or meta_of(source).numel != cotangent.numel():
        return None
    given = cotangent.to(dtype=meta.dtype, device=meta.device).reshape(meta.shape)
    arrived = pull(graph, list(edges), edges, {target: given}).get(source)
    if arrived is None:
        return torch.zeros_like(cotangent)
    return _flat(arrived) / field.divisor - field.linear * cotangent
