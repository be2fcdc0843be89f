"""Names of methods: pattern matches on the tableau, on which stages share weights, and on the stability matrix."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from stabkit import integrators
from stabkit.identification.tableau import Blocks, Matrix, step_size
from stabkit.integrators import GeneralLinearMethod

_CLOSE = 1e-6  # coefficients of single precision networks
_POINTS = np.random.default_rng(0).normal(size=(12, 2)) @ np.array([1, 1j])


@dataclass(frozen=True)
class Name:
    """What a tableau is called.

    Attributes:
        name: its name.
        system: the continuous system that it integrates, in words.
        h: its step size.
        convention: how h was fixed.
        order: of the system: 2 when a second derivative answers to the field, so that z = h^2 times its eigenvalue.
    """

    name: str
    system: str
    h: float
    convention: str
    order: int = 1

    @property
    def unit(self) -> float:
        """What multiplies the eigenvalue of a field in z."""
        return self.h**self.order


def name_one_state(found: Blocks) -> Name:
    """The name of a one-state tableau."""
    h, convention = step_size(found)
    a = float(found.V[0, 0])
    stages = len(found.A)
    if stages == 0:
        return Name("no branch", "none: nothing is added to the state", h, convention)
    if not found.B.any() and a == 1.0:
        return Name("forward Euler", "x' = f(x), with a step that is zero now", h, convention)
    if stages == 1:
        return _single_stage(a, h, convention)
    if found.shared and found.n_fields == 1:
        return _runge_kutta(found, a, h, convention)
    if _is_poly(found, h):
        return Name("PolyNet (poly-2)", "x' = f(x), a truncated backward Euler step (I - f)^-1", h, convention)
    if a == 0.0:
        return Name("plain", "none: a map without a skip, of several columns", h, convention)
    if not found.A.any():
        what = "forward Euler, parallel branches" if a == 1.0 else _scaled("parallel branches", a)
        return Name(what, "x' = f_1(x) + f_2(x) + ..., all evaluated at one point", h, convention)
    return Name(_composed(found, h, a), "x' = f_1(x) + f_2(x) + ...", h, convention)


def _single_stage(a: float, h: float, convention: str) -> Name:
    if a == 1.0:
        return Name("forward Euler", "x' = f(x)", h, convention)
    if a == 0.0:
        return Name("plain", "none: a map without a skip", h, convention)
    if 0.0 < a < 1.0:
        leak = abs(a + h - 1.0) <= _CLOSE
        system = f"x' = f(x) - x, Euler with h = {h:.3g}" if leak else "x' = f(x) - lambda x"
        return Name(f"damped Euler (a = {a:.3g})", system, h, convention)
    return Name(f"scaled skip (a = {a:.3g})", "none: the skip amplifies", h, convention)


def _scaled(what: str, a: float) -> str:
    return f"damped Euler (a = {a:.3g}), {what}" if 0 < a < 1 else f"scaled skip (a = {a:.3g}), {what}"


def _is_poly(found: Blocks, h: float) -> bool:
    chained = np.array([[0.0, 0.0], [1.0, 0.0]])
    return (
        len(found.rows) == 2
        and bool(found.V[0, 0] == 1.0)
        and np.allclose(found.A, chained)
        and np.allclose(found.U.ravel(), [1, 0])
        and np.allclose(found.B.ravel() / h, [1, 1])
    )


def _runge_kutta(found: Blocks, a: float, h: float, convention: str) -> Name:
    system = "x' = f(x), several stages of one field"
    if _is_poly(found, found.B.ravel()[0]):  # its stages feed on each other without the state
        return Name("PolyNet (poly-2)", "x' = f(x), a truncated backward Euler step", 1.0, "h = 1: f enters as it is")
    method = found.method(h)
    for name, other in _catalogue(method.stages):
        ours, theirs = (method.A, method.B, method.U, method.V), (other.A, other.B, other.U, other.V)
        if all(np.allclose(x, y, atol=_CLOSE) for x, y in zip(ours, theirs, strict=True)):
            return Name(name, system, h, convention)
    steps = _repeats(found, h)
    if steps is not None:
        return Name(steps, system, h, convention)
    if a == 0.0:
        return Name("plain", "none: a map without a skip, applied several times", 1.0, "h = 1")
    if a != 1.0 or not np.allclose(found.U, 1.0):
        return Name("unnamed", "none that is consistent", h, convention)
    alike = [name for name, other in _catalogue(None) if _same_function(method, other)]
    hint = f", R(z) of {alike[0]}" if alike else ""
    return Name(f"unnamed Runge-Kutta ({method.stages} stages, order {_order(method)}{hint})", system, h, convention)


def _order(method: GeneralLinearMethod) -> int:
    """The order up to the rounding of single precision: conditions up to order 4, Hairer, Norsett and Wanner, II.2."""
    A, b = method.A, method.B[0]
    c, one = A.sum(axis=1), np.ones(method.stages)
    conditions = [
        [(one, 1.0)],
        [(c, 1 / 2)],
        [(c**2, 1 / 3), (A @ c, 1 / 6)],
        [(c**3, 1 / 4), (c * (A @ c), 1 / 8), (A @ c**2, 1 / 12), (A @ A @ c, 1 / 24)],
    ]
    for order, row in enumerate(conditions):
        if any(abs(b @ weight - value) > 1e-5 for weight, value in row):
            return order
    return 4


def _same_function(method: GeneralLinearMethod, other: GeneralLinearMethod) -> bool:
    ours, theirs = method.stability_matrix(_POINTS)[:, 0, 0], other.stability_matrix(_POINTS)[:, 0, 0]
    return bool(np.abs(ours - theirs).max() <= _CLOSE * np.abs(theirs).max())


@cache
def _catalogue(stages: int | None) -> tuple[tuple[str, GeneralLinearMethod], ...]:
    """One-state, one-field explicit Runge-Kutta methods of the catalogue."""
    explicit = []
    for name in integrators.names():
        method: Any = integrators.named(name)
        if not isinstance(method, GeneralLinearMethod) or method.states != 1 or method.n_fields != 1:
            continue
        if method.is_explicit and np.allclose(method.V, 1.0) and np.allclose(method.U, 1.0):
            explicit.append((name, method))
    return tuple((n, m) for n, m in explicit if stages is None or m.stages == stages)


def _repeats(found: Blocks, h: float) -> str | None:
    """``"5 steps of rk4"`` for a block lower triangular tableau of equal blocks."""
    s = len(found.rows)
    for count in range(s, 1, -1):
        size = s // count
        if size * count != s:
            continue
        b = found.B[0, :size]
        blocks = [found.A[i : i + size, i : i + size] for i in range(0, s, size)]
        alike = all(np.allclose(block, blocks[0], atol=_CLOSE * h) for block in blocks)
        carried = all(np.allclose(found.A[i:, i - size : i], b, atol=_CLOSE * h) for i in range(size, s, size))
        if not alike or not carried or not np.allclose(found.B[0], np.tile(b, count), atol=_CLOSE * h):
            continue
        one = Blocks(blocks[0], found.U[:size], b[None], found.V, found.fields[:size], found.rows[:size])
        return f"{count} steps of {name_one_state(one).name}"
    return None


def _composed(found: Blocks, h: float, a: float) -> str:
    """A sequence of Euler steps of different fields."""
    b = found.B[0] / h
    s = len(found.rows)
    if a != 1.0:
        return f"composition of {s} stages, a = {a:.3g}"
    lower = np.array([[b[j] if j < i else 0.0 for j in range(s)] for i in range(s)])
    if np.allclose(found.A / h, lower, atol=_CLOSE) and np.allclose(found.U, 1.0):
        if s >= 3 and np.allclose(b, b[::-1]) and np.allclose(b[[0, -1]], 0.5) and np.allclose(b[1:-1], 1.0):
            return "Strang-ordered splitting (Macaron)"
        if np.allclose(b, 1.0):
            return f"Lie splitting ({s} Euler steps)"
        return f"splitting of {s} Euler steps, weights {', '.join(f'{x:.3g}' for x in b)}"
    return f"unnamed ({s} stages of different fields)"


# ---------------------------------------------------------------- several states


def name_several_states(found: Blocks, *, symmetric: bool | None, gated: bool) -> Name:
    """The name of a tableau with several states.

    Args:
        found: the tableau, states in the order in which they were made.
        symmetric: whether the Jacobian of every field is symmetric, as that of a gradient is; None if not measured.
        gated: whether states are multiplied by numbers that depend on the state.
    """
    r = len(found.V)
    one = "h = 1: only the product h f can be seen"
    if found.n_fields == 1 and len(found.rows) == 1 and r == 2:
        name = _two_state_one_stage(found, history=not _has_velocity(found))
        if name is not None:
            return name
    adams = _multistep(found)
    if adams is not None:
        return adams
    if r == 2 and gated:
        return _gated_pair(found)
    if r == 2:
        name = _two_fields(found, symmetric)
        if name is not None:
            return name
    return Name("unnamed", f"a system of {r} states", 1.0, one)


def _has_velocity(found: Blocks) -> bool:
    """Whether one state answers to itself and the field alone: v' = g v + f(x). A two-step method has none."""
    V = found.V
    return any(V[i, i] != 0 and V[i, 1 - i] == 0 and V[1 - i, i] != 0 for i in range(2))


