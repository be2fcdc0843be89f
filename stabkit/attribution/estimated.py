"""Spectral and isotropic terms of steps that are too large for a full spectrum, each with its interval."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from stabkit.attribution.identity import Energies, half_log
from stabkit.errors import TraceError
from stabkit.jacobians import Jacobian, eigenvalues
from stabkit.jacobians.method_choice import krylov_products

_TOLERANCE = 1e-3  # residual of a Krylov value, as a fraction of the norm of J


@dataclass(frozen=True)
class Bracket:
    """A term with its interval.

    Attributes:
        value: ``(samples,)``, nats.
        interval: ``(samples, 2)``.
    """

    value: Tensor
    interval: Tensor


def isotropic_bracket(parts: Energies, size: int, reach: float) -> Bracket:
    """1/2 log(|J|_F^2 / size) with the interval that the probes leave it."""
    low = (parts.total - reach * parts.total_error).clamp_min(0.0)
    ends = torch.stack([half_log(low, size), half_log(parts.total + reach * parts.total_error, size)], 1)
    return Bracket(half_log(parts.total, size), ends)


def spectral_bracket(parts: Energies, a: float, size: int, outer: Tensor | None, reach: float) -> Bracket:
    """1/2 log(sum |lambda|^2 / size) between what must be in the spectrum and what can be.

    With J = a I + B and beta the eigenvalues of B: sum |lambda|^2 = a^2 d + 2 a tr B + sum |beta|^2, and sum |beta|^2
    lies between the larger of (tr B)^2 / d (Cauchy and Schwarz) and the sum over the eigenvalues that were found, and
    |B|_F^2 (Schur). The value takes the middle of the two; the interval is the bracket, widened by the spread of the
    probes.

    Args:
        parts: energies of the step, the tail counted to the branch.
        a: the skip.
        size: d.
        outer: ``(samples, k)``, eigenvalues found by a Krylov method, NaN where not converged; None for none.
        reach: standard errors to each side.
    """
    first = parts.dissipation / (2 * a) if a else torch.zeros_like(parts.total)
    least = first.square() / size
    if outer is not None:
        found = (outer - a).abs().square()
        least = torch.maximum(least, torch.where(found.isfinite(), found, torch.zeros_like(found)).sum(1))
    least = torch.minimum(least, parts.branch)
    base = parts.skip + parts.dissipation
    middle = base + (least + parts.branch) / 2
    low = (base + least - reach * parts.dissipation_error).clamp_min(0.0)
    high = parts.total + reach * parts.total_error
    value = half_log(torch.minimum(middle.clamp_min(0.0), parts.total), size)
    return Bracket(value, torch.stack([half_log(low, size), half_log(high, size)], 1))


def outer_eigenvalues(J: Jacobian, count: int, seed: int) -> tuple[Tensor | None, str]:
    """The eigenvalues of largest modulus, ``(batch, count)``, NaN where not converged; or None and the reason why."""
    wanted = min(count, J.shape[1])
    try:
        found = eigenvalues(
            J,
            wanted,
            tol=_TOLERANCE,
            seed=seed,
            method="krylov-schur",
            max_products=krylov_products(J.shape[1]),
            two_sided=False,
        )
    except (ValueError, ArithmeticError, TraceError) as error:
        # products that are not finite, or a forward product without a certificate: a fact about the step
        return None, f"no eigenvalues: {str(error).splitlines()[0]}"
    missing = int((~found.converged).sum())
    note = f"{missing} of {found.converged.numel()} outer eigenvalues did not converge" if missing else ""
    nan = torch.full_like(found.values, complex(math.nan, math.nan))
    return torch.where(found.converged, found.values, nan), note
