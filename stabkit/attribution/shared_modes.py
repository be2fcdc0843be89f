"""The growth of a gradient whose energy is carried from block to block along the modes that they share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Modes:
    """What is known of the modes of one step, ``(samples,)`` where no other shape is said.

    Attributes:
        values: ``(samples, k)``, eigenvalues of J: all of them, or the outer ones, NaN where one did not converge.
            None where none was computed.
        size: how many there are in all.
        mean: the mean of all eigenvalues, tr J / d.
        isotropic: 1/2 log(|J|_F^2 / d).
        spectral: 1/2 log mean |eig(J)|^2.
        cosine: how alike the step is to its neighbours, less the mean eigenvalue; NaN where it has none.
        start: eigenvalues ``(samples, d)`` and the share of the energy of the cotangent in the mode of each, where a
            cotangent enters here that is spread unevenly; None where it is spread evenly.
    """

    values: Tensor | None
    size: int
    mean: Tensor
    isotropic: Tensor
    spectral: Tensor
    cosine: float
    start: tuple[Tensor, Tensor] | None = None


def along_depth(steps: Sequence[Modes | None]) -> Tensor:
    """Growth of the gradient at every step from the energies of modes that are carried from step to step.

    A step is J = m I + C, m the mean of its eigenvalues. Of C, the part sqrt(c) C is that of its neighbours too (c is
    the cosine of neighbouring C) and the rest is drawn anew. A cotangent has a share e_i of its energy in mode i, all
    alike where it enters as a random one, or as the gradient of a loss has them:

        e_i  <-  |m + sqrt(c) (lambda_i - m)|^2 e_i  +  u / d sum_j e_j,

    where u is what |J|_F^2 / d has beyond the modes: the part that is drawn anew, and what is not normal. Both reach
    all modes alike. For unrelated steps (c = 0) this is the isotropic rate; for one normal field in all steps (c = 1)
    it is exact, from the first step, where all modes count, to the last ones, where the leading mode is left. Modes of
    neighbouring steps are matched by size. Derived here; what it explains of measured growth is drawn by
    ``examples/how_much_the_region_explains.py``.

    Args:
        steps: in the order of depth; None for a step of which nothing is known, after which energies are even again.

    Returns:
        ``(steps, samples)``, nats; NaN where nothing is known.

    Example:
        >>> values = torch.tensor([[1.0, 0.0]], dtype=torch.complex128)
        >>> known = {"mean": torch.tensor([0.5]), "isotropic": torch.tensor([0.5]).log() / 2}
        >>> step = Modes(values, 2, **known, spectral=known["isotropic"], cosine=1.0)
        >>> [round(float(rate), 4) for rate in along_depth([step, step])]
        [0.0, -0.3466]
    """
    rates: list[Tensor | None] = [None] * len(steps)
    energies: Tensor | None = None
    for index in range(len(steps) - 1, -1, -1):
        step = steps[index]
        if step is None or not bool(step.isotropic.isfinite().all()):
            energies = None
            continue
        sizes, weights = _squares(step)
        if energies is None or energies.shape != sizes.shape:
            # what went before is spread evenly, unless it is known how it is
            energies = weights.expand_as(sizes) if step.start is None else _in_order(step, *step.start)
        anew = (torch.exp(2 * step.isotropic) - (weights * sizes).sum(1)).clamp_min(0.0)
        before = energies.sum(1, keepdim=True)
        grown = sizes * energies + anew[:, None] * weights * before
        after = grown.sum(1, keepdim=True)
        rates[index] = 0.5 * (after / before)[:, 0].log()
        energies = torch.where(after > 0, grown / after, weights.expand_as(grown))
    known = next((rate for rate in rates if rate is not None), torch.full((1,), math.nan, dtype=torch.float64))
    return torch.stack([torch.full_like(known, math.nan) if rate is None else rate for rate in rates])


def mode_shares(J: Tensor, cotangents: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues ``(samples, d)`` of J and the mean share of cotangents ``(samples, d, k)`` in the mode of each.

    The share is that of the squared products with the eigenvectors of J^T, of unit norm: of a normal J the energy.
    """
    values, vectors = torch.linalg.eig(J.transpose(1, 2))
    products = (vectors.mH @ cotangents.to(vectors.dtype)).abs().square()
    return values, (products / products.sum(1, keepdim=True)).mean(2)


def _in_order(step: Modes, values: Tensor, shares: Tensor) -> Tensor:
    """Shares in the order in which `_squares` gives the modes of a step."""
    order = _shared(values, step).argsort(dim=1, descending=True)
    return shares.gather(1, order)


def _shared(values: Tensor, step: Modes) -> Tensor:
    """Squared moduli of what neighbouring steps share of the modes."""
    c = 0.0 if math.isnan(step.cosine) else min(max(step.cosine, 0.0), 1.0)
    mean = step.mean[:, None]
    return (mean + math.sqrt(c) * (values - mean)).abs().square()


def _squares(step: Modes) -> tuple[Tensor, Tensor]:
    """Squared moduli ``(samples, groups)`` of the shared part of a step's modes, the largest first, and their weights.

    Eigenvalues that are not known are one group: their sum and that of their squared moduli are what the others leave.
    """
    c = 0.0 if math.isnan(step.cosine) else min(max(step.cosine, 0.0), 1.0)
    mean = step.mean[:, None]
    if step.values is None:
        return torch.exp(2 * step.isotropic)[:, None], torch.ones(1, dtype=torch.float64)
    outer = step.values
    found = outer.isfinite()
    shared = torch.where(found, _shared(outer, step), mean.square().expand_as(outer.real))
    order = shared.sort(dim=1, descending=True).values
    left = step.size - outer.shape[1]
    if left <= 0:
        return order, torch.full((1, outer.shape[1]), 1 / outer.shape[1], dtype=torch.float64)
    known = torch.where(found, outer, mean.to(outer.dtype).expand_as(outer))
    energy = step.size * torch.exp(2 * step.spectral) - known.abs().square().sum(1)
    middle = (step.size * step.mean - known.real.sum(1)) / left
    spread = (energy / left - middle.square()).clamp_min(0.0)
    rest = (middle.square() + c * spread)[:, None]
    weights = torch.tensor([[1.0] * outer.shape[1] + [float(left)]], dtype=torch.float64) / step.size
    return torch.cat([order, rest], 1), weights
