"""Singular values of long products of triangular factors, as logs, over any dynamic range."""

from __future__ import annotations

import torch
from torch import Tensor

from stabkit.growth.qr_sweep import Factor

_ROTATIONS = 40  # sweeps over all pairs of columns after which Jacobi's method is given up
_ORTHOGONAL = 1e-13  # cosine between two columns that counts as none


class GradedProduct:
    """A product of upper triangular factors as rows of moderate size, each with a scale of its own.

    ``R_t ... R_1 = diag(exp(scales)) rows``. As long as the factors come from a frame that already points the right
    way, rows stay well conditioned however far the scales drift apart.
    """

    def __init__(self, batch: int, k: int) -> None:
        self.rows = torch.eye(k, dtype=torch.float64).repeat(batch, 1, 1)
        self.scales = torch.zeros(batch, k, dtype=torch.float64)

    def multiply(self, factor: Factor) -> None:
        """Put one more factor to the left."""
        R, scales = factor.R.cpu(), factor.scales.cpu()
        inner = scales + self.scales  # log scale of what each column of R meets
        logs = R.abs().log() + inner.unsqueeze(1)
        top = torch.nan_to_num(logs.amax(2), neginf=0.0)
        rows = (R.sign() * (logs - top.unsqueeze(2)).exp()) @ self.rows
        norms = torch.linalg.vector_norm(rows, dim=2)
        self.rows = rows / norms.clamp_min(torch.finfo(torch.float64).tiny).unsqueeze(2)
        self.scales = top + norms.log()  # -inf for a row that is lost

    def log_singular_values(self) -> Tensor:
        """``(batch, k)``, the largest first; -inf for zeros."""
        return log_singular_values(self.rows, self.scales)


def log_singular_values(rows: Tensor, scales: Tensor) -> Tensor:
    """Logs of the singular values of ``diag(exp(scales)) rows``, by one-sided Jacobi rotations between rows.

    The scales enter every rotation as differences only, so they may span any range. Values are accurate relative to
    themselves when the rows, at unit length, are well conditioned.

    Args:
        rows: ``(batch, k, n)``.
        scales: ``(batch, k)``, natural logs.

    Source:
        Demmel and Veselic, "Jacobi's method is more accurate than QR" (1992).

    Example:
        >>> rows = torch.tensor([[[1.0, 0.5], [0.0, 1.0]]], dtype=torch.float64)
        >>> log_singular_values(rows, torch.tensor([[900.0, -900.0]], dtype=torch.float64)).round(decimals=4).tolist()
        [[900.1116, -900.1116]]
    """
    count = rows.shape[1]
    rows, scales = _normalised(rows, scales)
    for _ in range(_ROTATIONS if count > 1 else 0):
        worst = 0.0
        for first, second in tournament(count):
            rows, scales, cosine = _rotate(rows, scales, first, second)
            worst = max(worst, cosine)
        if worst <= _ORTHOGONAL:
            break
    return scales.sort(dim=1, descending=True).values


def _normalised(rows: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    norms = torch.linalg.vector_norm(rows, dim=-1)
    return rows / norms.clamp_min(torch.finfo(rows.dtype).tiny).unsqueeze(-1), scales + norms.log()


def tournament(count: int) -> list[tuple[list[int], list[int]]]:
    """Every pair once, in rounds in which everyone plays at most once.

    Example:
        >>> tournament(4)
        [([0, 1], [3, 2]), ([0, 3], [2, 1]), ([0, 2], [1, 3])]
    """
    players = list(range(count)) + ([-1] if count % 2 else [])
    half, rounds = len(players) // 2, []
    for _ in range(len(players) - 1):
        pairs = [(a, b) for a, b in zip(players[:half], reversed(players[half:]), strict=True) if -1 not in (a, b)]
        rounds.append(([a for a, _ in pairs], [b for _, b in pairs]))
        players = [players[0], players[-1], *players[1:-1]]
    return rounds


def _rotate(rows: Tensor, scales: Tensor, first: list[int], second: list[int]) -> tuple[Tensor, Tensor, float]:
    """Make pairs of rows orthogonal; the largest cosine there was."""
    a, b = rows[:, first], rows[:, second]
    s, t = scales[:, first], scales[:, second]
    swap = (t > s).unsqueeze(-1)
    a, b = torch.where(swap, b, a), torch.where(swap, a, b)
    s, t = torch.maximum(s, t), torch.minimum(s, t)
    cosine = (a * b).sum(-1)
    cosine = torch.where(t.isneginf(), 0.0, cosine)
    ratio = torch.where(t.isneginf(), 0.0, (t - s).exp())
    # tan of the angle is ratio * slope; every quantity stays of order one when the ratio underflows
    middle = (ratio.square() - 1) / (2 * torch.where(cosine == 0, 1.0, cosine))
    sign = torch.where(middle < 0, -1.0, 1.0)
    slope = torch.where(cosine == 0, 0.0, sign / (middle.abs() + (ratio.square() + middle.square()).sqrt()))
    tangent = ratio * slope
    shrink = (1 + tangent.square()).rsqrt()
    new_a = shrink.unsqueeze(-1) * (a - (tangent * ratio).unsqueeze(-1) * b)
    new_b = shrink.unsqueeze(-1) * (slope.unsqueeze(-1) * a + b)
    new_a, s = _normalised(new_a, s)
    new_b, t = _normalised(new_b, t)
    rows, scales = rows.clone(), scales.clone()
    rows[:, first], rows[:, second] = torch.where(swap, new_b, new_a), torch.where(swap, new_a, new_b)
    swapped = swap.squeeze(-1)
    scales[:, first], scales[:, second] = torch.where(swapped, t, s), torch.where(swapped, s, t)
    return rows, scales, float(cosine.abs().max()) if cosine.numel() else 0.0
