"""Names of methods that remember: values of the field (Adams, with or without a linear part), or states (delays).

    x' = a x + h sum_j b_j f_j,    f_0 = f(x), f_1, f_2, ... its values in the steps before.

With a = 1 these are methods of Adams and Bashforth, on equal steps or others. With another a the field alone is
extrapolated and the linear part is carried on exactly (Cox and Matthews 2002, ETD; Zhang and Chen 2023, DEIS), or its
values are combined as on equal steps (Liu et al. 2022, PNDM).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from stabkit import integrators
from stabkit.identification.form.tableau import Blocks, Matrix
from stabkit.identification.names.single import CLOSE, POINTS, Name
from stabkit.integrators import GeneralLinearMethod, bdf

_ROUNDS = 3  # evaluations, at least, that make an iteration: two are a method of two stages
_COUNTS = ("one step", "two steps", "three steps", "four steps", "five steps", "six steps")
_SUM = "h: the sum of the weights of all values of the field"
_NEWTON = 50  # iterations; from equal steps some five are enough


@dataclass(frozen=True)
class Memory:
    """A solution, and the values of its field in the steps before.

    Attributes:
        x: the place of the solution among the states.
        order: those of the values, the newest first.
        stage: the stage whose value is kept.
        scale: what multiplies it there.
    """

    x: int
    order: tuple[int, ...]
    stage: int
    scale: float


def memory_of(found: Blocks, x: int) -> Memory | None:
    """The states other than ``x`` as values of the field that are handed on; None where they are something else."""
    others = [i for i in range(len(found.V)) if i != x]
    fresh = [i for i in others if not found.V[i].any() and np.count_nonzero(found.B[i]) == 1]
    if len(fresh) != 1:
        return None
    order = fresh[:]
    while len(order) < len(others):
        newer = np.eye(len(found.V))[order[-1]]
        follows = [i for i in others if not found.B[i].any() and np.array_equal(found.V[i], newer)]
        if len(follows) != 1 or follows[0] in order:
            return None
        order += follows
    stage = int(np.flatnonzero(found.B[fresh[0]])[0])
    return Memory(x, tuple(order), stage, float(found.B[fresh[0], stage]))


def without_kept_values(found: Blocks) -> Blocks | None:
    """A tableau of one field that evaluates again what was kept of the step before; None where nothing such is kept.

    A state k = f(Y) whose argument is a combination of the new states is the first stage of the next step already
    (velocity Verlet, which keeps the force at the new position): there it is f at that combination of the old states.
    """
    if found.n_fields != 1 or len(found.V) < 2:
        return None
    for i in range(len(found.V)):
        stages = np.flatnonzero(found.B[i])
        if found.V[i].any() or len(stages) != 1:
            continue
        stage, scale = int(stages[0]), float(found.B[i, stages[0]])
        others = [j for j in range(len(found.V)) if j != i]
        made = np.hstack([found.V, found.B])[others]
        argument = np.concatenate([found.U[stage], found.A[stage]])
        taken = np.linalg.lstsq(made.T, argument, rcond=None)[0]
        if np.abs(taken @ made - argument).max() > CLOSE * np.abs(argument).max():
            continue
        first = np.zeros((1, len(found.A) + 1))
        A = np.vstack([first, np.hstack([scale * found.U[:, [i]], found.A])])
        U = np.vstack([taken, found.U[:, others]])
        B = np.hstack([scale * found.V[np.ix_(others, [i])], found.B[others]])
        rows, recorded = found.rows[:1] + found.rows, (None, *(found.recorded or [None] * len(found.A)))
        kept = [j for j in range(len(A)) if B[:, j].any() or A[:, j].any()]  # what the next step alone reads is none
        told = tuple(rows[j] for j in kept), tuple(recorded[j] for j in kept)
        V = found.V[np.ix_(others, others)]
        return Blocks(A[np.ix_(kept, kept)], U[kept], B[:, kept], V, (0,) * len(kept), *told)
    return None


def without_unread_directions(found: Blocks) -> Blocks | None:
    """A tableau of two states for one of more, of which no field ever reads more than two sums; None for others.

    Velocity Verlet that keeps the velocity and the force at the new position carries v + h f / 2, the velocity at the
    middle of the step, in two values. What fields read now or later are the rows of U, U V, U V^2, ... (Kalman 1963,
    observability). The first is the position, the second what it moves by.
    """
    reads = np.unique(found.U, axis=0)
    if len(reads) != 1:
        return None
    now, r = reads[0], len(found.V)
    later = [now]
    for _ in range(r - 1):
        later.append(later[-1] @ found.V)
    moves = later[1] - now
    if np.linalg.matrix_rank(np.array(later), tol=CLOSE * 10) != 2 or np.linalg.norm(moves) <= CLOSE:
        return None
    T = np.array([now, moves / np.abs(moves).max()])
    back = np.linalg.pinv(T)
    V = T @ found.V @ back
    V[np.abs(V) <= CLOSE * np.abs(V).max()] = 0.0
    B = T @ found.B
    B[np.abs(B) <= CLOSE * np.abs(B).max(initial=0.0)] = 0.0
    return replace(found, U=found.U @ back, B=B, V=V)


def name_multistep(found: Blocks) -> Name | None:
    """The name of a tableau of one field that remembers; None for others."""
    if found.n_fields != 1:
        return None
    return _of_catalogue(found) or _iterated(found) or _delayed(found) or _adams(found)


def _iterated(found: Blocks) -> Name | None:
    """Backward differentiation, x' = sum_j a_j x_j + h b f(x'), whose equation is solved by fixed-point iteration.

    Each stage is what the iteration would end with if it ended there, and so has the numbers of the result; the first
    one begins at the newest state.
    """
    r, s = len(found.V), len(found.rows)
    made = np.flatnonzero(found.B.any(axis=1))
    if s < _ROUNDS or len(made) != 1 or not found.B[made[0], -1]:
        return None
    (i,), c = made, float(found.B[made[0], -1])
    a, begin = found.V[i], found.U[0]
    rounds = np.allclose(found.A, c * np.eye(s, k=-1), atol=CLOSE) and np.allclose(found.B[i], c * np.eye(s)[-1])
    if (
        not rounds
        or not np.allclose(found.U[1:], a, atol=CLOSE)
        or not np.array_equal(begin, np.eye(r)[begin.argmax()])
    ):
        return None
    method = bdf(r)
    order: list[int] = []  # from the newest state to the oldest one: where each moves to
    place = int(begin.argmax())
    while len(order) < r and place not in order:
        order.append(place)
        later = [j for j in range(r) if j != i and np.array_equal(found.V[j], np.eye(r)[place])]
        place = later[0] if later else place
    if len(order) < r or not np.allclose(a[order], method.V[0], atol=10 * CLOSE):
        return None
    name = f"bdf{r} (by {s - 1} fixed-point iterations)"
    return Name(name, "x' = f(x), multistep", c / float(method.B[0, 0]), "h: that of the equation which is solved")


def _of_catalogue(found: Blocks) -> Name | None:
    """Methods of the catalogue with as many states, by the characteristic polynomial."""
    left = _left_vector(found.V)
    if left is None:
        return None
    h = float((left @ found.B).sum())
    if abs(h) < 1e-12:
        return None
    method = found.method(h)
    ours = [np.poly(M) for M in method.stability_matrix(POINTS)]
    for name in integrators.names():
        other: Any = integrators.named(name)
        if not isinstance(other, GeneralLinearMethod) or other.states != method.states or other.n_fields != 1:
            continue
        if other.is_explicit and all(
            np.allclose(mine, np.poly(M), atol=CLOSE * 10)
            for mine, M in zip(ours, other.stability_matrix(POINTS), strict=True)
        ):
            if name == "ab2" and _begins_with_last_stage(found, h):
                told = "heun2, its first stage the last one of the step before (M(z) of ab2)"
                return Name(told, "x' = f(x), the first stage not evaluated at x", h, _SUM)
            return leapfrog(found, h) if name == "leapfrog" else Name(name, "x' = f(x), multistep", h, _SUM)
    return None


def _begins_with_last_stage(found: Blocks, h: float) -> bool:
    """Whether Heun's method takes the value at its last prediction for that at its state, as torchdiffeq's does."""
    for x, k in ((0, 1), (1, 0)):
        kept = float(found.B[k].sum())
        numbers = np.array([found.U[0, k], found.V[x, k]]) * kept
        if found.V[x, x] == 1.0 and not found.V[k].any() and np.allclose(numbers, [h, h / 2], atol=CLOSE * abs(h)):
            return bool(len(found.rows) == 1 and found.U[0, x] == 1.0)
    return False


def leapfrog(found: Blocks, h: float) -> Name:
    """The name of a method whose field is evaluated where that of the two-step midpoint rule is.

    Asynchronous leapfrog (Mutze 2013; Zhuang et al. 2021, MALI) and reversible Heun (Kidger et al. 2021) have its
    characteristic polynomial. They differ in what is kept: two states of the same solution, a state and a velocity
    that is reflected at the field, or a state and another that is reflected at it.
    """
    V = found.V
    places = range(len(V))
    system = "x' = f(x), two-step midpoint rule"
    for i in places:
        kept = [j for j in places if abs(V[i, j]) > CLOSE]
        if abs(V[i, i] + 1) > CLOSE:
            continue
        if kept == [i] and found.B[i].any():
            return Name("asynchronous leapfrog (ALF)", "x' = f(x), v' = 2 f(x) - v at the middle of the step", h,
                        "h: what multiplies the mean of the velocities")  # fmt: skip
        if any(abs(V[i, j] - 2) <= CLOSE and abs(V[j, j] - 1) <= CLOSE for j in kept):
            return Name("reversible Heun", "x' = f(x), z' = 2 x - z + h f(z), the field at z alone", h, _SUM)
    return Name("leapfrog", system, h, "h: half the number before the branch")


def _polynomials(found: Blocks) -> tuple[Matrix, Matrix] | None:
    """Rho and sigma with det(zeta - M(z)) = rho - z sigma, highest power first; None where z enters otherwise.

    What both have of the factor zeta is left out: it belongs to values that are kept and not used again.
    """
    method = found.method(1.0)
    minus, rho, plus = (
        np.array(np.poly(M).real, dtype=float) for M in method.stability_matrix(np.array([-1.0, 0.0, 1.0]))
    )
    sigma = (minus - plus) / 2
    if np.abs(minus + plus - 2 * rho).max() > CLOSE:
        return None
    while len(rho) > 1 and abs(rho[-1]) + abs(sigma[-1]) <= CLOSE:
        rho, sigma = rho[:-1], sigma[:-1]
    return rho, sigma


def _delayed(found: Blocks) -> Name | None:
    """x_(n+1) = a x_n + h f(x_(n-k)); and methods that keep a value of the field which they could compute again."""
    polynomials = _polynomials(found)
    if polynomials is None:
        return None
    rho, sigma = polynomials
    used = np.flatnonzero(np.abs(sigma) > CLOSE * np.abs(sigma).max(initial=0.0))
    if len(used) != 1:
        return None
    h, delay = float(sigma[used[0]]), int(used[0]) - 1
    if np.allclose(rho, [1, 0, -1] if len(rho) == 3 else np.inf, atol=CLOSE) and delay == 0:
        return leapfrog(found, h / 2)
    if not _queues_up(found):
        return None
    a = -float(rho[1])
    if delay < 1 or not a > 0 or np.abs(rho[2:]).max(initial=0.0) > CLOSE:
        return None
    declared = "h: the number that multiplies the branch" if abs(h - 1) > CLOSE else "h = 1: only h f can be seen"
    if abs(a - 1) <= CLOSE:
        return Name(f"delayed Euler (k = {delay})", f"x'(t) = f(x(t - {delay} h))", h, declared)
    return Name(f"delayed Euler (a = {a:.3g}, k = {delay})", f"x'(t) = f(x(t - {delay} h)) - lambda x(t)", h, declared)


def _queues_up(found: Blocks) -> bool:
    """Whether one state moves, and all others are made anew or take the place of another: what stays is no queue."""
    rows = np.eye(len(found.V))
    moved = [
        i for i in range(len(rows))
        if (found.V[i].any() and found.B[i].any()) or np.count_nonzero(found.V[i]) > 1
    ]  # fmt: skip
    waiting = [i for i in range(len(rows)) if i not in moved and found.V[i].any()]
    shifted = all(any(np.array_equal(found.V[i], rows[j]) for j in range(len(rows)) if j != i) for i in waiting)
    return len(moved) == 1 and shifted


def _adams(found: Blocks) -> Name | None:
    """Methods of Adams on steps of other sizes than equal ones, or of a field beside a linear part."""
    if len(found.rows) != 1:
        return None
    for x in range(len(found.V)):
        table = _of_the_field_alone(found, x)
        memory = None if table is None else memory_of(table, x)
        if table is None or memory is None or not table.U[0, x] or np.delete(table.U[0], x).any():
            continue
        a = float(table.V[x, x])
        weights = np.array([table.B[x, 0], *(table.V[x, list(memory.order)] * memory.scale)])
        if a <= 0 or not weights.all() or abs(weights.sum()) < 1e-12:
            continue
        told = _weights_of(a, weights / weights.sum())
        if told is not None:
            name, system = told
            shares = ", ".join(f"{weight:.4g}" for weight in weights / weights.sum())
            return Name(name, system, float(weights.sum()), f"{_SUM}, the newest first {shares} of it")
    return None


def _of_the_field_alone(found: Blocks, x: int) -> Blocks | None:
    """A tableau whose state beside ``x`` is renewed by the field alone: g = f + c x, where that keeps c x too.

    Solvers that predict the data keep (x - sigma f(x)) / alpha, which is linear in x and in the field (DPM-Solver++).
    """
    taken = [i for i in range(len(found.V)) if i != x and found.B[i, 0]]
    if len(taken) != 1 or np.delete(found.V[taken[0]], x).any():
        return None
    c = float(found.V[taken[0], x] / found.B[taken[0], 0])
    if not c:
        return found
    V = found.V - c * found.B @ found.U
    V[np.abs(V) <= CLOSE * np.abs(found.V).max()] = 0.0
    recorded = tuple(None if field is None else replace(field, linear=field.linear - c) for field in found.recorded)
    return replace(found, V=V, recorded=recorded)


def _weights_of(a: float, weights: Matrix) -> tuple[str, str] | None:
    """Name and system of x' = a x + h sum_j b_j f_j with sum_j b_j = 1."""
    count = len(weights)
    if count > len(_COUNTS):
        return None
    steps, nodes = _COUNTS[count - 1], -np.arange(count, dtype=float)
    if abs(a - 1) > CLOSE:
        away, plain = (float(np.abs(weights - _interpolating(nodes, z)).max()) for z in (math.log(a), 0.0))
        if away <= min(CLOSE, plain):
            name = f"exponential Adams-Bashforth, {steps} (ETD{count}, a = {a:.3g})"
            return name, "x' = f(x) - lambda x, the field alone extrapolated, h lambda = -log a"
        if plain <= CLOSE:
            name = f"Adams-Bashforth type, {steps} (a = {a:.3g}, weights of ab{count})"
            return name, "x' = f(x) - lambda x, the field alone extrapolated as on equal steps"
    found = _nodes(weights)
    if found is None:
        return None
    sizes = [1.0, *-np.diff(found)]
    if count == 2 and abs(a - 1) <= CLOSE and abs(sizes[0] / sizes[1] - 2) <= CLOSE:
        name = "optimistic step, 2 f_n - f_(n-1) (Adams-Bashforth type where the step ratio is 2)"  # Popov 1980
        return name, "x' = f(x), the field extrapolated to the end of the step"
    ratios = ", ".join(f"{size / before:.3g}" for size, before in itertools.pairwise(sizes))
    skip = "" if abs(a - 1) <= CLOSE else f"a = {a:.3g}, "
    system = "x' = f(x), multistep" if not skip else "x' = f(x) - lambda x, the field alone extrapolated"
    return f"Adams-Bashforth type, {steps} ({skip}step ratio{'s' * (count > 2)} {ratios})", system


