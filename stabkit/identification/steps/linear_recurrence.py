"""The map of one time step that is affine in its state: its matrix, by the structure that two random products confirm.

Where a state-space layer is run as a loop, h' = a h + u, a multiplies every entry by a number of its own, or couples a
few of them: position and velocity of an oscillator, or all entries along one axis. A product with the transposed matrix
for each coupled entry then gives all of it, whatever the size of the state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from stabkit.tracing.graph.values import Meta, random_of

_ROUNDINGS = 1e3  # multiple of the rounding unit by which orders of addition may differ
_WIDEST = 64  # entries along an axis that are told apart, each by a product


class TimeStep(Protocol):
    """The map of one time step, affine in its state."""

    @property
    def source_metas(self) -> list[Meta]:
        """Shape, dtype and device of every tensor of the state before."""

    @property
    def target_metas(self) -> list[Meta]:
        """The same of the state after."""

    def vjp(self, cotangents: Sequence[Tensor]) -> list[Tensor]:
        """Cotangents of the state after pulled back to that before."""


@dataclass(frozen=True, eq=False)
class Coupling:
    """The matrix of one time step, in blocks.

    Attributes:
        blocks: ``(..., r, r)``, complex where the state is; ``r = 1`` where every entry has a number of its own.
        residual: relative deviation of a random product from that of these blocks.
        kind: ``"diagonal"``, ``"states"`` (several tensors, entry by entry) or ``"axis"`` (entries along an axis).
    """

    blocks: Tensor
    residual: float
    kind: str

    @property
    def size(self) -> int:
        """How many entries are coupled."""
        return int(self.blocks.shape[-1])

    def eigenvalues(self) -> np.ndarray[tuple[int, ...], np.dtype[np.complex128]]:
        """Of all blocks that differ, ``(blocks, r)``."""
        flat = self.blocks.reshape(-1, self.size, self.size)
        flat = torch.unique(torch.view_as_real(flat.to(torch.complex128)), dim=0)
        return np.linalg.eigvals(torch.view_as_complex(flat.contiguous()).numpy())


def coupling(segment: TimeStep) -> Coupling | None:
    """How the state after a time step depends on that before; None where more than one axis is coupled.

    Args:
        segment: the map of one time step, affine in its state, between tensors of the same shapes.
    """
    metas = segment.target_metas
    if [m.shape for m in segment.source_metas] != [m.shape for m in metas] or len({m.shape for m in metas}) != 1:
        return None
    ones = [torch.ones(m.shape, dtype=m.dtype, device=m.device) for m in metas]
    limit = _ROUNDINGS * torch.finfo(metas[0].dtype).eps
    found = _tested(segment, _over_states(segment, ones))
    if found.residual <= limit or len(metas) > 1:
        return found if found.residual <= limit else None
    shape = metas[0].shape
    for axis in sorted(range(len(shape)), key=lambda axis: (shape[axis], -axis)):
        if 1 < shape[axis] <= _WIDEST:
            found = _tested(segment, _along(segment, ones[0], axis))
            if found.residual <= limit:
                return found
    return None


def _over_states(segment: TimeStep, ones: Sequence[Tensor]) -> Coupling:
    """The blocks if every entry of a tensor answers to the like entries of the tensors alone."""
    rows = []
    for i in range(len(ones)):
        given = [one if i == j else torch.zeros_like(one) for j, one in enumerate(ones)]
        rows.append(torch.stack([t.conj().cpu() for t in segment.vjp(given)], dim=-1))
    blocks = torch.stack(rows, dim=-2)
    return Coupling(blocks, 0.0, "diagonal" if len(ones) == 1 else "states")


def _along(segment: TimeStep, ones: Tensor, axis: int) -> Coupling:
    """The blocks if every entry answers to those along one axis alone."""
    rows = []
    for i in range(ones.shape[axis]):
        given = torch.zeros_like(ones)
        given.select(axis, i).fill_(1.0)
        rows.append(segment.vjp([given])[0].conj().cpu().movedim(axis, -1))
    return Coupling(torch.stack(rows, dim=-2), 0.0, f"axis {axis}")


def _tested(segment: TimeStep, found: Coupling) -> Coupling:
    """The blocks with how far two random products are from theirs."""
    worst = 0.0
    for seed in range(2):
        w = random_of(segment.target_metas, seed)
        exact = [t.cpu() for t in segment.vjp(w)]
        ours = _product(found, [t.cpu() for t in w])
        off = sum(float((a - b).norm()) ** 2 for a, b in zip(exact, ours, strict=True))
        size = sum(float(a.norm()) ** 2 for a in exact)
        worst = max(worst, (off / size) ** 0.5 if size > 0 else float(off > 0))
    return replace(found, residual=worst)


def _product(found: Coupling, w: Sequence[Tensor]) -> list[Tensor]:
    """The transposed blocks times some cotangents."""
    if found.kind.startswith("axis"):
        axis = int(found.kind.split()[1])
        pulled = torch.einsum("...ij,...i->...j", found.blocks.conj(), w[0].movedim(axis, -1))
        return [pulled.movedim(-1, axis)]
    stacked = torch.stack(list(w), dim=-1)
    return list(torch.einsum("...ij,...i->...j", found.blocks.conj(), stacked).unbind(-1))