def _two_state_one_stage(found: Blocks, *, history: bool) -> Name | None:
    """Momentum, two-step and second-order methods, told by trace and determinant of M(z), which no scaling changes."""
    method = found.method(1.0)
    z = np.array([0.0, 1.0, -1.0])
    M = method.stability_matrix(z)
    trace = np.trace(M, axis1=1, axis2=2).real
    det = np.linalg.det(M).real
    t0, t1, d0 = trace[0], trace[1] - trace[0], det[0]
    if abs(trace[1] + trace[2] - 2 * t0) > _CLOSE or np.abs(det - d0).max() > _CLOSE or abs(t1) < 1e-300:
        return None if t1 else _oscillator(found)
    c = abs(t1)
    declared = "h: the number that multiplies the branch" if abs(c - 1) > _CLOSE else "h = 1: only h f can be seen"
    if abs(t0) <= _CLOSE and abs(d0 + 1) <= _CLOSE:
        return Name("leapfrog", "x' = f(x), two-step midpoint rule", c / 2, "h: half the number before the branch")
    if abs(t0 - 2) <= _CLOSE and abs(d0 - 1) <= _CLOSE:
        form = "second_order_leapfrog" if history else "symplectic Euler (position, velocity)"
        return Name(form, "x'' = f(x)", math.sqrt(c), "h: h^2 multiplies the force", 2)
    if history and abs(t0 - 1 - d0) <= _CLOSE:
        return Name(f"two-step (LM-ResNet, k = {-d0:.3g})", "(1 + k) x' + (1 - k)/2 h x'' = f(x)", c, declared)
    if abs(t0 - 1 - d0) <= _CLOSE and 0 < d0 < 1:
        return Name(f"momentum (gamma = {d0:.3g})", "eps x'' + x' = f(x), eps = 1/(1 - gamma)", c, declared)
    return _oscillator(found)


