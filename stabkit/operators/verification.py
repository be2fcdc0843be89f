"""A Jacobian built from structure held against the operator itself, by a random product."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from stabkit.operators.linear_map import LinearMap

_SLACK = 1e3  # multiple of the rounding unit by which orders of addition may differ
_COARSEST = 0.1  # no more in any dtype


def disagreement(J: LinearMap, transposed_product: Callable[[Tensor], Tensor]) -> float:
    """How far a matrix is from an operator, as a multiple of what rounding explains: above 1 it is wrong.

    A random vector u is multiplied with both transposes. An entry of the matrix that is wrong by d changes one entry
    of M^T u by d times a standard normal number, and is seen when that stands out of the rounding of that entry.

    Args:
        J: the operator.
        transposed_product: ``(batch, m) -> (batch, n)``, the products M^T u.
    """
    batch, m, _ = J.shape
    generator = torch.Generator().manual_seed(1)  # not the seed that found the structure
    u = torch.randn(batch, m, generator=generator).to(dtype=J.dtype, device=J.device)
    expected = J.rmatvec(u)
    found = transposed_product(u).to(dtype=expected.dtype, device=expected.device)
    wide = expected.double() if J.device.type != "mps" else expected
    typical = wide.square().mean(1, keepdim=True).sqrt()
    off = (found.to(wide.dtype) - wide).abs() / (wide.abs() + typical).clamp_min(torch.finfo(wide.dtype).tiny)
    worst = float(off.max()) if off.numel() else 0.0
    return worst / tolerance(J) if worst == worst else float("inf")  # nan is never equal to itself


def tolerance(J: LinearMap) -> float:
    """The relative error that rounding explains, by the coarsest dtype on the way."""
    dtypes = {J.dtype}
    if J.origin is not None:
        dtypes |= J.origin.dtypes()
    return min(_SLACK * max(torch.finfo(dtype).eps for dtype in dtypes), _COARSEST)
