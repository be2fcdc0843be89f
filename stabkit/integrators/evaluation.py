"""M(z) = V + B Z (I - A Z)^-1 U at many z, in chunks that stay in cache."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from stabkit.integrators.spectral_radius import ComplexArray, FloatArray

_CHUNK = 4096


def evaluate(
    tableau: tuple[FloatArray, FloatArray, FloatArray, FloatArray],
    fields: Sequence[int],
    points: Sequence[ComplexArray],
) -> ComplexArray:
    """The stability matrices of a tableau.

    Stages that follow from earlier ones are found by substitution, which is as accurate as the method itself; only
    fully implicit tableaux are solved as linear systems.

    Args:
        tableau: A, U, B, V as floats.
        fields: the field of each stage.
        points: z for each field, all of one shape ``(...)``.

    Returns:
        ``(..., r, r)``; ``inf`` at a pole.
    """
    r = len(tableau[3])
    shape = points[0].shape
    flat = [p.reshape(-1) for p in points]
    out = np.empty((flat[0].size, r, r), dtype=complex)
    solver = _by_substitution if not np.any(np.triu(tableau[0], 1)) else _by_elimination
    with np.errstate(all="ignore"):
        for first in range(0, len(out), _CHUNK):
            part = slice(first, first + _CHUNK)
            out[part] = solver(tableau, [flat[f][part] for f in fields], len(out[part]))
    out[~np.isfinite(out).all(axis=(1, 2))] = np.inf
    return out.reshape(*shape, r, r)


def _by_substitution(
    tableau: tuple[FloatArray, FloatArray, FloatArray, FloatArray], z: Sequence[ComplexArray], n: int
) -> ComplexArray:
    A, U, B, V = tableau
    slopes: list[ComplexArray] = []  # z_j Y_j, each (r, n)
    for i, row in enumerate(A):
        Y = np.repeat(U[i][:, None].astype(complex), n, axis=1)
        for j in np.flatnonzero(row[:i]):
            Y += row[j] * slopes[j]
        if row[i]:
            Y /= 1 - row[i] * z[i]
        Y *= z[i]
        slopes.append(Y)
    M = np.repeat(V[:, :, None].astype(complex), n, axis=2)
    for i, row in enumerate(B):
        for j in np.flatnonzero(row):
            M[i] += row[j] * slopes[j]
    return np.moveaxis(M, 2, 0)


def _by_elimination(
    tableau: tuple[FloatArray, FloatArray, FloatArray, FloatArray], z: Sequence[ComplexArray], n: int
) -> ComplexArray:
    A, U, B, V = tableau
    Z = np.stack(list(z), axis=-1)  # (n, s)
    system: ComplexArray = np.eye(len(A)) - A * Z[:, None, :]
    singular = np.linalg.det(system) == 0
    system[singular] = np.eye(len(A))
    Y = np.asarray(np.linalg.solve(system, np.broadcast_to(U.astype(complex), (n, *U.shape))), dtype=complex)
    M: ComplexArray = V + B @ (Z[:, :, None] * Y)
    M[singular] = np.inf
    return M
