"""One step's growth as a sum of named terms, from its matrix or from what it makes of random cotangents.

With J the Jacobian of a step, d its size and g the cotangent that arrives:

    log |J^T g| / |g|  =  1/2 log(sum |lambda|^2 / d)  +  1/2 log(|J|_F^2 / sum |lambda|^2)  +  alignment
          growth                   spectral                      non-normal

The non-normal term is not negative, since sum |lambda|^2 <= |J|_F^2 (I. Schur, Math. Ann. 66 (1909) 488). The first
two add up to the isotropic rate 1/2 log(|J|_F^2 / d): what a cotangent without preferred direction grows by.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Energies:
    """|J|_F^2 of every sample, split along J = T (a I + B): T what follows the addition, B the branch.

    The sums are over test cotangents: over a whole basis, or means over random signs.

    Attributes:
        total: ``(samples,)``, |J|_F^2.
        tail: |T|_F^2; the size of the target where nothing follows the addition.
        skip: a^2 |T|_F^2.
        dissipation: 2 a <T, T B>, of first order in the branch; negative where it damps.
        branch: |T B|_F^2, of second order.
        total_error: standard error of ``total``; 0 where exact.
        dissipation_error: standard error of ``dissipation``.
    """

    total: Tensor
    tail: Tensor
    skip: Tensor
    dissipation: Tensor
    branch: Tensor
    total_error: Tensor
    dissipation_error: Tensor


def energies(images: Tensor, tail_images: Tensor, a: float, *, exact: bool) -> Energies:
    """Sum what a step makes of test cotangents.

    Args:
        images: ``(samples, n, k)``, J^T v for k test cotangents.
        tail_images: ``(samples, n, k)``, T^T v for the same; only its energy is used when it has another size.
        a: the coefficient of the skip; 0 puts all into the branch.
        exact: the cotangents are a basis; otherwise they are random signs.
    """
    total, tail = _squares(images), _squares(tail_images)
    cross = torch.zeros_like(total)
    branch = total
    if a != 0.0:
        branch_images = images - a * tail_images
        cross = 2 * a * (tail_images * branch_images).sum(1)
        branch = _squares(branch_images)
    return Energies(
        total=_sum(total, exact),
        tail=_sum(tail, exact),
        skip=_sum(a * a * tail, exact),
        dissipation=_sum(cross, exact),
        branch=_sum(branch, exact),
        total_error=_error(total, exact),
        dissipation_error=_error(cross, exact),
    )


def _squares(images: Tensor) -> Tensor:
    return images.square().sum(1)


def _sum(per_probe: Tensor, exact: bool) -> Tensor:
    return per_probe.sum(1) if exact else per_probe.mean(1)


def _error(per_probe: Tensor, exact: bool) -> Tensor:
    if exact:
        return torch.zeros_like(per_probe[:, 0])
    return per_probe.std(1) / math.sqrt(per_probe.shape[1])


def half_log(energy: Tensor, size: int) -> Tensor:
    """``1/2 log(energy / size)``, -inf for no energy."""
    return 0.5 * (energy / size).log()


def spectral_terms(isotropic: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """The spectral and the non-normal term, which add up to the isotropic rate.

    Args:
        isotropic: ``(samples,)``, 1/2 log(|J|_F^2 / d).
        values: ``(samples, d)``, all eigenvalues.

    Returns:
        Two tensors ``(samples,)``. A nilpotent J has -inf and +inf; J = 0 has -inf and 0.

    Example:
        >>> J = torch.tensor([[[1.0, 2.0], [0.0, 1.0]]])
        >>> rate = half_log(J.square().sum((1, 2)), 2)
        >>> spectral, non_normal = spectral_terms(rate, torch.tensor([[1.0 + 0j, 1.0 + 0j]]))
        >>> round(spectral.item(), 6), round(non_normal.item(), 6) == round(math.log(3) / 2, 6)
        (0.0, True)
    """
    largest = values.abs().amax(1, keepdim=True)
    scale = torch.where(largest > 0, largest, torch.ones_like(largest))
    mean = (values.abs() / scale).square().mean(1)
    spectral = 0.5 * mean.log() + scale[:, 0].log()
    spectral = torch.where(largest[:, 0] == 0, torch.full_like(spectral, -math.inf), spectral)
    both_zero = torch.isneginf(isotropic) & torch.isneginf(spectral)
    non_normal = torch.where(both_zero, torch.zeros_like(isotropic), (isotropic - spectral).clamp_min(0.0))
    normal = (non_normal == 0) & isotropic.isfinite()  # rounding may put a normal spectrum above the norm
    return torch.where(normal, isotropic, spectral), non_normal


def in_nats(parts: Energies, a: float) -> tuple[Tensor, Tensor, Tensor]:
    """Skip, dissipation and branch in nats, adding up to ``1/2 log(total / tail)``.

    ``skip = log |a|``; what the branch changes, ``1/2 log(total / skip energy)``, is shared out between its first and
    its second order in proportion to their energies (the logarithmic mean as the common denominator; B. W. Ang,
    Energy Policy 32 (2004) 1131). Without a skip all of it is the branch.
    """
    zero = torch.zeros_like(parts.total)
    if a == 0.0:
        return zero, zero, 0.5 * (parts.total / parts.tail).log()
    change = 0.5 * (parts.total / parts.skip).log()
    difference = parts.dissipation + parts.branch
    # log(1 + x) / x -> 1 as the difference vanishes
    small = difference.abs() <= 1e-12 * parts.skip
    per_energy = torch.where(small, 0.5 / parts.skip, change / torch.where(small, torch.ones_like(change), difference))
    skip = torch.full_like(zero, math.log(abs(a)))
    return skip, per_energy * parts.dissipation, per_energy * parts.branch


@dataclass(frozen=True)
class Padded:
    """A step that keeps its source and appends to it, read in the space padded to the size of its target.

    Attributes:
        isotropic: ``(samples,)``, rate of the padded matrix [[I, 0], [J_H, I]], all of it non-normal: its eigenvalues
            are all 1.
        lost: ``(samples,)``, log of the share of the cotangent that stays in the source's coordinates.
    """

    isotropic: Tensor
    lost: Tensor


def padded(J: Tensor, cotangents: Tensor) -> Padded | None:
    """Read a concatenation, as in DenseNet, as a step of a larger space; None when J keeps no copy of its source.

    Args:
        J: ``(samples, m, n)`` with m > n.
        cotangents: ``(samples, m, k)``.
    """
    m, n = J.shape[1:]
    if m <= n or not bool(J.isfinite().all()):
        return None
    unit_rows = ((J != 0).sum(2) == 1) & (J.amax(2) == 1)
    shared = unit_rows.all(0) & torch.eq(J, J[:1]).all(2).all(0)
    columns = J[0].argmax(1)
    kept: dict[int, int] = {}
    for row in shared.nonzero().flatten().tolist():
        kept.setdefault(int(columns[row]), row)
    if len(kept) < n:
        return None
    new = torch.ones(m, dtype=torch.bool)
    new[list(kept.values())] = False
    pulled = (J.transpose(1, 2) @ cotangents).square().sum(1)
    appended = cotangents[:, new].square().sum(1)
    total = J.square().sum((1, 2)) + (m - n)
    return Padded(half_log(total, m), 0.5 * (pulled / (pulled + appended)).log().mean(1))
