"""Fields that average: x' = A x - x with rows of A that sum to one, as in diffusion on a graph (GRAND)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from stabkit.identification.form.normal_form import NormalForm, Stage, stage_vjp
from stabkit.identification.form.operations import MOVES
from stabkit.identification.form.pieces import Piece
from stabkit.identification.form.tableau import Blocks
from stabkit.identification.names.single import Name
from stabkit.identification.steps.around_addition import GATED
from stabkit.tracing.graph.values import Value, meta_of, operation, random_tensors

_ROUNDINGS = 1e3


def _averages(piece: Piece, stage: Stage) -> bool:
    """Whether a stage multiplies the state by a matrix whose rows sum to one: a constant one, or that of an attention.

    A constant matrix, however it is applied (dense, sparse, by indices), is known by leaving a constant state alone:
    <w, A 1> = <w, 1> for random w. That of an attention depends on the state, and is looked at itself.
    """
    if len(stage.entries) == 1 and stage.is_affine:
        return _leaves_constants(piece, stage)
    last = [node for node in stage.nodes if operation(node) not in MOVES][-1:]
    if not last or operation(last[0]) not in ("Mm", "Bmm"):
        return False
    node: Any = last[0]
    parent, output = node.next_functions[1]
    matrix = node._saved_self
    if parent is None or not isinstance(matrix, Tensor):
        return False
    read = piece.expand(Value(parent, output))[0]
    sums = matrix.detach().sum(dim=-1)
    tolerance = _ROUNDINGS * torch.finfo(matrix.dtype).eps
    return read == list(piece.sources) and bool((matrix >= 0).all()) and bool(((sums - 1).abs() <= tolerance).all())


def _leaves_constants(piece: Piece, stage: Stage) -> bool:
    entry = stage.entries[0]
    if meta_of(entry).shape != meta_of(stage.output).shape:
        return False
    for w in (random_tensors([stage.output], seed)[0] for seed in range(2)):
        pulled = stage_vjp(piece, stage, w).get(entry)
        slack = _ROUNDINGS * torch.finfo(w.dtype).eps * float(w.norm()) * w.numel() ** 0.5
        if pulled is None or abs(float(pulled.sum() - w.sum())) > slack:
            return False
    return True


def as_diffusion(name: Name, sums: Sequence[NormalForm], table: Blocks) -> Name:
    """A step towards an average of the state over its neighbours."""
    relaxes = len(table.rows) == 1 and abs(float(table.V[0, 0]) + name.h - 1.0) <= GATED
    if not relaxes or not _averages(sums[0].piece, table.rows[0]):
        return name
    system = f"x' = A x - x, diffusion (rows of A sum to one), Euler with h = {name.h:.3g}"
    return replace(name, system=system)
