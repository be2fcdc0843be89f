"""The spectrum of one step of a report: eigenvalues against the region of its method, and the worst growth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from stabkit.errors import ArgumentError, TraceError
from stabkit.identification import Identification
from stabkit.jacobians import Jacobian, Spectrum, eigenvalues, from_dense, singular_values
from stabkit.jacobians.numerical_range import outline
from stabkit.tracing import Step

SPECTRA = ("auto", "dense", "krylov", "none")
DENSE_SIZE = 512  # up to here all eigenvalues are cheaper than a dozen by Krylov, and say more
LARGEST_DENSE = 8192  # beyond, a matrix and its factors no longer fit beside a model, and take hours
WORK = 5_000_000  # numbers that all products of one Krylov spectrum may pass, a bound on its time
_WANTED = 6  # eigenvalues and singular values of larger steps
_DIRECTIONS = 32  # around the numerical range
_TOLERANCE = 1e-3  # residual of a Krylov value, as a fraction of the norm of J
_ROUNDING = 1e-4  # how far |a + z| may exceed 1 by rounding before an eigenvalue counts as outside


@dataclass(frozen=True)
class StepSpectrum:
    """What the spectrum of one step's Jacobian says; None where it was not computed."""

    z: tuple[complex, ...] | None = None
    numerical_range: tuple[complex, ...] | None = None
    radius: float | None = None
    norm: float | None = None
    outside: float | None = None
    method: str = "none"
    converged: bool = False
    notes: tuple[str, ...] = ()


def step_spectrum(step: Step, method: Identification, mode: str, samples: int, seed: int) -> StepSpectrum:
    """Eigenvalues and largest singular value of a step; why there are none is said in its notes.

    Args:
        step: the step.
        method: what was read off it; its skip decides where z = 0 is.
        mode: one of ``SPECTRA``.
        samples: how many samples' spectra are computed, from the first.
        seed: the seed of the start vectors.
    """
    if mode == "none":
        return StepSpectrum()
    J: Jacobian = _first_samples(step.jacobian(), samples)
    _, m, n = J.shape
    dense = mode == "dense" or (mode == "auto" and max(m, n) <= DENSE_SIZE)
    try:
        if dense and max(m, n) > LARGEST_DENSE:
            raise ArgumentError(
                f"a dense spectrum of {max(m, n)} numbers is too large (at most {LARGEST_DENSE}): use krylov"
            )
        if dense:
            J = from_dense(J.dense())  # once, for both spectra
        largest = _largest_singular_value(J, dense, seed)
        if m != n or step.source.sample_shapes != step.target.sample_shapes:
            norm, converged = _maximum(largest.values), bool(largest.converged.all())
            return StepSpectrum(norm=norm, method="dense" if dense else "krylov", converged=converged)
        found = _eigenvalues(J, dense, seed)
    except (ValueError, ArithmeticError, TraceError) as error:
        # non-finite weights or an operation without a certified product: a fact about the step, not a failure
        return StepSpectrum(notes=(f"no spectrum: {str(error).splitlines()[0]}",))
    a = 0.0 if method.skip is None else method.skip
    around = _numerical_range(J, a) if dense and n <= DENSE_SIZE else None
    return replace(_summarise(found, largest, a, n, dense), numerical_range=around)


def _numerical_range(J: Jacobian, a: float) -> tuple[complex, ...]:
    """Around the numerical range of J - a at the first sample."""
    A = J.dense()[0].double().cpu().numpy()
    return tuple(complex(w) - a for w in outline(A, _DIRECTIONS))


def _summarise(found: Spectrum, largest: Spectrum, a: float, n: int, dense: bool) -> StepSpectrum:
    values = found.values.numpy()
    outside = np.abs(values) > 1.0 + _ROUNDING
    notes = []
    if not dense and bool(outside.all()):
        notes.append(f"all {values.shape[1]} eigenvalues computed lie outside the region: the share is a lower bound")
    converged = bool(found.converged.all() and largest.converged.all())
    if not converged:
        count = int((~found.converged).sum() + (~largest.converged).sum())
        notes.append(f"{count} of the spectral values computed have not converged")
    return StepSpectrum(
        z=tuple(complex(v) - a for v in values.reshape(-1)),
        radius=float(np.abs(values).max()),
        norm=_maximum(largest.values),
        outside=float(outside.sum(axis=1).mean() / n),
        method="dense" if dense else "krylov",
        converged=converged,
        notes=tuple(notes),
    )


def _largest_singular_value(J: Jacobian, dense: bool, seed: int) -> Spectrum:
    if dense:
        return singular_values(J, seed=seed, method="dense")
    return singular_values(J, 1, tol=_TOLERANCE, seed=seed, method="golub-kahan", max_products=_products(J))


def _eigenvalues(J: Jacobian, dense: bool, seed: int) -> Spectrum:
    if dense:
        return eigenvalues(J, seed=seed, method="dense")
    wanted = min(_WANTED, J.shape[1])
    return eigenvalues(
        J, wanted, tol=_TOLERANCE, seed=seed, method="krylov-schur", max_products=_products(J), two_sided=False
    )


def _products(J: Jacobian) -> int:
    """How many products a Krylov spectrum may spend: fewer on larger steps, where each costs more."""
    return min(400, max(60, WORK // max(J.shape[1:])))


def _maximum(values: torch.Tensor) -> float:
    return float(values.max()) if values.numel() else 0.0


def _first_samples(J: Jacobian, count: int) -> Jacobian:
    """The blocks of the first samples; products still pass the whole batch, with zeros for the others."""
    batch, m, n = J.shape
    if count >= batch:
        return J

    def padded(product: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
        def apply(block: torch.Tensor) -> torch.Tensor:
            whole = block.new_zeros(batch, *block.shape[1:])
            whole[:count] = block
            return product(whole)[:count]

        return apply

    return Jacobian((count, m, n), padded(J.matmat), padded(J.rmatmat), dtype=J.dtype, device=J.device, path=J.path)
