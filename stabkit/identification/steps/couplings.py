"""Couplings (NICE, RealNVP): some coordinates stay; the others are scaled and moved by functions of these alone.

The coordinates may be split off and put back, or chosen by a mask of ones and zeros: m x + (1 - m) (x + f(m x)). In
autoregressive flows (Papamakarios et al. 2017) every coordinate is scaled and moved by functions of those before it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from graphlib import CycleError, TopologicalSorter

import torch
from torch import Tensor

from stabkit.identification.form.chain import Link
from stabkit.identification.form.coefficients import LinearCombination
from stabkit.identification.form.normal_form import NormalForm
from stabkit.identification.form.operations import is_affine
from stabkit.identification.form.pieces import Piece, pull
from stabkit.identification.names.systems import ADDITIVE_COUPLING, REVERSIBLE, couplings_in_turn
from stabkit.identification.record import Identification, nothing
from stabkit.tracing.graph.values import meta_of, operation, random_tensors

_ROUNDINGS = 64.0
_MOST_ROWS = 64  # coordinates of which every row of the Jacobian is taken
_EULER = "forward Euler"
_SEVERAL = "Lie splitting ("


def is_affine_coupling(piece: Piece) -> bool:
    """Whether x' = P (x_1, s(x_1) x_2 + t(x_1)) for some split of the coordinates, by products with random vectors.

    P is a permutation, as where both parts change places behind the step.
    """
    source, target = piece.sources[0], piece.targets[0]
    if meta_of(source).shape != meta_of(target).shape or target not in piece.carrying:
        return False
    ones = torch.ones(meta_of(target).shape, dtype=meta_of(target).dtype, device=meta_of(target).device)
    scales = piece.pull(piece.expand(target)[1], {target: ones}).get(source)
    if scales is None:
        return False
    stays = scales == 1
    places = _places(piece, scales) if bool(stays.any()) and not bool(stays.all()) else None
    if places is None:
        return False
    w = random_tensors([target], seed=0)[0]
    tolerance = _ROUNDINGS * torch.finfo(w.dtype).eps * float(w.norm())
    edges = {node: piece.inputs(node) for node in piece.nodes}
    pulled = []
    for mask in (stays, ~stays):
        given = torch.zeros_like(ones)
        given.view(-1)[places] = (w * mask).reshape(-1)
        pulled.append(pull(piece.graph, piece.nodes, edges, {target: given}).get(source))
    if pulled[0] is None or pulled[1] is None:
        return False
    apart = float((pulled[0] - w * stays).norm()) <= tolerance
    scaled = float(((pulled[1] - scales * w) * ~stays).norm()) <= tolerance * max(1.0, float(scales.abs().max()))
    return apart and scaled


def _places(piece: Piece, scales: Tensor) -> Tensor | None:
    """Where every entry of the old state stands in the new one, which it reaches with these factors; None if untold."""
    source, target = piece.sources[0], piece.targets[0]
    if not scales.is_floating_point() or not bool((scales != 0).all()):
        return None
    count, way = scales.numel(), piece.expand(target)[1]
    w = random_tensors([target], seed=0)[0]
    near = _ROUNDINGS * torch.finfo(w.dtype).eps * float(scales.abs().max()) * float(w.abs().max())
    if bool(((piece.pull(way, {target: w})[source] - scales * w).abs() <= near).all()):
        return torch.arange(count, device=scales.device)
    codes = torch.arange(1, count + 1, dtype=scales.dtype, device=scales.device).view(meta_of(target).shape)
    arrived = piece.pull(way, {target: codes})[source]
    found = (arrived / scales).reshape(-1).round().long() - 1
    inside = bool((found >= 0).all() and (found < count).all())
    return found if inside and len(torch.unique(found)) == count else None


def is_autoregressive(piece: Piece) -> bool:
    """Whether x_i' = s_i x_i + t_i, with s_i and t_i functions of coordinates before x_i in some order of them.

    Then the Jacobian is triangular in that order, and its diagonal is what multiplies the state. Rows of it are
    products with unit vectors, on all samples at once. Of most gated steps two show that there is no such order.
    """
    source, target = piece.sources[0], piece.targets[0]
    meta = meta_of(target)
    n = meta.numel // meta.shape[0] if meta.shape and meta.shape[0] else 0
    if meta_of(source).shape != meta.shape or target not in piece.carrying or not 2 <= n <= _MOST_ROWS:
        return False
    ones = torch.ones(meta.shape, dtype=meta.dtype, device=meta.device)
    scales = piece.pull(piece.expand(target)[1], {target: ones}).get(source)
    edges = {node: piece.inputs(node) for node in piece.nodes}
    if scales is None or not meta.dtype.is_floating_point:
        return False
    near = _ROUNDINGS * torch.finfo(meta.dtype).eps * float(scales.abs().max())
    before: dict[int, set[int]] = {}
    left = [0]
    while len(before) < n:
        i = left.pop() if left else next(i for i in range(n) if i not in before)
        if i in before:
            continue
        unit = torch.zeros(meta.shape, dtype=meta.dtype, device=meta.device)
        unit.reshape(meta.shape[0], n)[:, i] = 1.0
        row = pull(piece.graph, piece.nodes, edges, {target: unit}).get(source)
        if row is None:
            return False
        flat, own = row.reshape(meta.shape[0], n), scales.reshape(meta.shape[0], n)[:, i]
        if bool(((flat[:, i] - own).abs() > near).any()):
            return False
        before[i] = {j for j in torch.nonzero((flat.abs() > near).any(dim=0)).reshape(-1).tolist() if j != i}
        if any(i in before.get(j, ()) for j in before[i]):
            return False
        left += [j for j in before[i] if j not in before][:1]
    return any(before.values()) and _has_order(before)


def _has_order(before: dict[int, set[int]]) -> bool:
    """Whether there is an order in which each comes behind those before it."""
    try:
        tuple(TopologicalSorter(before).static_order())
    except CycleError:
        return False
    return True


def scaled_coordinates(piece: Piece, steps: tuple[int, ...]) -> Identification | None:
    """The record of an affine coupling, or of an autoregressive map; None for other gated steps."""
    if is_affine_coupling(piece):
        name, system = "affine coupling", "x_2' = a(x_1) x_2 + b(x_1), x_1' = 0"
        why = "some coordinates stay as they are, and scale and move the others"
    elif is_autoregressive(piece):
        name, system = "autoregressive affine map (MAF, IAF)", "x_i' = a_i(x_<i) x_i + b_i(x_<i)"
        why = "every coordinate is scaled and moved by functions of those before it: the Jacobian is triangular"
    else:
        return None
    return nothing(steps, name, why, "measured", system=system)


def with_couplings(record: Identification, sums: Sequence[NormalForm]) -> Identification:
    """A record of additions each of which moves some coordinates by functions of others alone, as couplings."""
    if record.after or not (record.name == _EULER or (record.name.startswith(_SEVERAL) and "Euler" in record.name)):
        return record
    masks = [_moved(form) for form in sums]
    moved = [mask for mask in masks if mask is not None]
    in_turn = not any(bool((a & b).any()) for a, b in itertools.pairwise(moved))
    again = all(bool((a == b).all()) for a, b in zip(moved, moved[2:], strict=False))
    if len(moved) < len(masks) or not moved or not in_turn or not again:
        return record
    name, system = {
        1: (ADDITIVE_COUPLING, "p' = F(q), q' = 0"),
        2: (REVERSIBLE, "p' = F(q), q' = G(p)"),
    }.get(len(moved), (couplings_in_turn(len(moved)), "p' = F_i(q), q' = G_i(p)"))
    why = "some coordinates move, by functions of those that stay"
    return replace(record, name=name, system=system, notes=(why, *record.notes), evidence="measured")


def _moved(form: NormalForm) -> Tensor | None:
    """Which coordinates an addition moves, where it moves some by functions of others alone; None elsewhere."""
    (source,), (target,), terms, piece = form.sources, form.targets, form.forms[0], form.piece
    kept = terms.get(source)
    added = [atom for atom in terms if atom not in piece.ends]
    if kept is None or kept.kind != "scalar" or kept.value != 1.0 or not added or len(added) + 1 < len(terms):
        return None
    meta = meta_of(target)
    combination, w = LinearCombination(piece, target), random_tensors([target], seed=0)[0]
    if meta_of(source).numel != meta.numel or any(atom not in combination.factors for atom in added):
        return None
    arrived = piece.pull(combination.path, {target: w})
    written = torch.zeros(meta.shape, dtype=torch.bool, device=meta.device)
    for atom in added:
        if meta_of(atom).shape == meta.shape:
            written = written | (combination.factors[atom] != 0)
        else:  # entries that are put into places of their own: random numbers tell which
            written = written | torch.isin(w * terms[atom].value, arrived[atom].contiguous())
    if bool(written.all()) or not bool(written.any()):
        return None
    near = _ROUNDINGS * torch.finfo(w.dtype).eps * float(w.abs().max())
    edges = {node: piece.inputs(node) for node in piece.nodes}
    whole, rest = (pull(piece.graph, piece.nodes, edges, {target: t}).get(source) for t in (w, w * ~written))
    if whole is None or rest is None:
        return None
    whole, rest = whole.reshape(meta.shape), rest.reshape(meta.shape)  # every entry of the state keeps its place
    if bool(((rest - w * ~written).abs() > near).any()):
        return None
    read = (whole - w).abs() > near
    return written if bool(read.any()) and not bool((read & written).any()) else None


def mixed_coupling(links: Sequence[Link], steps: tuple[int, ...]) -> Identification | None:
    """An affine coupling with linear maps of one size before or after it (Glow); None for anything else."""
    added = [i for i, link in enumerate(links) if link.kind == "sum"]
    if len(added) != 1 or len(links) < 2:
        return None
    (at,) = added
    form = links[at].form
    around = [node for link in (*links[:at], *links[at + 1 :]) for node in link.form.piece.nodes]
    sizes = {meta_of(value).shape for link in links for value in (*link.form.sources, *link.form.targets)}
    kept = form.forms[0].get(form.sources[0])
    if len(sizes) > 1 or not all(is_affine(node, 1) for node in around) or kept is None or kept.kind != "gate":
        return None
    if not is_affine_coupling(form.piece):
        return None
    where = " and ".join(["after"] * (at > 0) + ["before"] * (at + 1 < len(links)))
    maps = ", ".join(dict.fromkeys(operation(node) for link in links if link.kind == "map" for node in link.nodes))
    why = f"beside a linear map ({maps}) some coordinates z stay as they are, and scale and move the others"
    system = "z_2' = a(z_1) z_2 + b(z_1), z_1' = 0, and a linear map"
    return nothing(steps, f"affine coupling ({where} a linear map)", why, "measured", system=system)
