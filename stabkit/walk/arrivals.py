"""What a walk back keeps for the attribution of its growth."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stabkit.walk.backwards import Observer, Passage, Walk

SMALL = 512  # the largest step, in numbers per sample, that cotangents are kept at


@dataclass(frozen=True)
class Pulled:
    """Cotangents on their way back, for some samples.

    Attributes:
        growth: ``(steps, samples, k)``, log of the norm before a step over that after it, nats; NaN where nothing
            arrives of the cotangents that were sent.
        arriving: for every step the cotangents ``(samples, m, k)`` of its target, float64, each times some power of
            two; None at large steps.
        restarts: states at which all cotangents were drawn anew.
        loss: what was differentiated, in words.
    """

    growth: Tensor
    arriving: tuple[Tensor | None, ...]
    restarts: tuple[int, ...]
    loss: str

    @classmethod
    def of(cls, walk: Walk, arriving: tuple[Tensor | None, ...], samples: int, loss: str) -> Pulled:
        """The first samples of a walk."""
        reached = ~walk.log_norms[1:].isneginf()
        growth = torch.where(reached, walk.growth, torch.nan)
        return cls(growth[:, :samples], arriving, walk.restarts, loss)


class Arrivals(Observer):
    """Keeps the cotangents that arrive at small steps, for the first samples.

    Args:
        steps: how many the flow has.
        samples: how many to keep.
        limit: the largest step, in numbers per sample before or after it, that they are kept at.
    """

    def __init__(self, steps: int, samples: int, limit: int = SMALL) -> None:
        self._samples, self._limit = samples, limit
        self._kept: list[Tensor | None] = [None] * steps

    @property
    def columns(self) -> tuple[Tensor | None, ...]:
        """For every step ``(samples, m, k)``, float64 on the CPU."""
        return tuple(self._kept)

    def passed(self, passage: Passage, pulled: Tensor | None) -> None:
        """Keep what arrived at the step, where that is small."""
        arriving, leaving = passage.arriving.columns, passage.leaving.columns
        if max(arriving.shape[1], leaving.shape[1]) <= self._limit:
            kept = arriving[: self._samples].detach().to("cpu", torch.float64)
            self._kept[passage.step.index] = kept.clone(memory_format=torch.contiguous_format)
