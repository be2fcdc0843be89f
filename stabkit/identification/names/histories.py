"""Steps of one state that hold several steps of a two-step method, whose older state begins and ends inside of them.

    y_(k+1) = y_k + m (y_k - y_(k-1)) + w f_k(y_k),    y_0 = x,  y_(-1) = x or 0,

is a chain of stages in the tableau of x: y_k = u_k x + w sum_j (1 + m + ... + m^(k-j-1)) f_j. With m = 1 it is the
method of Stormer and Verlet for x'' = f(x), with m < 1 a momentum. With half of w in the first of them the velocity
begins at a constant, drawn or zero, and is kicked by half: a transition of Hamiltonian Monte Carlo (Neal 2011).

Other methods keep a velocity or a second solution, which begin at what the first stage says: asynchronous leapfrog,
reversible Heun (see ``multistep.leapfrog``) and the two-step midpoint rule behind a step of Euler's.
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


def whole_solve(found: Blocks) -> tuple[str, float] | None:
    """Name and step size of several steps of a method that keeps something, from its beginning on; None for others."""
    s = len(found.A)
    kept = np.allclose(found.U, 1.0) and np.allclose(found.V, 1.0)
    if s < _FEWEST or not (kept and found.shared and found.n_fields == 1) or not found.A[1, 0]:
        return None
    rows, first = np.vstack([found.A, found.B[0]]), float(found.A[1, 0])
    eta = float(found.A[2, 1]) / (4 * first)
    solves = (
        (f"{s - 1} steps of asynchronous leapfrog (ALF, eta = {eta:.3g})", 2 * first, _asynchronous(s, 2 * first, eta)),
        (f"{s - 1} steps of reversible Heun", first, _reversible_heun(s, first)),
        (f"{s} steps of leapfrog (two-step midpoint rule, the first one of Euler)", first, _midpoint(s, first)),
    )
    scale = _CLOSE * float(np.abs(rows).max())
    return next((solve[:2] for solve in solves if np.allclose(rows, solve[2], rtol=0, atol=scale)), None)


def _asynchronous(s: int, h: float, eta: float) -> Matrix:
    """Where the field is taken, and the end: z_half = z + h v / 2, v' = v + 2 eta (f(z_half) - v), z' = z_half + ..."""
    e, z = np.eye(s), np.zeros(s)
    v, rows = e[0], [z]
    for k in range(1, s):
        half = z + h / 2 * v
        v = v + 2 * eta * (e[k] - v)
        z = half + h / 2 * v
        rows.append(half)
    return np.array([*rows, z])


def _reversible_heun(s: int, h: float) -> Matrix:
    """The same of z' = 2 x - z + h f(z), x' = x + h (f(z) + f(z')) / 2."""
    e, x, z = np.eye(s), np.zeros(s), np.zeros(s)
    rows = [z]
    for k in range(1, s):
        z = 2 * x - z + h * e[k - 1]
        x = x + h / 2 * (e[k - 1] + e[k])
        rows.append(z)
    return np.array([*rows, x])


def _midpoint(s: int, h: float) -> Matrix:
    """The same of x_1 = x + h f(x), x_(n+1) = x_(n-1) + 2 h f(x_n)."""
    e = np.eye(s)
    rows = [np.zeros(s), h * e[0]]
    for k in range(1, s):
        rows.append(rows[-2] + 2 * h * e[k])
    return np.array(rows)


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
