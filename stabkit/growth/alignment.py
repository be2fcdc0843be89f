"""The generalised alignment index: whether deviation vectors fall together, as they do in chaos."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stabkit.arguments import accepts
from stabkit.errors import TraceError
from stabkit.growth.arguments import checked_k
from stabkit.growth.qr_sweep import Factor, propagate, start_frame
from stabkit.growth.rate_laws import RateLaw, rate_law
from stabkit.results import Result
from stabkit.tracing import FlowLike

_BEYOND = 3.0  # nats beyond what regular motion can do
_POINTS = 400  # of the curve, when a law is fitted


@dataclass(frozen=True)
class AlignmentIndex(Result):
    """The volume spanned by k unit deviation vectors, which are never made orthogonal.

    In a chaotic orbit all turn towards the fastest direction and the volume falls exponentially, with the rate of
    ``sum_i (lambda_1 - lambda_i)``; on a torus it stays or falls like a power of time.

    Attributes:
        log_volume: ``(steps + 1, batch)``, natural log of the index, 0 at the beginning.
        growth: ``(batch,)``, mean growth of the first vector, in nats per step.
        laws: for every sample, which law the volume follows.
        order: k.
        seed: the seed of the deviation vectors.
    """

    log_volume: Tensor
    growth: Tensor
    laws: tuple[RateLaw, ...]
    order: int
    seed: int

    @property
    def chaotic(self) -> Tensor:
        """``(batch,)``, whether vectors grow and the volume falls as in no regular motion.

        There vectors are only sheared, which makes them grow like time, and the index of k of them falls no faster than
        ``time^-2k``. The volume must fall by more, or by a law that is exponential, and vectors grow by more; over few
        steps that takes strong chaos to be seen.
        """
        steps = len(self.log_volume) - 1
        exponential = torch.tensor([law.law == "exponential" and law.rate < 0 for law in self.laws])
        deep = self.log_volume[-1] < -2 * self.order * math.log(steps) - _BEYOND
        return (exponential | deep) & (self.growth * steps > math.log(steps) + _BEYOND)


@accepts
def alignment_index(flow: FlowLike, k: int = 2, *, seed: int = 0) -> AlignmentIndex:
    """The generalised alignment index GALI_k of every sample along a flow; for k = 2 it is SALI up to a factor.

    The vectors are followed in the frame of a QR decomposition, so that the volume is known as a log, however small.

    Args:
        flow: from `stabkit.trace`, `stabkit.iterate` or `stabkit.recurrent_flow`, at least 6 steps.
        k: how many deviation vectors, at least 2.
        seed: the seed of the vectors.

    Raises:
        TraceError: an argument makes no sense for this flow.

    Source:
        Skokos, Bountis and Antonopoulos, "Geometrical properties of local dynamics in Hamiltonian systems: the
        Generalized Alignment Index (GALI) method" (2007).

    Example:
        >>> import math, torch, stabkit
        >>> def standard_map(x, K=6.0):
        ...     p = x[:, 1] + K * torch.sin(x[:, 0])
        ...     return torch.stack([x[:, 0] + p, p], 1)
        >>> start = torch.tensor([[1.0, 0.3]], dtype=torch.float64)
        >>> alignment_index(stabkit.iterate(standard_map, start, 200)).chaotic.tolist()
        [True]
    """
    if k == 1 or len(flow) < 6:
        raise TraceError(f"k={k}, {len(flow)} steps; expected at least 2 vectors and 6 steps")
    k = checked_k(flow, k, k)
    frame = start_frame(flow, k, adjoint=False, seed=seed)
    C = torch.eye(k, dtype=torch.float64).expand(flow.batch, k, k)
    volume = torch.zeros(flow.batch, dtype=torch.float64)
    first = torch.zeros(flow.batch, dtype=torch.float64)
    logs = [volume]

    def follow(factor: Factor) -> None:
        nonlocal C, volume, first
        R = factor.R.cpu() * (factor.scales.cpu() - factor.scales.cpu().amax(1, keepdim=True)).exp().unsqueeze(1)
        C = R @ C
        lengths = torch.linalg.vector_norm(C, dim=1)
        C = C / lengths.unsqueeze(1)
        volume = volume + R.diagonal(dim1=-2, dim2=-1).abs().log().sum(1) - lengths.log().sum(1)
        first = first + lengths[:, 0].log() + factor.scales.cpu().amax(1)
        logs.append(volume)

    propagate(flow, frame, adjoint=False, on_factor=follow, every_step=True)
    log_volume = torch.stack(logs)
    thinned = slice(None, None, max(1, len(log_volume) // _POINTS))
    places = np.arange(len(log_volume), dtype=float)[thinned]
    laws = tuple(rate_law(log_volume[thinned, b], places=places) for b in range(flow.batch))
    return AlignmentIndex(log_volume, first / len(flow), laws, k, seed)
