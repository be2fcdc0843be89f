"""Cotangents that never leave the range of their dtype: columns of about unit size, and the powers of two taken out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from stabkit.tracing.graph.values import standard_normal
from stabkit.tracing.products.step_products import Space

_PART = 2**18  # numbers that are widened at once
PROBE = 1_000_003  # between the seeds of two random cotangents: more than the seeds drawn anew within one add


def probe_seeds(seed: int, count: int, first: int = 0) -> list[int]:
    """Seeds of ``count`` random cotangents, from number ``first`` on, of a call with this seed.

    Example:
        >>> probe_seeds(5, 2), probe_seeds(5, 1, first=1)
        ([5, 1000008], [1000008])
    """
    return [seed + PROBE * number for number in range(first, first + count)]


def drawn(space: Space, seeds: Sequence[int]) -> Tensor:
    """Standard normal columns ``(batch, size, len(seeds))``, one a seed; the same on every device."""
    shape = (space.batch, space.size)
    columns = [standard_normal(shape, seed) for seed in seeds]
    if not columns:
        return torch.zeros(*shape, 0, dtype=space.dtype, device=space.device)
    return torch.stack(columns).to(space.device, space.dtype).permute(1, 2, 0)


def stacked(space: Space, cotangents: Sequence[Sequence[Tensor]]) -> Tensor:
    """Several cotangents, each a tensor for every tensor of a state, as columns ``(batch, size, k)``."""
    parts = zip(*cotangents, strict=True)
    return space.flatten([torch.stack([tensor.detach() for tensor in tensors]) for tensors in parts])


def wide(tensor: Tensor) -> Tensor:
    """In float64, on the device or, where that has none, on the CPU."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).to(torch.float64)


def norms(columns: Tensor) -> Tensor:
    """``(batch, k)``, norms of columns ``(batch, size, k)`` in float64 on the CPU.

    Part by part: of long columns, memory for all of them in float64 takes longer to get than they take to square.
    """
    rows = max(1, _PART // max(1, columns.shape[0] * columns.shape[2]))
    parts = [torch.linalg.vector_norm(wide(part), dim=1) for part in torch.split(columns, rows, dim=1)]
    found: Tensor = parts[0] if len(parts) == 1 else torch.linalg.vector_norm(torch.stack(parts), dim=0)
    return found.cpu()


@dataclass(frozen=True)
class Cotangents:
    """Columns that stand for 2^powers times themselves; made by `balanced`.

    A product with a power of two is exact, so that a chain of linear maps gives the same digits in whatever units the
    cotangent came, and as if the range of the dtype had no ends.

    Attributes:
        columns: ``(batch, size, k)``; the largest entry of each is in [1/2, 1), unless it is zero or not finite.
        powers: ``(batch, k)``, float64 on the CPU.
    """

    columns: Tensor
    powers: Tensor

    @cached_property
    def own_logs(self) -> Tensor:
        """``(batch, k)``, log of the norm of the columns themselves; -inf for zero."""
        return norms(self.columns).log()

    @property
    def log_norms(self) -> Tensor:
        """``(batch, k)``, log of the norm of what the columns stand for; -inf for zero."""
        return self.own_logs + math.log(2) * self.powers

    @property
    def gone(self) -> Tensor:
        """``(batch, k)``, where nothing is left."""
        return self.own_logs.isneginf()

    def back(self, pull: Callable[[Tensor], Tensor]) -> Cotangents:
        """What comes back through a linear map, of which ``pull`` is the transposed product."""
        return balanced(pull(self.columns), self.powers)

    def growth_to(self, later: Cotangents) -> Tensor:
        """``(batch, k)``, log of the norm of ``later`` over that of these; -inf for 0 over something, NaN for 0 over 0.

        Powers are subtracted before they meet a logarithm, so that units leave no trace, not even in the last bit.
        """
        growth = later.own_logs - self.own_logs + math.log(2) * (later.powers - self.powers)
        return torch.where(self.gone & later.gone, math.nan, growth)

    def mixed(self, others: Tensor, chosen: Tensor) -> Cotangents:
        """The same, with the columns of ``others`` where ``chosen`` ``(batch, k)``; those are balanced as well."""
        columns = torch.where(chosen.to(self.columns.device).unsqueeze(1), others, self.columns)
        return balanced(columns, self.powers)


def balanced(columns: Tensor, powers: Tensor | None = None) -> Cotangents:
    """Columns ``(batch, size, k)`` multiplied by powers of two, which is exact, until their largest entry is near 1.

    Args:
        columns: the cotangents.
        powers: ``(batch, k)``, powers of two taken out of them before; none by default.

    Example:
        >>> found = balanced(torch.tensor([[[2.0**-140], [2.0**-141]]]))
        >>> found.columns.flatten().tolist(), found.powers.tolist()
        ([0.5, 0.25], [[-139.0]])
    """
    batch, _, k = columns.shape
    powers = torch.zeros(batch, k, dtype=torch.float64) if powers is None else powers
    if not columns.numel():
        return Cotangents(columns, powers)
    # half precision cannot hold the powers of two that it may need, so it is multiplied in single
    working = torch.promote_types(columns.dtype, torch.float32)
    largest = torch.maximum(columns.amax(1), -columns.amin(1)).to("cpu").to(torch.float64)
    shift = torch.frexp(largest).exponent.to(torch.float64)
    shift = torch.where(largest.isfinite() & (largest > 0), shift, 0.0)
    if not bool(shift.any()):
        return Cotangents(columns, powers)
    scaled, left = columns.to(working), shift
    limit = -math.log2(torch.finfo(working).smallest_normal)
    while bool(left.any()):  # twice, where the numbers were subnormal
        part = left.clamp(-limit, limit)
        scaled = scaled * torch.exp2(-part).to(scaled).unsqueeze(1)
        left = left - part
    return Cotangents(scaled.to(columns.dtype), powers + shift)
