"""How much one step resembles the next, which decides the predictor of growth that applies."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stabkit.results import Result
from stabkit.tracing import Flow, same_space

FROZEN, ISOTROPIC = 0.9, 0.1  # cosines of successive Jacobians, from which and up to which a predictor applies


@dataclass(frozen=True)
class Persistence(Result):
    """Whether successive steps are the same map, on average alike, or unrelated.

    Attributes:
        jacobian_cosine: ``(steps,)``, mean over samples of <C_l, C_(l+1)>_F / (|C_l|_F |C_(l+1)|_F), C = J - tr(J)/d I
            what the step does to some modes more than to others: a skip, or a damping of all modes, makes no two steps
            alike. 1 for tied linear steps, 0 +- 1/d for independent ones. NaN where the next step acts in another
            space.
        field_cosine: ``(steps,)``, mean cosine of f_l(x_l) and f_(l+1)(x_(l+1)), f = x' - a x. Near 1 where the path
            is a curve, near 0 where it is a random walk.
        straightness: |x_L - x_0| / sum |x_(l+1) - x_l| over the longest run of steps in one space; about 1/sqrt(L)
            for a random walk. NaN without such a run.
        run: first and last step of that run.
    """

    jacobian_cosine: Tensor
    field_cosine: Tensor
    straightness: float
    run: tuple[int, int]

    @property
    def mean(self) -> float:
        """The mean cosine of successive Jacobians; NaN when there are none to compare."""
        return _nan_mean(self.jacobian_cosine)

    @property
    def applies(self) -> str:
        """``"frozen"``, ``"isotropic"`` or ``"between"``; ``"unknown"`` when no two steps could be compared."""
        if math.isnan(self.mean):
            return "unknown"
        if self.mean >= FROZEN:
            return "frozen"
        return "isotropic" if self.mean <= ISOTROPIC else "between"

    def at(self, index: int) -> float:
        """The mean cosine of a step with its neighbours; NaN when it has none in its space."""
        return _nan_mean(self.jacobian_cosine[max(index - 1, 0) : index + 1])

    def _contents(self) -> dict[str, Any]:
        return {**super()._contents(), "mean": self.mean, "applies": self.applies}


def cosine_of_modes(deviation: Tensor, following: Tensor) -> float:
    """Mean over samples of the Frobenius cosine of two steps, from images ``(samples, n, k)`` of the same vectors."""
    k = min(deviation.shape[2], following.shape[2])
    one, two = deviation[:, :, :k].flatten(1), following[:, :, :k].flatten(1)
    return _nan_mean((one * two).sum(1) / (one.norm(dim=1) * two.norm(dim=1)))


def field_cosines(flow: Flow, skips: list[float | None]) -> Tensor:
    """Mean cosine of each step's field with the next one's, along the path; NaN where they cannot be compared."""
    fields: list[Tensor | None] = []
    for step, a in zip(flow.steps, skips, strict=True):
        if _changes_space(flow, step.index) or a is None:
            fields.append(None)
        else:
            fields.append((step.target.flatten().double() - a * step.source.flatten().double()).cpu())
    cosines = torch.full((len(flow.steps),), math.nan, dtype=torch.float64)
    for index in range(len(fields) - 1):
        f, g = fields[index], fields[index + 1]
        if f is not None and g is not None and f.shape == g.shape:
            cosines[index] = _nan_mean((f * g).sum(1) / (f.norm(dim=1) * g.norm(dim=1)))
    return cosines


def straightness(flow: Flow) -> tuple[float, tuple[int, int]]:
    """Mean straightness of the longest run of steps in one space, and the run."""
    best: tuple[int, int] = (0, -1)
    start = 0
    for index in range(len(flow.steps)):
        if _changes_space(flow, index):
            start = index + 1
        elif index - start > best[1] - best[0]:
            best = (start, index)
    first, last = best
    if last < first:
        return math.nan, best
    states = torch.stack([flow.states[i].flatten().double().cpu() for i in range(first, last + 2)])
    length = (states[1:] - states[:-1]).norm(dim=2).sum(0)
    return _nan_mean((states[-1] - states[0]).norm(dim=1) / length), best


def _changes_space(flow: Flow, index: int) -> bool:
    step = flow.steps[index]
    return not same_space(step.source, step.target)


def _nan_mean(values: Tensor) -> float:
    finite = values[values.isfinite()]
    return float(finite.mean()) if finite.numel() else math.nan