def _multistep(found: Blocks) -> Name | None:
    """Adams-Bashforth and other catalogue methods with as many states, by the characteristic polynomial."""
    if found.n_fields != 1:
        return None
    left = _left_vector(found.V)
    if left is None:
        return None
    h = float(abs((left @ found.B).sum()))
    if h < 1e-12:
        return None
    method = found.method(h)
    ours = [np.poly(M) for M in method.stability_matrix(_POINTS)]
    for name in integrators.names():
        other: Any = integrators.named(name)
        if not isinstance(other, GeneralLinearMethod) or other.states != method.states or other.n_fields != 1:
            continue
        if other.is_explicit and all(
            np.allclose(mine, np.poly(M), atol=_CLOSE * 10)
            for mine, M in zip(ours, other.stability_matrix(_POINTS), strict=True)
        ):
            return Name(name, "x' = f(x), multistep", h, "h: the sum of the weights of all stages")
    return None


def _left_vector(V: Matrix) -> Matrix | None:
    """Y with y V = y and y u = 1 for the right eigenvector u whose first nonzero entry is 1."""
    values, right = np.linalg.eig(V)
    place = np.flatnonzero(np.abs(values - 1) < _CLOSE)
    if place.size != 1:
        return None
    u = right[:, place[0]].real
    u = u / u[np.argmax(np.abs(u))]
    values, left = np.linalg.eig(V.T)
    y = left[:, np.argmin(np.abs(values - 1))].real
    product: Matrix = y / (y @ u)
    return product


