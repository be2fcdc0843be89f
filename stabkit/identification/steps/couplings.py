"""Affine couplings (RealNVP): some coordinates stay; the others are scaled and moved by functions of these alone."""

from __future__ import annotations

import torch

from stabkit.identification.form.pieces import Piece
from stabkit.tracing import Flow
from stabkit.tracing.graph.values import meta_of, random_tensors

_ROUNDINGS = 64.0


def is_affine_coupling(flow: Flow, start: int, stop: int, piece: Piece) -> bool:
    """Whether x' = (x_1, s(x_1) x_2 + t(x_1)) for some split of the coordinates, by products with random vectors."""
    source, target = piece.sources[0], piece.targets[0]
    if meta_of(source).shape != meta_of(target).shape or target not in piece.carrying:
        return False
    ones = torch.ones(meta_of(target).shape, dtype=meta_of(target).dtype, device=meta_of(target).device)
    scales = piece.pull(piece.expand(target)[1], {target: ones}).get(source)
    if scales is None:
        return False
    stays = scales == 1
    if bool(stays.all()) or not bool(stays.any()):
        return False
    segment = flow.steps[start].segment if stop == start + 1 else None
    if segment is None or segment.target != (target,) or segment.source != (source,):
        return False
    w = random_tensors([target], seed=0)[0]
    tolerance = _ROUNDINGS * torch.finfo(w.dtype).eps * float(w.norm())
    kept, moved = (segment.vjp([w * mask])[0] for mask in (stays, ~stays))
    apart = float((kept - w * stays).norm()) <= tolerance
    scaled = float(((moved - scales * w) * ~stays).norm()) <= tolerance * max(1.0, float(scales.abs().max()))
    return apart and scaled
