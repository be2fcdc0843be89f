"""Covariant Lyapunov vectors: the directions that the flow itself carries into each other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stabkit.arguments import accepts
from stabkit.errors import TraceError
from stabkit.growth.arguments import checked_k
from stabkit.growth.qr_sweep import Factor, propagate, start_frame
from stabkit.results import Result
from stabkit.tracing import FlowLike

_ALL = 64
_NUMBERS = 2**27  # frames of a whole flow are kept; beyond this many numbers that is refused


@dataclass(frozen=True)
class CovariantVectors(Result):
    """Covariant Lyapunov vectors of the inner stretch of a flow.

    ``J_t v_t = +- exp(growth_t) v_{t+1}`` for each of them.

    Attributes:
        vectors: one tensor ``(batch, n, k)`` of unit columns for each state of the stretch, fastest growing first.
        growth: ``(steps, batch, k)``, in nats per step.
        start: index of the first state of the stretch.
        seed: the seed of the random frames at both ends of the flow.
    """

    vectors: tuple[Tensor, ...]
    growth: Tensor
    start: int
    seed: int

    def angles(self, first: int = 0, second: int = 1) -> Tensor:
        """``(states, batch)``, angle between two of the vectors, in radians from 0 to pi/2; 0 is a tangency."""
        pairs = [(v[..., first], v[..., second]) for v in self.vectors]
        sines = [torch.linalg.vector_norm(b - (a * b).sum(1, keepdim=True) * a, dim=1) for a, b in pairs]
        cosines = [(a * b).sum(1).abs() for a, b in pairs]
        return torch.stack([torch.atan2(s, c) for s, c in zip(sines, cosines, strict=True)])

    def splitting(self, split: int) -> Tensor:
        """``(states, batch)``, smallest angle between the span of the first ``split`` vectors and that of the others.

        Bounded away from 0 along the whole flow where it is hyperbolic.
        """
        smallest = []
        for vectors in self.vectors:
            fast, slow = (torch.linalg.qr(part)[0] for part in (vectors[..., :split], vectors[..., split:]))
            inside = fast.mT @ slow
            sines = torch.linalg.svdvals(slow - fast @ inside)[..., -1]
            smallest.append(torch.atan2(sines, torch.linalg.matrix_norm(inside, 2)))
        return torch.stack(smallest)


@accepts
def covariant_vectors(
    flow: FlowLike, k: int | None = None, *, discard: int | None = None, seed: int = 0
) -> CovariantVectors:
    """Covariant Lyapunov vectors of every sample, by going forth with QR and back with the inverse of R.

    The frame of QR depends on its past alone and its vectors are orthogonal by force; covariant vectors do not depend
    on any frame, and their angles are properties of the flow.

    Args:
        flow: from `stabkit.trace`, `stabkit.iterate` or `stabkit.recurrent_flow`.
        k: how many, those of the largest exponents; by default all, up to 64.
        discard: steps left out at either end, while vectors turn into place; by default a quarter of all at each.
        seed: the seed of the random frames.

    Raises:
        TraceError: an argument makes no sense, a step is singular on the frame, or the frames would not fit.

    Source:
        Ginelli, Poggi, Turchi, Chate, Livi and Politi, "Characterizing dynamics with covariant Lyapunov vectors"
        (2007).

    Example:
        >>> import torch, stabkit
        >>> A = torch.tensor([[2.0, 1.0], [0.0, 0.5]], dtype=torch.float64)  # eigenvectors (1, 0) and (2, -3)
        >>> flow = stabkit.iterate(lambda x: x @ A.T, torch.zeros(1, 2, dtype=torch.float64), 80)
        >>> found = covariant_vectors(flow)
        >>> [round(float(g), 6) for g in found.growth[0, 0]], round(float(torch.tan(found.angles()[0, 0])), 6)
        ([0.693147, -0.693147], 1.5)
    """
    k = checked_k(flow, k, _ALL)
    steps = len(flow)
    discard = steps // 4 if discard is None else discard
    if isinstance(discard, bool) or not isinstance(discard, int) or discard < 0 or 2 * discard >= steps:
        raise TraceError(f"discard={discard!r}; expected a whole number of steps below half of the {steps}")
    frame = start_frame(flow, k, adjoint=False, seed=seed, generic=True)
    if frame.numel() * (steps + 1) > _NUMBERS:
        raise TraceError(f"frames of {steps} steps would take {frame.numel() * steps * 8 / 2**30:.1f} GiB; take fewer")
    frames, factors = [frame.cpu().to(torch.float64)], []

    def keep(factor: Factor, after: Tensor) -> None:
        factors.append(factor.R.cpu() * factor.scales.cpu().exp().unsqueeze(1))
        frames.append(after.cpu().to(torch.float64))

    found = propagate(flow, frame, adjoint=False, on_frame=keep, every_step=True)
    if bool(found.growth.isneginf().any()):
        raise TraceError("a step is singular on the frame, so there is no way back through it; ask for a smaller k")
    generator = torch.Generator().manual_seed(seed)
    C = torch.randn(k, k, generator=generator, dtype=torch.float64).triu().repeat(flow.batch, 1, 1)
    C = C / torch.linalg.vector_norm(C, dim=1, keepdim=True)
    vectors, growth = [], []
    for index in range(steps - 1, discard - 1, -1):
        if index < steps - discard:
            vectors.append(frames[index + 1] @ C)
        C = torch.linalg.solve_triangular(factors[index], C, upper=True)
        lengths = torch.linalg.vector_norm(C, dim=1)
        C = C / lengths.unsqueeze(1)
        if index < steps - discard:
            growth.append(-lengths.log())
    vectors.append(frames[discard] @ C)
    return CovariantVectors(tuple(vectors[::-1]), torch.stack(growth[::-1]), discard, seed)
