"""The result of an eigenvalue or singular value computation: values with what is known about their errors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stabkit.results import Result

# Condition number squared times relative perturbation, above which an eigenvalue may be defective.
SIMPLE = 0.01


@dataclass(frozen=True, eq=False)
class Spectrum(Result):
    """Eigenvalues or singular values of a batch of operators, each with its residual and its flag.

    Attributes:
        values: ``(batch, k)``, complex128 for eigenvalues, float64 for singular values, on the CPU, in the
            order asked for (``which``). ``nan`` where nothing was found within the budget.
        residuals: ``(batch, k)``; for an eigenpair ``||J x - value x||`` with ``||x|| = 1``, for a singular
            triple ``sqrt((||J v - value u||^2 + ||J^T u - value v||^2) / 2)``, recomputed with products. Where most
            singular values of more than 512 are computed at once there are no vectors: then LAPACK's backward error.
        converged: ``(batch, k)``, True where the residual meets ``tol`` times the norm of the operator and
            the error bound shows that the value itself can be trusted.
        error_bounds: ``(batch, k)``, how far the value may be from an exact one, in the units of ``values``:
            the residual for singular values (Weyl), the residual times the condition number of the eigenvalue
            for eigenvalues; rounding in the products is included. ``inf`` where nothing is known.
        condition_numbers: ``(batch, k)``, of the eigenvalues: ``1 / |y^H x|`` for unit left and right
            eigenvectors; 1 for every singular value. The dense method gives them within the irreducible diagonal
            block of the eigenvalue, for perturbations that keep the zeros of the matrix.
        n_products: products with J or with its transpose, counted in vectors (per sample).
        method: ``"dense"``, ``"dense gram"``, ``"golub-kahan"`` or ``"krylov-schur"``.
        kind: ``"eigenvalues"`` or ``"singular values"``.
        which: the part of the spectrum that was asked for, or the target point as text.
        stopped: why the work ended: ``"done"``, ``"budget"``, or ``"interrupted"`` by the keyboard, which returns what
            was there. After the last two, values marked converged are values of J, but copies of them, and so ranks,
            may be missing, and condition numbers are those of the projected matrix.
        reason: why this method was taken.
        path: how the products are made.

    Example:
        >>> import torch
        >>> from stabkit.jacobians import eigenvalues
        >>> spectrum = eigenvalues(torch.diag(torch.tensor([3.0, 1.0, 2.0])), k=2)
        >>> spectrum.values.real.tolist()
        [[3.0, 2.0]]
        >>> bool(spectrum.converged.all())
        True
    """

    values: Tensor
    residuals: Tensor
    converged: Tensor
    error_bounds: Tensor
    condition_numbers: Tensor
    n_products: int
    method: str
    kind: str
    which: str
    stopped: str = "done"
    reason: str = ""
    path: str = ""


def trusted_values(
    residuals: np.ndarray,
    bounds: np.ndarray,
    conditions: np.ndarray,
    relative: np.ndarray,
    tol: float,
    norm: float,
) -> np.ndarray:
    """The residual meets the tolerance and first-order perturbation theory holds.

    A perturbation of relative size e splits a defective eigenvalue of index d >= 2 into values of condition
    number of about ``e ** -(1 - 1 / d) / d``: ``kappa ** 2 * e`` then reaches 1/4 or more, while it vanishes
    with e for a simple eigenvalue.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        simple = conditions**2 * relative <= SIMPLE
    trusted: np.ndarray = (residuals <= tol * norm) & simple & (bounds <= np.sqrt(tol) * norm)
    return trusted


def leading(converged: np.ndarray, settled: bool, *, extremal: bool) -> np.ndarray:
    """Before the search has settled, only the values ahead of the first open one, at an edge of the spectrum."""
    if settled:
        return converged
    return np.logical_and.accumulate(converged) if extremal else np.zeros_like(converged)


def row(
    values: np.ndarray,
    residuals: np.ndarray,
    bounds: np.ndarray,
    conditions: np.ndarray,
    converged: np.ndarray,
    unit: float = 1.0,
) -> dict[str, np.ndarray]:
    """One sample's columns of a Spectrum; ``unit``, what the operator was divided by before."""
    return {
        "values": values * unit,
        "residuals": residuals * unit,
        "converged": converged,
        "error_bounds": bounds * unit,
        "condition_numbers": conditions,
    }


def from_rows(
    rows: list[dict[str, np.ndarray]], k: int, kind: str, which: str, method: str, n_products: int, stopped: str
) -> Spectrum:
    """A Spectrum from the rows of its samples, each filled up to ``k`` where fewer values were found."""
    missing = {"values": np.nan, "residuals": np.inf, "converged": False, "error_bounds": np.inf}
    columns: dict[str, Any] = {}
    for name in rows[0]:
        dtype: type = {"values": complex if kind == "eigenvalues" else float, "converged": bool}.get(name, float)
        full: np.ndarray = np.full((len(rows), k), missing.get(name, np.nan), dtype=dtype)
        for s, row in enumerate(rows):
            full[s, : len(row[name])] = row[name][:k]
        columns[name] = torch.from_numpy(full)
    return Spectrum(**columns, n_products=n_products, method=method, kind=kind, which=which, stopped=stopped)
