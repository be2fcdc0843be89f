"""Norms of parameters and of their gradients, and whose parameters are whose."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from stabkit.monitor.blocks import owner
from stabkit.monitor.record import Array

_HALF = (torch.float16, torch.bfloat16)


def local(tensor: Tensor) -> Tensor:
    """The part of a sharded tensor (DTensor) that this rank holds; an ordinary tensor itself."""
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def copies(tensor: Tensor) -> int:
    """On how many ranks each entry of a sharded tensor lives; 1 for an ordinary tensor."""
    placements, mesh = getattr(tensor, "placements", None), getattr(tensor, "device_mesh", None)
    if placements is None or mesh is None:
        return 1
    found = 1
    for dimension, placement in enumerate(placements):
        if placement.is_replicate():
            found *= mesh.size(dimension)
    return found


def is_sharded(parameters: Iterable[Tensor]) -> bool:
    """Whether any of them is a DTensor, whose norm needs the other ranks."""
    return any(hasattr(p, "to_local") for p in parameters)


class Parameters:
    """The parameters of a model and the blocks that they belong to.

    Attributes:
        tensors: the parameters.
        owners: index of the block of each, the number of blocks where it belongs to none.
        plain: whether all are ordinary tensors of one floating dtype wider than half on one device.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[str]) -> None:
        named = list(model.named_parameters())
        self.tensors = [p for _, p in named]
        found = [owner(name, blocks) for name, _ in named]
        self.owners = np.array([len(blocks) if index < 0 else index for index in found], dtype=np.intp)
        self.plain = _plain(self.tensors)

    def norms(self) -> list[Tensor]:
        """Norms of the parameters; see `norms_of`."""
        return norms_of(self.tensors, plain=self.plain)

    def gradients(self, known: Mapping[int, Tensor]) -> tuple[list[Tensor], list[int]]:
        """Norms of their gradients, and the indices of the parameters that have one.

        Args:
            known: norms by ``id`` of the parameter that need not be computed again.
        """
        held = [p.grad for p in self.tensors]
        trained = [i for i, grad in enumerate(held) if grad is not None]
        grads = held if len(trained) == len(held) else [held[i] for i in trained]
        plain = self.plain and not any(g.is_sparse for g in grads if g is not None)
        if not known:
            return norms_of(grads, plain=plain), trained  # type: ignore[arg-type]
        missing = [i for i in trained if id(self.tensors[i]) not in known]
        fresh = dict(zip(missing, norms_of([held[i] for i in missing], plain=plain), strict=True))  # type: ignore[misc]
        return [fresh[i] if i in fresh else known[id(self.tensors[i])] for i in trained], trained

    def wide(self, norms: Array, trained: Sequence[int]) -> Array:
        """Norms of gradients of which those that are infinite were taken again in double precision.

        Args:
            norms: as `gradients` gave them, on the host.
            trained: the indices of their parameters.
        """
        for place in np.flatnonzero(np.isposinf(norms)).tolist():
            grad = self.tensors[trained[place]].grad
            if grad is not None and not grad.is_sparse:
                norms[place] = float(norms_of([grad.double()], plain=False)[0])
        return norms


def _plain(tensors: Sequence[Tensor]) -> bool:
    kinds = {(type(t), t.dtype, t.device) for t in tensors}
    if len(kinds) != 1:
        return False
    ((kind, dtype, _),) = kinds
    return kind in (Tensor, nn.Parameter) and dtype in (torch.float32, torch.float64)


@torch.no_grad()
def norms_of(tensors: Sequence[Tensor], *, plain: bool | None = None) -> list[Tensor]:
    """Euclidean norms by one fused call for every device and dtype; of this rank's part of sharded tensors.

    The norm of a part that lives on several ranks is divided by the root of their number, so that the squares of all
    ranks add up to the square of the norm of the whole.

    Args:
        tensors: any; complex, sparse and half precision ones as well.
        plain: whether they are known to be dense, of one kind, and neither sharded nor in half precision.
    """
    if not tensors:
        return []
    if plain:
        return list(torch._foreach_norm(list(tensors)))
    parts = [local(t) for t in tensors]
    found: list[Tensor] = list(parts)
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, part in enumerate(parts):
        if part.is_sparse:
            found[index] = torch.linalg.vector_norm(part.coalesce().values())
        else:
            groups.setdefault((part.device, part.dtype), []).append(index)
    for (_, dtype), indices in groups.items():
        wide = torch.float32 if dtype in _HALF else None
        for index, value in zip(indices, torch._foreach_norm([parts[i] for i in indices], 2, wide), strict=True):
            found[index] = value
    shared = [copies(tensor) for tensor in tensors]
    return [value if count == 1 else value / count**0.5 for value, count in zip(found, shared, strict=True)]
