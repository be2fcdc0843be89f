"""Two states that move by turns, each multiplied by a number and driven by a field of the other; then mixed by numbers.

    x_1 = a x + b f(y),    y_1 = c y + d g(x_1),    (x', y')^T = P (x_1, y_1)^T.

With a = c = 1 and P = 1 this is a reversible step; EDICT (Wallace et al. 2023) takes steps of DDIM by turns and mixes
the states with P, whose rows sum to one.
"""

from __future__ import annotations

import numpy as np

from stabkit.identification.form.tableau import Blocks
from stabkit.identification.names.single import CLOSE, Name


def alternating_affine(found: Blocks) -> Name | None:
    """The name of a step of two states by turns; None for others, and where the states move by fields alone.

    Of a last state that is mixed afterwards only products of its number with a column of P can be seen: rows of P that
    sum to one tell them apart.
    """
    if len(found.V) != 2 or len(found.rows) != 2 or found.A[0].any() or found.A[1, 1]:
        return _half(found) if len(found.V) == 2 and len(found.rows) == 1 else None
    reads = np.flatnonzero(np.abs(found.U[0]) > CLOSE)
    if len(reads) != 1:
        return None
    last = int(reads[0])  # the state that is read first moves last
    first = 1 - last
    before = float(found.U[0, last]) if found.n_fields == 1 else 1.0
    a, b = float(found.U[1, first]) / before, float(found.A[1, 0]) / before
    V, B = found.V, found.B
    if abs(found.U[1, last]) > CLOSE or abs(a) <= CLOSE or abs(b) <= CLOSE:
        return None
    if not np.allclose(V[:, first] * b, B[:, 0] * a, atol=CLOSE):
        return None
    column = V[:, first] / a
    alone = abs(column[last]) <= CLOSE and abs(V[first, last]) <= CLOSE and abs(column[first] - 1) <= CLOSE
    rest = np.eye(2)[last] if alone else 1.0 - column
    place = int(np.abs(rest).argmax())
    c, d = float(V[place, last] / rest[place]), float(B[place, 1] / rest[place])
    if not np.allclose(rest * c, V[:, last], atol=CLOSE) or not np.allclose(rest * d, B[:, 1], atol=CLOSE):
        return None
    if abs(c) <= CLOSE or abs(d) <= CLOSE or (alone and max(abs(a - 1), abs(c - 1)) <= CLOSE):
        return None
    same = max(abs(a - c), abs(b - d)) <= CLOSE * max(1.0, abs(a), abs(b))
    numbers = f"a = {a:.3g}, b = {b:.3g}" if same else f"a = {a:.3g} and {c:.3g}, b = {b:.3g} and {d:.3g}"
    name = f"alternating affine steps of two states ({numbers})"
    if not alone:
        P = np.c_[column, rest][:, [first, last]]
        rows = "; ".join(", ".join(f"{x:.3g}" for x in row) for row in P)
        name = f"{name}, then linear mixing by ({rows})"
    return _named(name, min(a, c), b)


def _half(found: Blocks) -> Name | None:
    """The states take turns in one loop: s_(n+1) = a s_(n-1) + b f(s_n)."""
    V, u, b = found.V, found.U[0], found.B[:, 0]
    for kept, read in ((0, 1), (1, 0)):  # the state that is read moves up, and what is new follows the other
        a = float(V[read, kept])
        if not (abs(V[kept, read] - 1) <= CLOSE and not V[kept, kept] and not V[read, read] and not u[kept]):
            continue
        if b[kept] or not u[read] or not b[read] or abs(a) <= CLOSE or abs(a - 1) <= CLOSE:
            continue
        return _named(f"alternating affine steps of two states, half a round (a = {a:.3g}, b = {b[read]:.3g})", a,
                      float(b[read]))  # fmt: skip
    return None


def _named(name: str, least: float, b: float) -> Name:
    system = "x' = lambda x + f(y), y' = lambda y + g(x), each by turns"
    if least > 0:
        system += ", exponential Euler with h lambda = log a"
    return Name(name, system, abs(b), "h: the number b that multiplies the first field")