def _gated_pair(found: Blocks) -> Name:
    one = "h: the gates, which depend on the state; their means are shown"
    V, B = found.V, found.B
    kept = [i for i in range(2) if V[i].any()]
    if len(kept) == 1:
        return Name("gated memory cell (LSTM)", "c' = -(1 - f) c + i g with h read out of c", 1.0, one)
    diagonal = np.allclose(V, np.diag(np.diag(V)))
    reads = [set(np.flatnonzero(found.U[j]).tolist()) for j in range(len(found.rows)) if B[:, j].any()]
    if diagonal and any(len(r) > 0 for r in reads):
        return Name(
            "gated Gauss-Seidel Euler of two states (LEM)", "tau_i(x) x_i' = f_i - x_i, two time scales", 1.0, one
        )
    return Name("unnamed gated pair", "a system of two gated states", 1.0, one)


def _two_fields(found: Blocks, symmetric: bool | None) -> Name | None:
    """Reversible couplings, and position-velocity systems whose position moves by the new velocity."""
    crossed = np.allclose(found.V, np.eye(2)) and len(found.rows) == 2 and not found.A[:, 1].any()
    if crossed and not np.allclose(found.A, 0) and not np.any((found.B != 0).sum(axis=0) > 1):
        reads = [int(np.argmax(np.abs(row))) for row in found.U]
        writes = [int(np.argmax(np.abs(column))) for column in found.B.T]
        if reads[0] != writes[0] and reads[1] != writes[1] and set(writes) == {0, 1}:
            h = float(np.abs(found.B).max())
            declared = "h: the number that multiplies the branches" if h != 1 else "h = 1: only h f can be seen"
            if symmetric:
                return Name("symplectic Euler (Hamiltonian)", "p' = -dH/dq, q' = dH/dp", h, declared)
            return Name("reversible (two-stream symplectic Euler)", "p' = F(q), q' = G(p)", h, declared)
    return _oscillator(found)


def _oscillator(found: Blocks) -> Name | None:
    """Y'' = f - gamma y - epsilon y' by symplectic Euler: the new position is the old one plus dt the new velocity."""
    for y, v in ((0, 1), (1, 0)):
        unit = np.eye(2)[y]
        rows = np.concatenate([found.V, found.B], axis=1)
        step = rows[y] - np.concatenate([unit, np.zeros(len(found.rows))])
        weight = rows[v]
        where = np.abs(weight) > 1e-12
        if not where.any():
            continue
        dt = float((step[where] / weight[where]).mean())
        if abs(dt) > 1e-12 and np.allclose(step, dt * weight, atol=_CLOSE * abs(dt)):
            return Name(
                "damped oscillator, symplectic Euler (coRNN)",
                "y'' = f(y, y') - gamma y - epsilon y'",
                1.0,
                f"dt = {abs(dt):.3g}: the number that multiplies the new velocity",
            )
    return None
