"""One implicit step of x' = A x + u(t), whose linear system is solved: M x' = N x + h u, both sides of one matrix A.

    (1 - h theta A) x' = (1 + h (1 - theta) A) x + h u:   P = (1 + r) M^-1 - r,   r = (1 - theta) / theta.

What moves the state beside the matrix depends on the input alone, so this is no splitting into steps of several fields:
state-space models that are discretised step by step (Gu et al. 2021, LSSL: the bilinear rule).
"""

from __future__ import annotations

import torch
from torch import Tensor

from stabkit.identification.form.linear_parts import LinearParts
from stabkit.identification.form.operations import MOVES
from stabkit.identification.form.pieces import Piece, pull
from stabkit.identification.names.single import Name
from stabkit.identification.record import Identification, record_of
from stabkit.identification.steps.implicit import SOLVES, right_side
from stabkit.integrators import named
from stabkit.tracing.graph.values import Value, meta_of, operation, random_tensors

_ROUNDINGS = 2048.0  # solutions of linear systems that are not badly conditioned
_RULES = {1.0: "backward_euler", 0.5: "trapezoid"}


def driven_solve(piece: Piece, steps: tuple[int, ...]) -> Identification | None:
    """The record of a step of one state that solves one linear system and has no field; None for others."""
    if len(piece.sources) != 1 or sum(operation(node) in SOLVES for node in piece.nodes) != 1:
        return None
    source, target = piece.sources[0], piece.targets[0]
    parts = LinearParts(piece)
    solve = next((node for node in parts.ways if operation(node) in SOLVES), None)
    if solve is None or parts.has_field or parts.beside or meta_of(source).shape != meta_of(target).shape:
        return None
    w = random_tensors([target], seed=0)[0]
    whole = parts.pulled(w).get(source)
    since = {v: g for v, g in parts.pulled(w, since=solve).items() if v not in parts.joins}
    behind = _laid_out(piece, right_side(solve), since, meta_of(source).shape)
    if whole is None or behind is None:
        return None
    columns = torch.stack([behind.flatten(), w.flatten()], dim=1).double()
    alpha, beta = torch.linalg.lstsq(columns, whole.double().flatten()[:, None]).solution.flatten().tolist()
    fitted = columns @ torch.tensor([alpha, beta], dtype=torch.float64, device=columns.device)
    residual = float((fitted - whole.double().flatten()).norm() / whole.double().norm())
    slack = _ROUNDINGS * torch.finfo(meta_of(source).dtype).eps
    theta = 1 / alpha if alpha > 0 else 0.0
    if residual > slack or abs(alpha + beta - 1) > 10 * slack * abs(alpha) or not 0 < theta < 1 + slack:
        return None
    rule = next((rule for t, rule in _RULES.items() if abs(theta - t) <= 10 * slack), None)
    why = "one matrix stands on both sides of the linear system" if theta < 1 - 10 * slack else "M x' = x + h u"
    name = Name(rule or f"theta method, theta = {theta:.3g}", "x' = A x + u(t), the input held fixed", 1.0,
                "h = 1: M = 1 - h theta A")  # fmt: skip
    notes = (f"{why}: one implicit step of a linear system that the input drives",)
    record = record_of(name, None, steps, skip=None, residual=residual, notes=notes)
    method = None if rule is None else named(rule)
    return Identification(**{**vars(record), "method": method})


def _laid_out(piece: Piece, value: Value | None, pulled: dict[Value, Tensor], shape: tuple[int, ...]) -> Tensor | None:
    """The cotangent of a value, or of that of some shape which was moved to make it."""
    if value is None or value not in pulled or len(pulled) > 1:
        return None
    cotangent = pulled[value]
    while tuple(cotangent.shape) != tuple(shape) or (value.node in piece.inside and _squares(cotangent.shape, value)):
        inputs = [] if value in piece.ends or value.node not in piece.inside else piece.inputs(value.node)
        if len(inputs) != 1 or operation(value.node) not in MOVES:
            return None
        cotangent = pull(piece.graph, [value.node], {value.node: inputs}, {value: cotangent})[inputs[0]]
        value = inputs[0]
    return cotangent


def _squares(shape: tuple[int, ...], value: Value) -> bool:
    """Whether a value was transposed and shows it by no shape."""
    return operation(value.node) in MOVES and len(shape) > 1 and shape[-1] == shape[-2]
