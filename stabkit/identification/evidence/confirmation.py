"""Numerical confirmations of a reading: commutators, determinants, symmetry, and how far R(h J) is from the step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stabkit.identification.form.normal_form import NormalForm, stage_vjp
from stabkit.identification.form.tableau import Blocks
from stabkit.tracing import Flow
from stabkit.tracing.graph.values import meta_of, probes_of, random_tensors

_LARGEST_DENSE = 512
_ADJOINT = 1e-3  # two ratios of inner products in single precision; of two fields that are none they differ at will


@dataclass(frozen=True)
class Check:
    """One numerical confirmation.

    Attributes:
        name: what was measured.
        value: the number.
        meaning: how to read it.
    """

    name: str
    value: float
    meaning: str


def branch_vjp(form: NormalForm, cotangent: Tensor) -> Tensor:
    """J_f^T w of all that one sum adds to its state: the state's own path is left out."""
    piece, target, source = form.piece, form.targets[0], form.sources[0]
    total = torch.zeros(meta_of(source).shape, dtype=cotangent.dtype, device=cotangent.device)
    atoms, path = piece.expand(target)
    at_atoms = piece.pull(path, {target: cotangent.to(meta_of(target).dtype)})
    pending = {a: at_atoms[a] for a in atoms if a in at_atoms and a not in piece.ends}
    for stage in reversed(form.stages):
        given = pending.pop(stage.output, None)
        if given is None:
            continue
        arrived = stage_vjp(piece, stage, given)
        for entry in stage.entries:
            if entry not in arrived:
                continue
            below = piece.pull(piece.expand(entry)[1], {entry: arrived[entry]}) if entry not in piece.ends else arrived
            for atom, grad in below.items():
                if atom == source:
                    total = total + grad
                elif atom not in piece.ends and atom != stage.output:
                    pending[atom] = pending[atom] + grad if atom in pending else grad
    return total


def commutator(forms: Sequence[NormalForm]) -> Check:
    """||[J_F, J_G]||_F / (||J_F||_F ||J_G||_F) of the first two fields of a splitting, estimated with random vectors.

    Zero means that the order of the two does not matter, and that the splitting has no error of its own.
    """
    first, second = forms[0], forms[1]
    numerator, norms = 0.0, [0.0, 0.0]
    probes = probes_of(meta_of(first.targets[0]).numel)  # each costs four products with a branch
    for probe in range(probes):
        w = random_tensors([first.targets[0]], probe)[0]
        u = w.reshape(meta_of(second.targets[0]).shape)
        f = branch_vjp(first, w).reshape(w.shape)
        g = branch_vjp(second, u).reshape(w.shape)
        fg = branch_vjp(second, f.reshape(u.shape)).reshape(w.shape)
        gf = branch_vjp(first, g).reshape(w.shape)
        numerator += float((fg - gf).double().square().sum())
        norms[0] += float(f.double().square().sum())
        norms[1] += float(g.double().square().sum())
    scale = math.sqrt(norms[0] * norms[1]) / math.sqrt(probes)
    value = math.sqrt(numerator) / scale if scale > 0 else 0.0
    return Check("commutator", value, f"||[J_F, J_G]|| / (||J_F|| ||J_G||), Frobenius, {_vectors(probes)}")


def volume(flow: Flow, start: int, stop: int) -> Check | None:
    """log|det J| per coordinate, which is 0 for a reversible coupling; None for states too large for a determinant."""
    J = flow.jacobian(start, stop)
    batch, m, n = J.shape
    if m != n or n > _LARGEST_DENSE:
        return None
    logs = torch.linalg.slogdet(J.dense().double())[1]
    return Check(
        "log|det J|", float(logs.abs().max()) / n, f"largest of {batch} samples, per coordinate; 0 preserves volume"
    )


