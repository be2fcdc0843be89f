"""Runge-Kutta stages whose weights are gates, made of the stages themselves: x' = x + g k_1 + (1 - g) k_2."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from stabkit.identification.form.coefficients import Coefficient
from stabkit.identification.form.normal_form import NormalForm
from stabkit.identification.form.tableau import Blocks
from stabkit.identification.names.single import CLOSE, Name

_SAME = 1e-5  # sums of gates in single precision


def gates_of_stages(sums: Sequence[NormalForm]) -> list[Coefficient]:
    """The gates that weigh the stages of some additions, those of one gate once."""
    found = [c for form in sums for a, c in form.forms[0].items() if a not in form.piece.ends and c.kind == "gate"]
    return [c for i, c in enumerate(found) if not any(_alike(c, other) for other in found[:i])]


def name_weighed(found: Blocks, gates: Sequence[Coefficient]) -> Name | None:
    """The name of several stages of one field that gates weigh; None for others.

    Args:
        found: the tableau, with the mean of each gate.
        gates: those that weigh its stages.
    """
    s = len(found.rows)
    if s < 2 or found.n_fields > 1 or not found.A.any() or not np.allclose(found.U, 1.0) or found.V[0, 0] != 1.0:
        return None
    total = float(found.B.sum())
    convex = abs(total - 1.0) <= _SAME
    system = "x' = f(x), the weights of its stages made of the state: of order 1" if convex else "x' = f(x)"
    told = "h: the sum of the weights of all stages" if convex else "h: the mean of the sum of the weights"
    if s == 2 and len(gates) <= 2 and _complement(gates[0], gates[-1]):
        system += f", and 2 where the second weighs {1 / (2 * float(found.A[1, 0])):.3g}"
        return Name("gated RK2 (2 stages, weights g(x) and 1 - g(x))", system, total, told)
    weights = ", weights that sum to one" if convex else ""
    return Name(f"gated Runge-Kutta ({s} stages, weighed by gates{weights})", system, total, told)


def _complement(a: Coefficient, b: Coefficient) -> bool:
    return abs(a.low + b.high - 1) <= _SAME and abs(a.high + b.low - 1) <= _SAME and abs(a.value + b.value - 1) <= _SAME


def _alike(a: Coefficient, b: Coefficient) -> bool:
    return max(abs(a.low - b.low), abs(a.high - b.high), abs(a.value - b.value)) <= CLOSE
