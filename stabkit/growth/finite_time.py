"""Finite-time exponents: logs of the singular values of the whole product, over its length."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from stabkit.arguments import accepts
from stabkit.errors import TraceError
from stabkit.growth.arguments import checked_k, time_per_step
from stabkit.growth.qr_sweep import Factor, propagate, start_frame
from stabkit.results import Result
from stabkit.tracing import FlowLike

_ALL = 64
_GUARDS = 4  # directions carried beyond those asked for, at least, so that these settle sooner
_PATIENCE = 4  # passes until more are added, and every other pass from then on
_WIDEST = 64
_ROTATIONS = 40  # sweeps over all pairs of columns after which Jacobi's method is given up
_ORTHOGONAL = 1e-13  # cosine between two columns that counts as none


@dataclass(frozen=True)
class FiniteTimeExponents(Result):
    """Finite-time exponents of every sample, in nats per step, the largest first.

    ``exponents = log(singular values of J_L ... J_1) / L``: how much a small ball is stretched from the first state to
    the last. They are not the Lyapunov exponents, which they approach as L grows, nor logs of eigenvalues.

    Attributes:
        exponents: ``(batch, k)``, nats per step; -inf where the product has no such direction, or only
            one that rounding made.
        log_singular_values: ``(batch, k)``, natural logs; the values themselves may leave the range of a float.
        changes: ``(batch, k)``, by how much the exponents changed in the last pass over the flow.
        converged: ``(batch, k)``, whether that is within the tolerance.
        passes: how often the flow was swept, forth and back.
        width: how many directions were followed in the end.
        steps: ``(batch,)``, length of the product.
        step_size: time per step, None when a step is a step.
        tolerance: nats per step.
        seed: the seed of the first frame.
        stopped: ``"done"``, or ``"interrupted"`` by the keyboard, which returns what the passes before it found.
    """

    exponents: Tensor
    log_singular_values: Tensor
    changes: Tensor
    converged: Tensor
    passes: int
    width: int
    steps: Tensor
    step_size: float | None
    tolerance: float
    seed: int
    stopped: str = "done"

    @property
    def exponents_per_time(self) -> Tensor:
        """``(batch, k)``, in nats per unit of time; per step where the step size is not known."""
        return self.exponents / (self.step_size or 1.0)


@accepts
def finite_time_exponents(
    flow: FlowLike,
    k: int | None = None,
    *,
    tolerance: float = 1e-9,
    max_passes: int = 20,
    step_size: float | None = None,
    seed: int = 0,
) -> FiniteTimeExponents:
    """The k largest finite-time exponents of every sample: (1/L) log of the singular values of the product.

    The product is never formed. A frame goes forth with J V and back with J^T U, with QR decompositions on the way,
    until it stands at the leading singular vectors; where that takes long, because singular values are close, more
    directions are followed. The triangular factors of the last pass hold the singular values, which Jacobi rotations on
    graded rows read off as logs. So products may span any range, and small values are not
    computed through J^T J.

    A lesson with a picture: ``examples/conservative_networks.py``.

    Args:
        flow: from `stabkit.trace`, `stabkit.iterate` or `stabkit.recurrent_flow`.
        k: how many; by default all, up to 64.
        tolerance: change over a pass, in nats per step, that counts as none; in float32 at least a few roundings.
        max_passes: when to stop in any case.
        step_size: time per step; by default that of the flow.
        seed: the seed of the first frame.

    Raises:
        TraceError: an argument makes no sense for this flow, or a Jacobian is not finite.
        ArgumentTypeError: ``flow`` is no flow.
        KeyboardInterrupt: it came before the second pass was done; later ones return what there is.

    Source:
        Stewart, "On graded QR decompositions of products of matrices" (1995); Oliveira and Stewart, "Exponential
        splittings of products of matrices and accurately computing singular values of long products" (2000).

    Example:
        >>> import torch, stabkit
        >>> A = torch.tensor([[0.9, 1.0], [0.0, 0.9]], dtype=torch.float64)
        >>> flow = stabkit.iterate(lambda x: x @ A.T, torch.ones(1, 2, dtype=torch.float64), 10)
        >>> round(float(finite_time_exponents(flow).exponents[0, 0]), 8)
        0.13623438
    """
    k = checked_k(flow, k, _ALL)
    if max_passes < 2:
        raise TraceError(f"max_passes={max_passes!r}; expected at least 2: one to find the directions, one to measure")
    width, time = min(*flow.sizes, k + max(k, _GUARDS)), time_per_step(flow, step_size)
    batch = flow.batch
    lengths = flow.lengths
    steps = torch.full((batch,), len(flow)) if lengths is None else lengths.clamp_min(1).cpu()
    tolerance = max(tolerance, 8 * torch.finfo(flow.dtype).eps)
    # unit vectors could be singular vectors in the wrong order
    frame = propagate(flow, start_frame(flow, width, adjoint=False, seed=seed, generic=True), adjoint=False).frame
    previous = torch.full((batch, k), math.nan, dtype=torch.float64)
    changes, passes, stopped = previous, 1, "done"
    while passes < max_passes:
        if passes >= _PATIENCE and passes % 2 == 0:
            width = max(width, min(2 * width, *flow.sizes, max(_WIDEST, 2 * k)))
            frame = _widened(frame, width, seed + passes)
        product = GradedProduct(batch, width)
        try:
            swept = propagate(flow, frame, adjoint=passes % 2 == 1, on_factor=product.multiply)
        except KeyboardInterrupt:
            if passes == 1:
                raise
            stopped = "interrupted"
            break
        frame, passes = swept.frame, passes + 1
        values = _without_lost(product.log_singular_values(), swept.growth)[:, :k]
        # two zeros are the same; so is everything between steps whose sizes are all that is kept
        change = torch.where(values == previous, 0.0, (values - previous).abs()) / steps.unsqueeze(1)
        previous, changes = values, change
        if bool((changes <= tolerance).all()):
            break
    return FiniteTimeExponents(
        exponents=previous / steps.unsqueeze(1),
        log_singular_values=previous,
        changes=changes,
        converged=changes <= tolerance,
        passes=passes,
        width=width,
        steps=steps,
        step_size=time,
        tolerance=tolerance,
        seed=seed,
        stopped=stopped,
    )


def _widened(frame: Tensor, width: int, seed: int) -> Tensor:
    """Orthonormal columns with random ones added up to ``width``; those that are there stay, up to their signs."""
    batch, n, there = frame.shape
    if width == there:
        return frame
    generator = torch.Generator().manual_seed(seed)
    more = torch.randn(n, width - there, generator=generator, dtype=frame.dtype).to(frame.device)
    Q: Tensor = torch.linalg.qr(torch.cat([frame, more.expand(batch, -1, -1)], dim=2))[0]
    return Q


def _without_lost(values: Tensor, growth: Tensor) -> Tensor:
    """-inf for as many of the smallest values as there are directions that some step lost in rounding."""
    width = values.shape[1]
    lost = growth.isneginf().any(0).sum(1, keepdim=True)
    return torch.where(torch.arange(width) >= width - lost, -math.inf, values)


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