def is_symmetric(form: NormalForm) -> bool | None:
    """Whether the Jacobian of every stage is symmetric, as that of a gradient is; None where that makes no sense."""
    for stage in form.stages:
        if len(stage.entries) != 1 or meta_of(stage.entries[0]).numel != meta_of(stage.output).numel:
            return None
        u, v = random_tensors([stage.output, stage.output], seed=0)
        at = [stage_vjp(form.piece, stage, w).get(stage.entries[0]) for w in (u, v)]
        if at[0] is None or at[1] is None:
            return None
        left, right = (float((a.reshape(-1) * b.reshape(-1)).sum()) for a, b in ((at[0], v), (at[1], u)))
        scale = float(at[0].norm() * v.norm())
        if scale == 0.0:
            return None  # saturated: a Jacobian of zeros tells nothing
        if abs(left - right) > 1e3 * torch.finfo(meta_of(stage.output).dtype).eps * scale:
            return False
    return True


def are_adjoint(form: NormalForm) -> bool:
    """Whether the Jacobians of two stages are the adjoint of each other, but for a number: K x and K* y."""
    if len(form.stages) != 2 or any(len(stage.entries) != 1 for stage in form.stages):
        return False
    first, second = form.stages
    sizes = [(meta_of(stage.entries[0]).numel, meta_of(stage.output).numel) for stage in form.stages]
    if sizes[0] != sizes[1][::-1] or any(meta_of(stage.output).dtype.is_complex for stage in form.stages):
        return False
    ratios = []
    for seed in range(2):
        w, v = random_tensors([first.output, second.output], seed)
        at = stage_vjp(form.piece, first, w).get(first.entries[0])
        other = stage_vjp(form.piece, second, v).get(second.entries[0])
        if at is None or other is None:
            return False
        left, right = (float((a.reshape(-1) * b.reshape(-1)).sum()) for a, b in ((other, w), (at, v)))
        ratios.append(left / right if right else math.nan)
    return abs(ratios[0] - ratios[1]) <= _ADJOINT * abs(ratios[0])


def defect(form: NormalForm, found: Blocks) -> Check | None:
    """||J - R(h J_f)|| / ||J||: how far the stability function at the first stage's Jacobian is from the step itself.

    It is zero for a linear field, since all stages then have one Jacobian.
    """
    piece, first = form.piece, form.stages[0]
    sizes = {meta_of(v).numel for v in (first.output, *first.entries, *form.targets)}
    if len(first.entries) != 1 or len(sizes) > 1:
        return None
    coefficients, row = [float(found.V[0, 0])], found.B[0]
    for _ in found.rows:
        coefficients.append(float(row @ found.U[:, 0]))
        row = row @ found.A
    difference, size = 0.0, 0.0
    probes = probes_of(meta_of(form.targets[0]).numel)
    for probe in range(probes):
        w = random_tensors([form.targets[0]], probe)[0]
        whole = branch_vjp(form, w) + float(found.V[0, 0]) * w.reshape(meta_of(form.sources[0]).shape)
        power, total = w.reshape(-1), coefficients[0] * w.reshape(-1)
        for c in coefficients[1:]:
            pulled = stage_vjp(piece, first, power.reshape(meta_of(first.output).shape))
            power = pulled[first.entries[0]].reshape(-1)
            total = total + c * power
        difference += float((whole.reshape(-1) - total).double().square().sum())
        size += float(whole.double().square().sum())
    value = math.sqrt(difference / size) if size > 0 else 0.0
    return Check("defect of R(h J_f)", value, f"||J - R(h J_f)|| / ||J||, Frobenius, {_vectors(probes)}")


def _vectors(count: int) -> str:
    return "1 random vector" if count == 1 else f"{count} random vectors"


def checks_of(sums: Sequence[NormalForm], table: Blocks) -> tuple[Check, ...]:
    """What is measured beside the reading of one state: how fields commute, how far off a method is."""
    found: list[Check] = []
    if len(sums) > 1 and table.n_fields > 1:
        found.append(commutator(sums))
    if len(sums) == 1 and table.shared and table.n_fields == 1 and sums[0].stages:
        measured = defect(sums[0], table)
        if measured is not None:
            found.append(measured)
        b = table.B[0] / (table.B[0].sum() or 1.0)
        c = (table.A / (table.B[0].sum() or 1.0)).sum(axis=1)
        found.append(Check("b.c - 1/2", float(b @ c - 0.5), "condition of order 2; b sums to 1 by the choice of h"))
    return tuple(found)
