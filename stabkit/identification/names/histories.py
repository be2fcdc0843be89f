"""Steps of one state that hold several steps of a two-step method, whose older state begins and ends inside of them.

    y_(k+1) = y_k + m (y_k - y_(k-1)) + w f_k(y_k),    y_0 = x,  y_(-1) = x or 0,

is a chain of stages in the tableau of x: y_k = u_k x + w sum_j (1 + m + ... + m^(k-j-1)) f_j. With m = 1 it is the
method of Stormer and Verlet for x'' = f(x), with m < 1 a momentum. With half of w in the first of them the velocity
begins at a constant, drawn or zero, and is kicked by half: a transition of Hamiltonian Monte Carlo (Neal 2011).
"""

from __future__ import annotations

import math

import numpy as np

from stabkit.identification.form.tableau import Blocks, Matrix
from stabkit.identification.names.step_size import with_mass

_CLOSE = 1e-5  # sums of products in single precision
_AT_STATE = "at the state"
_KICKED = "half a kick of a velocity that begins at no state"
_FEWEST = 3  # stages from which a momentum shows: two stages have any ratio of their weights


def steps_with_history(found: Blocks) -> tuple[float, float, str] | None:
    """The numbers m and w of such steps, and how the older state begins; None for other tableaus."""
    s = len(found.A)
    if s < 2 or len({id(stage) for stage in found.rows}) != s or not found.B[0].all():
        return None
    rows, kept = np.vstack([found.A, found.B[0]]), np.append(found.U[:, 0], found.V[0, 0])
    halved = rows * ([2.0] + [1.0] * (s - 1))  # a velocity that is no state, kicked by half at first: Verlet's steps
    kicked = _numbers(halved, kept) if found.shared else None
    if kicked is not None and abs(kicked[0] - 1) <= _CLOSE and kicked[2] == _AT_STATE:
        return 1.0, kicked[1], _KICKED
    return _numbers(rows, kept)


def _numbers(rows: Matrix, kept: Matrix) -> tuple[float, float, str] | None:
    """The numbers m and w, by the weights of fields and state in all y_k, and how the older state begins."""
    s, b = len(rows) - 1, rows[-1]
    w, m = float(b[-1]), float(b[-2] / b[-1]) - 1.0
    if not (abs(m - 1) <= _CLOSE or (s >= _FEWEST and _CLOSE < m < 1)):
        return None
    sums = np.concatenate([[0.0], np.cumsum(m ** np.arange(s))])  # sums[k] = 1 + m + ... + m^(k - 1)
    places = np.arange(s + 1)
    weights = w * sums[np.clip(places[:, None] - places[None, :-1], 0, None)]
    if not np.allclose(rows, weights, rtol=0, atol=_CLOSE * float(np.abs(b).max())):
        return None
    for older, begins in ((1.0, _AT_STATE), (0.0, "at zero")):
        if np.allclose(kept, 1 + m * (1 - older) * sums, rtol=_CLOSE, atol=0):
            return m, w, begins
    return None


def told_of(count: int, m: float, w: float, begins: str) -> tuple[str, str, float, int]:
    """Name, system, step size and order of the system of such steps."""
    if begins == _KICKED:
        return f"{count} steps of stormer_verlet ({_KICKED})", "x'' = f(x)", math.sqrt(abs(w)), 2
    if abs(m - 1) <= _CLOSE:
        same = "in positions as symplectic Euler from velocity 0" if "state" in begins else "Stormer-Verlet"
        name = f"{count} steps of second_order_leapfrog ({same}, the older state begins {begins})"
        return name, "x'' = f(x)", math.sqrt(abs(w)), 2
    name = f"{count} steps of momentum (gamma = {m:.3g}, the older state begins {begins})"
    return name, with_mass(m, abs(w)), abs(w), 1