def _interpolating(nodes: Matrix, z: float) -> Matrix:
    """The weights, of sum 1, of integrals over [0, 1] of e^(z (1 - s)) times the polynomial through some nodes."""
    powers = np.arange(len(nodes))
    moments = np.array([_moment(z, int(k)) for k in powers])
    solved: Matrix = np.linalg.solve(nodes[None, :] ** powers[:, None], moments / moments[0])
    return solved


def _moment(z: float, k: int) -> float:
    """The integral over [0, 1] of e^(z (1 - s)) s^k, by its series: k! z^j / (j + k + 1)!."""
    term = total = 1.0 / (k + 1)
    for j in range(1, 200):
        term *= z / (j + k + 1)
        total += term
        if abs(term) <= 1e-17 * abs(total):
            break
    return total


def _nodes(weights: Matrix) -> Matrix | None:
    """The times 0 > t_1 > t_2 ... of earlier values, in units of the step, at which an Adams method has some weights.

    Its weights integrate all powers up to their number right: sum_j b_j t_j^k = 1 / (k + 1).
    """
    powers = np.arange(1, len(weights))
    old, times = weights[1:], -np.arange(1.0, len(weights))
    for _ in range(_NEWTON):
        away = (old * times ** powers[:, None]).sum(axis=1) - 1 / (powers + 1)
        slopes = powers[:, None] * old * times ** (powers[:, None] - 1)
        if abs(np.linalg.det(slopes)) < 1e-300:
            return None
        moved = np.linalg.solve(slopes, away)
        times = times - moved
        if np.abs(moved).max() <= 1e-12 * np.abs(times).max():
            found = np.array([0.0, *times])
            return found if (np.diff(found) < 0).all() else None
    return None


def _left_vector(V: Matrix) -> Matrix | None:
    """Y with y V = y and y u = 1 for the right eigenvector u whose first nonzero entry is 1."""
    values, right = np.linalg.eig(V)
    place = np.flatnonzero(np.abs(values - 1) < CLOSE)
    if place.size != 1:
        return None
    u = right[:, place[0]].real
    u = u / u[np.argmax(np.abs(u))]
    values, left = np.linalg.eig(V.T)
    y = left[:, np.argmin(np.abs(values - 1))].real
    product: Matrix = y / (y @ u)
    return product
