"""A momentum with two fields at one point, wherever a round of it is cut: between the fields, or behind both.

    x_(n+1) = x_n + gamma (x_n - x_(n-1)) + h_1 f_1(x_n) + h_2 f_2(x_n)

Trace and determinant of M(z_1, z_2), which no change of the states alters, are 1 + gamma + h_1 z_1 + h_2 z_2 and gamma:
no product z_1 z_2 is in them, as there would be if one field answered to what the other has just moved.
"""

from __future__ import annotations

import numpy as np

from stabkit.identification.form.tableau import Blocks
from stabkit.identification.names.single import CLOSE, Name

_TRIED = ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (2.0, 1.0), (-1.0, 3.0), (1.0, -2.0))


def momentum_of_two_fields(found: Blocks) -> Name | None:
    """The name of a two-state step of two fields that is such a momentum; None for others."""
    if len(found.V) != 2 or len(found.rows) != 2 or found.n_fields != 2 or found.rows[0] is found.rows[1]:
        return None
    trace, det = zip(*(_invariants(found, z) for z in _TRIED), strict=True)
    gamma, slopes = det[0], [trace[1] - trace[0], trace[2] - trace[0]]
    linear = [trace[0] + slopes[0] * z[0] + slopes[1] * z[1] for z in _TRIED]
    scale = 1.0 + max(map(abs, trace))
    near = CLOSE * scale
    fits = np.allclose(det, gamma, rtol=0, atol=near) and np.allclose(trace, linear, rtol=0, atol=near)
    if not fits or not CLOSE < gamma < 1 - CLOSE or abs(trace[0] - 1 - gamma) > CLOSE * scale:
        return None
    if min(map(abs, slopes)) <= CLOSE:
        return None
    h = max(map(abs, slopes))
    numbers = ", ".join(f"{abs(x):.3g}" for x in slopes)
    system = "eps x'' + x' = f_1(x) + f_2(x), eps = 1/(1 - gamma)"
    return Name(f"momentum (gamma = {gamma:.3g}) of two fields at one point", system, h,
                f"h: the largest of the numbers that multiply the fields, {numbers}")  # fmt: skip


def _invariants(found: Blocks, z: tuple[float, float]) -> tuple[float, float]:
    """Trace and determinant of M(z_1, z_2)."""
    Z = np.diag(z)
    M = found.V + found.B @ Z @ np.linalg.solve(np.eye(2) - found.A @ Z, found.U)
    return float(np.trace(M)), float(np.linalg.det(M))
