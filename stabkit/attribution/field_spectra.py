"""z = h eig(J_f): the Jacobians of a method's fields where they were evaluated, and their joint spectrum.

The stability function at these z is a prediction: R(h J_f) need not be the Jacobian of the step, since the stages are
evaluated at different points and different fields need not commute. How far it is from the step is measured. A root of
R(z) = eig(J) would agree with the step by construction, and explain nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from stabkit.attribution.mechanism import ComplexArray, FloatArray
from stabkit.errors import TraceError
from stabkit.identification import Identification
from stabkit.integrators import GeneralLinearMethod
from stabkit.tracing import Step

_READ = 1e-3  # by how much of its norm the step may differ from what its stages make of it
_COMMUTE = 1e-8  # by how much of its norm a field may miss to be diagonal beside another


@dataclass(frozen=True, eq=False)
class FieldJacobians:
    """The Jacobians of a step's fields.

    Attributes:
        method: the method of the step.
        stages: ``(stages, samples, n, n)``, h J_f at every stage.
        fields: ``(fields, samples, n, n)``, their means over the stages of each field.
        spread: the largest |J_i - mean|_F / |mean|_F of a stage: how much the field's Jacobian changes in the step.
    """

    method: GeneralLinearMethod
    stages: FloatArray
    fields: FloatArray
    spread: float


@dataclass(frozen=True, eq=False)
class FieldSpectrum:
    """z of every mode for every field, and what the method makes of it.

    Attributes:
        z: ``(fields, samples, k)``; the modes of several fields belong together.
        values: ``(samples, k * states)``, what a step multiplies them by.
        rates: ``(samples, k * states)``, z of the whole system: a mode with Re > 0 grows in continuous time too.
        defect: |J - R(h J_f)|_F / |J|_F, the largest over samples; NaN for several states.
        commutator: how far several fields are from sharing modes, relative; 0 where they do, and for one field.
        exact: whether ``values`` is the spectrum of the step itself rather than R(z).
    """

    z: ComplexArray
    values: ComplexArray
    rates: ComplexArray
    defect: float
    commutator: float
    exact: bool


def field_jacobians(step: Step, found: Identification, samples: int, J: FloatArray) -> FieldJacobians | str:
    """The Jacobians of all fields of a small step, or why there are none.

    Args:
        step: the step of the flow.
        found: its method, of several stages.
        samples: how many, from the first.
        J: ``(samples, d, d)``, of the step before its tail.
    """
    method = found.method
    if not isinstance(method, GeneralLinearMethod) or not found.recorded or None in found.recorded:
        return "where its fields are evaluated cannot be told"
    matrices = []
    for field in found.recorded:
        assert field is not None
        try:
            products = field.products(step)
            n = products.target.size
            eye = torch.eye(n, dtype=products.target.dtype, device=products.target.device)
            rows = products.backward(eye.expand(products.target.batch, n, n))[:samples]
        except (TraceError, RuntimeError) as error:
            return f"its fields cannot be differentiated: {str(error).splitlines()[0]}"
        matrix = rows.detach().to(device="cpu", dtype=torch.float64).transpose(1, 2).numpy() / field.divisor
        if matrix.shape[1] != matrix.shape[2]:
            return "its fields lead from one space to another"
        matrices.append(matrix - field.linear * np.eye(n))
    if len({m.shape for m in matrices}) != 1 or matrices[0].shape[1] * method.states != J.shape[1]:
        return "its fields act on parts of the state"
    stages = np.stack(matrices)
    numbers = np.asarray(method.fields)
    fields = np.stack([stages[numbers == k].mean(0) for k in range(method.n_fields)])
    if not np.isfinite(stages).all():
        return "the Jacobians of its fields are not finite"
    rebuilt = _distance(J, rebuild(method, stages)) if method.states == 1 else math.nan
    if rebuilt > _READ:
        return f"the tableau makes another step of its fields ({rebuilt:.1e} of the norm of J away)"
    sizes = np.linalg.norm(fields[numbers], axis=(2, 3))
    away = np.linalg.norm(stages - fields[numbers], axis=(2, 3))
    spread = float((away / np.where(sizes > 0, sizes, 1.0)).max())
    return FieldJacobians(method, stages, fields, spread)


def rebuild(method: GeneralLinearMethod, stages: FloatArray) -> FloatArray:
    """The Jacobian ``(samples, n, n)`` of a step of one state, from those of its stages ``(stages, samples, n, n)``.

    K_i = h J_i (U_i + sum_m A_im K_m) and J = V + sum_i B_i K_i, solved for all K at once where the method is implicit.
    """
    s, samples, n, _ = stages.shape
    eye = np.eye(n)
    if method.is_explicit:
        K: list[FloatArray] = []
        for i in range(s):
            Y = method.U[i, 0] * eye + sum((method.A[i, m] * K[m] for m in range(i) if method.A[i, m]), 0.0 * eye)
            K.append(stages[i] @ Y)
        return np.asarray(method.V[0, 0] * eye + sum(method.B[0, i] * K[i] for i in range(s)))
    big = np.eye(s * n) - np.concatenate([np.kron(method.A[i], stages[i]) for i in range(s)], axis=1)
    right = np.concatenate([method.U[i, 0] * stages[i] for i in range(s)], axis=1)
    solved = np.linalg.solve(big, right).reshape(samples, s, n, n)
    return np.asarray(method.V[0, 0] * eye + np.einsum("i,bijk->bjk", method.B[0], solved))


def _distance(J: FloatArray, predicted: FloatArray) -> float:
    size = np.linalg.norm(J, axis=(1, 2))
    return float((np.linalg.norm(J - predicted, axis=(1, 2)) / np.where(size > 0, size, 1.0)).max())


def field_spectrum(found: FieldJacobians, J: FloatArray, *, second_order: bool) -> FieldSpectrum | str:
    """The joint spectrum of the fields, or why there is none.

    Args:
        found: from `field_jacobians`.
        J: ``(samples, d, d)``, of the step.
        second_order: whether the system is x'' = f(x), with z = h^2 eig(J_f).
    """
    method = found.method
    if method.n_fields == 1:
        z = np.linalg.eigvals(found.fields[0]).astype(complex)
        values = np.asarray(np.linalg.eigvals(method.stability_matrix(z)).reshape(len(z), -1), dtype=complex)
        rates = np.repeat(np.sqrt(z) if second_order else z, method.states, axis=-1)
        defect = _distance(J, rebuild(method, found.fields[[0] * method.stages])) if method.states == 1 else math.nan
        return FieldSpectrum(z[None], values, rates, defect, 0.0, False)
    if method.states == 1:
        return _of_one_state(found, J)
    return _of_two_streams(found)


def _of_one_state(found: FieldJacobians, J: FloatArray) -> FieldSpectrum:
    """Several fields of one state: in modes that they share, or else in those of the step."""
    method, fields = found.method, found.fields
    weights = np.sqrt(np.arange(2, 2 + len(fields)))  # some combination of the fields, no special one
    _, X = np.linalg.eig(np.einsum("f,fbij->bij", weights, fields))
    z, missed = _in_modes(fields, X)
    shared = missed <= _COMMUTE
    if not shared:
        values, X = np.linalg.eig(J)
        z, _ = _in_modes(fields, X)
    else:
        values = method.stability_matrix(*z)[..., 0, 0]
    share = [method.B[0, np.asarray(method.fields) == k].sum() for k in range(len(fields))]
    rates = np.einsum("f,fbk->bk", share, z)
    defect = _distance(J, rebuild(method, fields[list(method.fields)]))
    return FieldSpectrum(z, values.astype(complex), rates, defect, 0.0 if shared else _commutator(fields), not shared)


def _in_modes(fields: FloatArray, X: ComplexArray) -> tuple[ComplexArray, float]:
    """The diagonals of X^-1 J X, and the largest relative norm of what lies beside one."""
    try:
        inside = np.linalg.solve(X, fields @ X)
    except np.linalg.LinAlgError:
        return np.full(fields.shape[:3], complex(math.nan, math.nan)), math.inf
    z = np.diagonal(inside, axis1=2, axis2=3).astype(complex)
    beside = inside - z[..., None] * np.eye(inside.shape[-1])
    sizes = np.linalg.norm(inside, axis=(2, 3))
    return z, float((np.linalg.norm(beside, axis=(2, 3)) / np.where(sizes > 0, sizes, 1.0)).max())


def _commutator(fields: Sequence[FloatArray] | FloatArray) -> float:
    """The largest |[F, G]|_F / (|F|_F |G|_F) of two fields."""
    largest = 0.0
    for i, F in enumerate(fields):
        for G in fields[i + 1 :]:
            sizes = np.linalg.norm(F, axis=(1, 2)) * np.linalg.norm(G, axis=(1, 2))
            away = np.linalg.norm(F @ G - G @ F, axis=(1, 2))
            largest = max(largest, float((away / np.where(sizes > 0, sizes, 1.0)).max()))
    return largest


def _of_two_streams(found: FieldJacobians) -> FieldSpectrum | str:
    """P' = F(q), q' = G(p): only the product of the two is seen, so that both take its root."""
    method = found.method
    reads = [np.flatnonzero(row).tolist() for row in method.U]
    writes = [np.flatnonzero(column).tolist() for column in method.B.T]
    crossed = method.states == method.stages == method.n_fields == 2 and all(len(r) == 1 for r in reads)
    if not crossed or reads[0] == reads[1] or any(set(r) & set(w) for r, w in zip(reads, writes, strict=True)):
        return f"{method.n_fields} fields of {method.states} states have no joint spectrum"
    root = np.sqrt(np.linalg.eigvals(found.fields[0] @ found.fields[1]).astype(complex))
    values = np.asarray(np.linalg.eigvals(method.stability_matrix(root, root)).reshape(len(root), -1), dtype=complex)
    return FieldSpectrum(np.stack([root, root]), values, np.repeat(root, 2, axis=-1), math.nan, 0.0, False)
