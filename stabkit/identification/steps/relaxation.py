"""Several stages of a field f(x) = g(x) - c x, which an affine normal form shows as stages of g alone.

The normal form moves the linear part of the field into the coefficients: k_i = g(Y_i) - c Y_i turns Y = 1 x + A k into
Y = (I + c A)^-1 (1 x + A g). The stage inputs tell c, since U' = 1 - c A' 1 with A' = (I + c A)^-1 A, and then
A = A' (I - c A')^-1. A single stage cannot tell it: (1 - c h) x + h g(x) is a damped skip as well.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from stabkit.identification.form.tableau import Blocks

_CLOSE = 1e-9


def with_linear_part(found: Blocks) -> tuple[Blocks, float] | None:
    """The tableau of f = g - c x, and c; None where the stages do not fit such a field, or c is zero.

    Example:
        >>> import numpy as np
        >>> h, c = 0.5, 2.0  # the midpoint method on f = g - 2 x, with g as its stage
        >>> A, b = np.array([[0, 0], [h / 2, 0]]), np.array([0, h])
        >>> inverse = np.linalg.inv(np.eye(2) + c * A)
        >>> U = inverse @ np.ones((2, 1))
        >>> B = (b - c * b @ inverse @ A)[None]
        >>> leaking = Blocks(inverse @ A, U, B, 1 - c * b[None] @ U, (0, 0), ())
        >>> tableau, c = with_linear_part(leaking)
        >>> tableau.A.round(6).tolist(), tableau.B.round(6).tolist(), round(c, 6)
        ([[0.0, 0.0], [0.25, 0.0]], [[0.0, 0.5]], 2.0)
    """
    size = len(found.A)
    if size < 2 or found.n_fields != 1 or found.U.shape[1] != 1:
        return None
    sums = found.A.sum(axis=1)
    told = np.abs(sums) > _CLOSE
    if not told.any():
        return None
    rates = (1.0 - found.U[told, 0]) / sums[told]
    c = float(rates[0])
    if abs(c) <= _CLOSE or not np.allclose(rates, c, atol=_CLOSE) or not np.allclose(found.U[~told], 1.0, atol=_CLOSE):
        return None
    back = np.linalg.inv(np.eye(size) - c * found.A)
    A, B = found.A @ back, found.B @ back
    if not np.allclose(found.V[0, 0], 1.0 - c * float((B @ found.U)[0, 0]), atol=_CLOSE):
        return None
    recorded = tuple(None if field is None else replace(field, linear=c) for field in found.recorded)
    return replace(found, A=A, B=B, U=np.ones((size, 1)), V=np.ones((1, 1)), recorded=recorded), c
