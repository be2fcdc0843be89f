"""Matrices whose spectra are easily got wrong. As a script: values, residuals and flags beside scipy's answer.

python -m tests.jacobians.hard_matrices [n] [method]
"""

from __future__ import annotations

import sys
import warnings
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


def _scipy_eigenvalues(A: np.ndarray, k: int, which: str) -> np.ndarray | str:
    try:
        return scipy.sparse.linalg.eigs(A, k, which=which, return_eigenvectors=False)
    except Exception as error:  # the table shows whatever scipy does
        return type(error).__name__


def _scipy_singular_values(A: np.ndarray, k: int, which: str) -> np.ndarray | str:
    try:
        solver = "arpack" if which == "LM" else "propack"
        return scipy.sparse.linalg.svds(A, k, which=which, solver=solver, return_singular_vectors=False)
    except Exception as error:
        return type(error).__name__


def main(n: int = 300, method: str = "auto", k: int = 6) -> None:
    warnings.simplefilter("ignore")
    head = f"{'matrix':24s}{'what':8s}{'true first':>12s}{'stabkit':>12s}{'residual':>10s}{'bound':>10s}{'flag':>6s}"
    print(f"{head}{'products':>9s}  scipy")
    for hard in hard_matrices(n):
        J = operator(hard.A)
        for which in ("LM", "LR"):
            spectrum = eigenvalues(J, k, which, method="krylov-schur" if method == "iterative" else method)
            truth, key = hard.true_eigenvalues(), np.abs if which == "LM" else np.real
            _line(hard.name, "eig " + which, spectrum, key, key(truth).max(), _scipy_eigenvalues(hard.A, k, which))
        for which in ("LM", "SM"):
            spectrum = singular_values(J, k, which, method="golub-kahan" if method == "iterative" else method)
            truth = hard.true_singular_values()
            first = truth.max() if which == "LM" else truth.min()
            _line(hard.name, "sv " + which, spectrum, np.abs, first, _scipy_singular_values(hard.A, k, which))


def _line(name: str, what: str, spectrum: Spectrum, key, first: float, peer: np.ndarray | str) -> None:
    extreme = min if what == "sv SM" else max
    peer_text = peer if isinstance(peer, str) else f"{extreme(key(peer)):.6g}"
    flags = f"{int(spectrum.converged.sum())}/{spectrum.converged.numel()}"
    print(
        f"{name:24s}{what:8s}{first:12.5g}{extreme(key(spectrum.values[0].numpy())):12.5g}"
        f"{spectrum.residuals.max():10.1e}{spectrum.error_bounds.max():10.1e}{flags:>6s}{spectrum.n_products:9d}"
        f"  {peer_text}"
    )


if __name__ == "__main__":
    main(*(int(a) if a.isdigit() else a for a in sys.argv[1:]))
