"""Matrices whose spectra are easily got wrong. As a script: errors, residuals and flags beside scipy's answer.

python -m tests.jacobians.hard_matrices [n] [auto | dense | iterative]

Errors are those of the worst of the 6 values asked for, in units of the largest singular value: the distance to the
spectrum, or the difference in rank where that is larger. ``bound`` is the largest error bound of a value that is
flagged as converged, ``flag`` how many are.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy.linalg
import scipy.sparse.linalg
import torch

from stabkit.jacobians import Jacobian, Spectrum, eigenvalues, from_dense, singular_values


@dataclass(frozen=True)
class HardMatrix:
    """A matrix, its eigenvalues where they are known in closed form, and its singular values where they are."""

    name: str
    A: np.ndarray
    eigenvalues: np.ndarray | None = None
    singular_values: np.ndarray | None = None

    def true_eigenvalues(self) -> np.ndarray:
        return scipy.linalg.eigvals(self.A) if self.eigenvalues is None else self.eigenvalues

    def true_singular_values(self) -> np.ndarray:
        return scipy.linalg.svdvals(self.A) if self.singular_values is None else self.singular_values


def orthogonal(rng: np.random.Generator, n: int) -> np.ndarray:
    return np.linalg.qr(rng.standard_normal((n, n)))[0]


def grcar(n: int) -> np.ndarray:
    return np.triu(np.tril(np.ones((n, n)), 3)) - np.diag(np.ones(n - 1), -1)


def hard_matrices(n: int) -> list[HardMatrix]:
    rng = np.random.default_rng(0)
    Q, P = orthogonal(rng, n), orthogonal(rng, n)
    G = rng.standard_normal((n, n)) / np.sqrt(n)
    jordan = 0.9 * np.eye(n) + np.diag(np.ones(n - 1), 1)
    fivefold = np.concatenate([[5.0] * 5, [3.0] * 2, [2.0], rng.uniform(-1, 1, n - 8)])
    X = np.eye(n) + 0.3 * rng.standard_normal((n, n)) / np.sqrt(n)
    logspaced = np.logspace(0, -12, n)
    blocks = [np.array([[2.0, 1.0], [0.0, 2.0]]), np.array([[1.5, 1.0, 0.0], [0.0, 1.5, 1.0], [0.0, 0.0, 1.5]])]
    rest = np.arange(n - 5) / n
    u, v = rng.standard_normal((2, n))
    return [
        HardMatrix("orthogonal", Q, singular_values=np.ones(n)),
        HardMatrix("identity", np.eye(n), np.ones(n), np.ones(n)),
        HardMatrix("zero", np.zeros((n, n)), np.zeros(n), np.zeros(n)),
        HardMatrix("identity + noise", np.eye(n) + 1e-2 * G),
        HardMatrix("fivefold symmetric", Q @ np.diag(fivefold) @ Q.T, fivefold, np.sort(np.abs(fivefold))[::-1]),
        HardMatrix("fivefold", X @ np.diag(fivefold) @ np.linalg.inv(X), fivefold),
        HardMatrix("every value three times", np.kron(np.eye(3), G[: n // 3, : n // 3])),
        HardMatrix("Grcar", grcar(n)),
        HardMatrix("Jordan", jordan, np.full(n, 0.9)),
        HardMatrix("Jordan rotated", Q @ jordan @ Q.T, np.full(n, 0.9)),
        HardMatrix(
            "defective",
            Q @ scipy.linalg.block_diag(*blocks, np.diag(rest)) @ Q.T,
            np.array([2, 2, 1.5, 1.5, 1.5, *rest]),
        ),
        HardMatrix("skew", G - G.T),
        HardMatrix("Ginibre", G),
        HardMatrix("logspaced", Q @ np.diag(logspaced) @ P.T, singular_values=logspaced),
        HardMatrix("nilpotent shift", np.diag(np.ones(n - 1), 1), np.zeros(n)),
        HardMatrix("nilpotent rotated", Q @ np.triu(G, 1) @ Q.T, np.zeros(n)),
        HardMatrix("rank one", np.outer(u, v) / n, np.append(u @ v / n, np.zeros(n - 1))),
    ]


def operator(A: np.ndarray, dtype: torch.dtype = torch.float64) -> Jacobian:
    """An operator that nobody can recognise as an explicit matrix."""
    J = from_dense(torch.as_tensor(A).to(dtype))
    return Jacobian(J.shape, J.matmat, J.rmatmat, dtype=dtype, device=J.device, path="products")


def eigenvalue_error(spectrum: Spectrum, truth: np.ndarray, which: str) -> float:
    """Largest error over the converged values, by distance to the spectrum and by rank, beyond the stated bound."""
    values, converged = spectrum.values[0].numpy(), spectrum.converged[0].numpy()
    key = np.abs if which == "LM" else np.real
    rank = np.abs(np.sort(key(truth))[::-1][: len(values)] - np.sort(key(values))[::-1])
    distance = np.array([np.abs(truth - value).min() for value in values])
    error = np.maximum(distance, rank if converged.all() else 0)
    return float(np.max((error - spectrum.error_bounds[0].numpy())[converged], initial=0.0))


def singular_value_error(spectrum: Spectrum, truth: np.ndarray, which: str) -> float:
    """Largest error of a converged value beyond its stated bound."""
    k = spectrum.values.shape[1]
    expected = truth[:k] if which == "LM" else truth[::-1][:k]
    excess = np.abs(spectrum.values[0].numpy() - expected) - spectrum.error_bounds[0].numpy()
    return float(np.max(excess[spectrum.converged[0].numpy()], initial=0.0))


def _worst(values: np.ndarray, truth: np.ndarray, key: Callable[[np.ndarray], np.ndarray], smallest: bool) -> float:
    """The error of the worst value, by distance and by rank; infinite where there is none."""
    if not np.isfinite(values).all():
        return float("inf")
    rank = np.abs(np.sort(key(values)) - np.sort(key(truth))[: len(values)]) if smallest else np.zeros(1)
    if not smallest:
        rank = np.abs(np.sort(key(values))[::-1] - np.sort(key(truth))[::-1][: len(values)])
    distance = np.abs(truth[:, None] - values[None, :]).min(0)
    return float(max(rank.max(), distance.max()))


def _scipy_answer(A: np.ndarray, k: int, what: str) -> np.ndarray | str:
    try:
        if what.startswith("eig"):
            return scipy.sparse.linalg.eigs(A, k, which=what[-2:], return_eigenvectors=False)
        solver = "arpack" if what.endswith("LM") else "propack"
        return scipy.sparse.linalg.svds(A, k, which=what[-2:], solver=solver, return_singular_vectors=False)
    except (scipy.sparse.linalg.ArpackError, np.linalg.LinAlgError, ValueError, SystemError, RuntimeError) as error:
        return type(error).__name__


def rows(n: int = 300, method: str = "auto", k: int = 6) -> list[str]:
    """The table, one line per matrix and part of the spectrum."""
    head = f"{'matrix':24s}{'what':7s}{'error':>9s}{'residual':>9s}{'bound':>9s}{'flag':>5s}{'products':>9s}"
    lines = [f"{head}  {'method':13s}{'scipy: error':>14s}"]
    for hard in hard_matrices(n):
        J, norm = operator(hard.A), float(np.linalg.norm(hard.A, 2)) or 1.0
        for what in ("eig LM", "eig LR", "sv LM", "sv SM"):
            which = what[-2:]
            if what.startswith("eig"):
                spectrum = eigenvalues(J, k, which, method="krylov-schur" if method == "iterative" else method)
                truth, key = hard.true_eigenvalues(), np.abs if which == "LM" else np.real
            else:
                spectrum = singular_values(J, k, which, method="golub-kahan" if method == "iterative" else method)
                truth, key = hard.true_singular_values(), np.abs
            peer = _scipy_answer(hard.A, k, what)
            found = spectrum.converged[0]
            bound = float(spectrum.error_bounds[0][found].max()) / norm if found.any() else float("inf")
            error = _worst(spectrum.values[0].numpy(), truth, key, which == "SM") / norm
            residual = float(spectrum.residuals.max()) / norm
            scipy_error = peer if isinstance(peer, str) else f"{_worst(peer, truth, key, which == 'SM') / norm:.0e}"
            lines.append(
                f"{hard.name:24s}{what:7s}{error:9.0e}{residual:9.0e}{bound:9.0e}{int(found.sum()):3d}/{k}"
                f"{spectrum.n_products:9d}  {spectrum.method:13s}{scipy_error:>14s}"
            )
    return lines


def main(n: int = 300, method: str = "auto") -> None:
    warnings.simplefilter("ignore")  # of scipy
    for line in rows(n, method):
        print(line)


if __name__ == "__main__":
    main(*(int(a) if a.isdigit() else a for a in sys.argv[1:]))
