"""Which blocks limit the rate: the share of the leading eigenvector in each, and each block's own sharpness."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stabkit.curvature.hessian import Hessian
from stabkit.curvature.lanczos import largest, rows_for
from stabkit.curvature.stability import Preconditioned
from stabkit.errors import ArgumentError, did_you_mean
from stabkit.results import Result

_LOOSE = 1e-2
_MOST = 20  # products for a block


@dataclass(frozen=True)
class BlockCurvature(Result):
    """The part of a block in the largest curvature.

    Attributes:
        name: the path of its module; ``""`` for what the model itself holds.
        share: the part of the squared leading eigenvector that lies in it: v_b^T (H v)_b over the eigenvalue; shares
            sum to 1.
        sharpness: the largest eigenvalue of its own diagonal block, to 1 percent; None where it was not
            asked for.
        converged: whether its search came so near within its 20 products; where not, it is a lower bound.
    """

    name: str
    share: float
    sharpness: float | None = None
    converged: bool = True

    def __str__(self) -> str:
        least = "" if self.converged else "at least "
        own = "" if self.sharpness is None else f", alone {least}{self.sharpness:.4g}"
        return f"{self.name or 'the model'}: {self.share:.0%} of it{own}"


def by_block(
    operator: Preconditioned,
    v: Tensor,
    paths: Sequence[str] | None,
    own: int,
    tol: float,
) -> tuple[BlockCurvature, ...]:
    """Shares of a unit eigenvector, the largest first.

    Args:
        operator: what the eigenvector belongs to.
        v: ``(n,)``, of norm 1.
        paths: of the blocks; what lies in none of them goes by the modules that hold it, as everything does for None.
        own: how many get their own sharpness.
        tol: to what error, 1 percent at best.

    Raises:
        ArgumentError: a path names no module.
    """
    hessian = operator.hessian
    owners = _owners(hessian.module, hessian, paths)
    squares: dict[str, float] = dict.fromkeys(owners, 0.0)
    for name, part in zip(owners, torch.split(v, hessian.sizes), strict=True):
        squares[name] += float(torch.linalg.vector_norm(part)) ** 2
    found = sorted(squares.items(), key=lambda item: -item[1])
    alone = {name: _alone(operator, v, owners, name, max(tol, _LOOSE)) for name, _ in found[:own]}
    if len(found) == 1:
        alone = {}  # it is the whole
    return tuple(BlockCurvature(name, share, *alone.get(name, ())) for name, share in found)


def _owners(module: nn.Module, hessian: Hessian, paths: Sequence[str] | None) -> list[str]:
    """For every parameter the block that it belongs to."""
    names = {id(p): name for name, p in module.named_parameters()}
    holders = [names[id(p)].rpartition(".")[0] for p in hessian.parameters]
    if paths is None:
        return holders
    known = {name for name, _ in module.named_modules()}
    for path in paths:
        if path not in known:
            raise ArgumentError(f"blocks: {path!r} is no module of the model{did_you_mean(path, known)}")
    longest = sorted(paths, key=len, reverse=True)

    def block_of(holder: str) -> str:
        return next((p for p in longest if p in ("", holder) or holder.startswith(f"{p}.")), holder)

    return [block_of(holder) for holder in holders]


def _alone(operator: Preconditioned, v: Tensor, owners: Sequence[str], name: str, tol: float) -> tuple[float, bool]:
    """The largest eigenvalue of one diagonal block and whether that converged.

    The search begins at its part of the whole eigenvector.
    """
    kept = [i for i, owner in enumerate(owners) if owner == name]
    parts = torch.split(v, operator.hessian.sizes)
    start = torch.cat([parts[i] for i in kept])
    if not bool(start.any()):
        return 0.0, True
    inside = operator.part(kept)
    rows = rows_for(len(start), start.dtype.itemsize)
    found = largest(inside.matvec, len(start), 1, tol=tol, start=start, rows=rows, max_products=_MOST)
    operator.hessian.n_products += inside.hessian.n_products
    return float(found.values[0]), bool(found.converged[0])
