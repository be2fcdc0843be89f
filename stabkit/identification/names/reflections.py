"""Splittings of 0 in A(x) + B(x) by two resolvents, the second one at the reflected result of the first.

    y = G(z),   z' = z + lambda (F(2 y - z) - y),

G and F the resolvents of A and B: Douglas and Rachford's splitting for lambda = 1 (Lions and Mercier 1979), that of
Peaceman and Rachford, two reflections 2 G - 1 and 2 F - 1 in turn, for lambda = 2. With a third field,
F(2 y - z - gamma H(y)), it is that of Davis and Yin (2017). Averaged reflections, z' = (z + R_F R_G z) / 2, are the
same tableau.
"""

from __future__ import annotations

import numpy as np

from stabkit.identification.form.tableau import Blocks

_CLOSE = 1e-6


def splitting_by_resolvents(found: Blocks) -> tuple[str, str] | None:
    """Name and system of a step of one state and two or three fields; None for others.

    Example:
        >>> import numpy as np
        >>> A, U = np.array([[0.0, 0.0], [2.0, 0.0]]), np.array([[1.0], [-1.0]])
        >>> step = Blocks(A, U, np.array([[-1.0, 1.0]]), np.eye(1), (0, 1), ())
        >>> splitting_by_resolvents(step)[0]
        'Douglas-Rachford splitting'
    """
    s, b = len(found.A), found.B[0]
    if s not in (2, 3) or found.n_fields != s or len(found.V) != 1 or not np.allclose(found.V, 1.0, atol=_CLOSE):
        return None
    last = s - 1
    relaxation = float(abs(b[last]))
    reads = np.zeros(s)
    reads[[0, last]] = 1.0, -1.0
    # the sign of a field that is used once is its own: of the first one only the product of both its uses is the code's
    reflected = abs(float(found.A[last, 0] * b[0]) + 2 * relaxation) <= _CLOSE
    same = abs(abs(float(b[0])) - relaxation) <= _CLOSE and 0 < relaxation <= 2 + _CLOSE
    if not (reflected and same and np.allclose(found.U[:, 0], reads, atol=_CLOSE)):
        return None
    if s == 3:
        if b[1] or abs(abs(float(found.A[1, 0])) - 1) > _CLOSE or not found.A[2, 1]:
            return None
        name, operators = "Davis-Yin splitting", "A(x) + B(x) + C(x), C as it is and A and B by their resolvents"
    else:
        name, operators = "Douglas-Rachford splitting", "A(x) + B(x), both by their resolvents"
        if abs(relaxation - 2) <= _CLOSE:
            return "Peaceman-Rachford splitting", f"0 in {operators}"
    relaxed = "" if abs(relaxation - 1) <= _CLOSE else f" (relaxation {relaxation:.3g})"
    return f"{name}{relaxed}", f"0 in {operators}"
