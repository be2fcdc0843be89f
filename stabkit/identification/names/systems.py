"""Names of methods with several states: momentum, multistep, reversible, gated and oscillating systems."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from stabkit.identification.form.tableau import Blocks, Matrix
from stabkit.identification.names.compositions import one_step
from stabkit.identification.names.coupled_stages import runge_kutta_of_states
from stabkit.identification.names.multistep import (
    leapfrog,
    name_multistep,
    without_kept_values,
    without_unread_directions,
)
from stabkit.identification.names.single import CLOSE, Name, name_one_state, with_its_end, without_parallel
from stabkit.identification.names.step_size import with_mass
from stabkit.identification.names.two_forces import momentum_of_two_fields
from stabkit.identification.steps.predictor_correctors import predictor_corrector

LINEAR_MAP = "none: a linear map of several states, and no field"
ADDITIVE_COUPLING = "additive coupling (half of a reversible step)"
REVERSIBLE = "reversible (two-stream symplectic Euler)"
MEMORY_CELL = "gated memory cell (LSTM)"  # by its tableau alone, see `is_memory_cell` for the rest
UNNAMED_PAIR = Name(
    "unnamed gated pair", "a system of two gated states", 1.0, "h = 1: only the product h f can be seen"
)
HAMILTONIAN = "symplectic Euler (Hamiltonian)"  # a reversible step whose fields are gradients


def name_several_states(found: Blocks, *, symmetric: bool | None, gated: bool) -> Name:
    """The name of a tableau with several states.

    Args:
        found: the tableau, states in the order in which they were made.
        symmetric: whether the Jacobian of every field is symmetric, as that of a gradient is; None if not measured.
        gated: whether states are multiplied by numbers that depend on the state.
    """
    found = found if _meets_in_half_kicks(found) else without_parallel(found)
    r = len(found.V)
    one = "h = 1: only the product h f can be seen"
    if not found.fields:
        return Name("unnamed", LINEAR_MAP, 1.0, one)
    if found.n_fields == 1 and len(found.rows) == 1 and r == 2:
        name = _two_state_one_stage(found, history=not _has_velocity(found)) or _second_order(found)
        if name is not None:
            return name
    coupled = _additive_coupling(found) if r == 2 else None
    if coupled is not None:
        return coupled
    adams = name_multistep(found) or predictor_corrector(found)
    if adams is not None:
        return adams
    if r == 2 and gated:
        return _gated_pair(found)
    if r == 2:
        name = (
            _force_of_both(found)
            or runge_kutta_of_states(found)
            or _verlet(found)
            or _damped_verlet(found)
            or _verlet_of_two_fields(found)
            or momentum_of_two_fields(found)
            or _two_fields(found, symmetric)
        )
        name = name or _position_form(found)
        if name is not None:
            return name
    again = None if gated else without_kept_values(found)
    if again is not None:
        name = name_one_state(again) if r == 2 else name_several_states(again, symmetric=symmetric, gated=gated)
        if name.is_known:
            return replace(name, name=with_its_end(name.name))
    couplings = _couplings(found) if r == 2 else None
    if couplings is not None:
        return couplings
    smaller = without_unread_directions(found) if r > 2 and not gated else None
    if smaller is not None:
        name = name_several_states(smaller, symmetric=symmetric, gated=gated)
        if name.is_known:  # velocities at the middle of a step and positions at its end are those of Verlet's method
            return replace(name, name=name.name.replace("symplectic Euler (position, velocity)", "stormer_verlet"))
    alone = _one_beside_others(found) if r > 2 else None
    if alone is not None:
        return alone
    if r > 2 and len(found.rows) == 1:
        return Name(f"general linear method of {r} states", "x' = f(x), a history of states", 1.0, one)
    return Name("unnamed", f"a system of {r} states", 1.0, one)


def _one_beside_others(found: Blocks) -> Name | None:
    """One state moves by itself, while the others stay what they are: kept for a join, or for a decoder."""
    r = len(found.V)
    moved = [i for i in range(r) if found.B[i].any() or not np.array_equal(found.V[i], np.eye(r)[i])]
    if len(moved) != 1 or found.U[:, [i for i in range(r) if i != moved[0]]].any():
        return None
    (i,) = moved
    if np.delete(found.V[i], i).any():
        return None
    one = Blocks(found.A, found.U[:, [i]], found.B[[i]], found.V[i, i] * np.ones((1, 1)), found.fields, found.rows)
    name = name_one_state(one)
    return replace(name, name=f"{name.name}, beside {r - 1} states that stay") if name.is_known else None


def _additive_coupling(found: Blocks) -> Name | None:
    """One stream moves by a field of the other, which stays."""
    if len(found.rows) != 1 or not np.allclose(found.V, np.eye(2)):
        return None
    reads, writes = np.flatnonzero(found.U[0]), np.flatnonzero(found.B[:, 0])
    if len(reads) != 1 or len(writes) != 1 or reads[0] == writes[0]:
        return None
    h = float(np.abs(found.B).max())
    declared = "h: the number that multiplies the branch" if h != 1 else "h = 1: only h f can be seen"
    return Name(ADDITIVE_COUPLING, "p' = F(q), q' = 0", h, declared)


def _couplings(found: Blocks) -> Name | None:
    """Several fields, each of which moves one stream and reads the other as it is then: shears in turn.

    Those of two fields that are taken again and again are compositions, whose numbers tell which.
    """
    moves_one = bool(np.all((found.B != 0).sum(axis=0) == 1))
    if not np.allclose(found.V, np.eye(2)) or not moves_one or not 3 <= len(found.rows) == found.n_fields:
        return None
    writes = [int(np.argmax(np.abs(column))) for column in found.B.T]
    A = np.array([[found.B[1 - w, j] * (j < i) for j in range(len(writes))] for i, w in enumerate(writes)])
    fits = np.allclose(found.U, np.eye(2)[[1 - w for w in writes]], atol=CLOSE) and np.allclose(found.A, A, atol=CLOSE)
    if not fits or set(writes) != {0, 1}:
        return None
    h, declared = _of_branches(found)
    return Name(couplings_in_turn(len(writes)), "p' = F_i(q), q' = G_i(p)", h, declared)


def _of_branches(found: Blocks) -> tuple[float, str]:
    """The step size of branches that move one state each, and how it was fixed: by the largest of their numbers."""
    numbers = np.abs(found.B).max(axis=0)
    h = float(numbers.max())
    if numbers.min() < h * (1 - CLOSE):
        return h, f"h: the largest of the numbers that multiply the branches, {', '.join(f'{x:.3g}' for x in numbers)}"
    return h, "h: the number that multiplies the branches" if h != 1 else "h = 1: only h f can be seen"


def couplings_in_turn(count: int) -> str:
    """What several couplings are called, each of which moves the stream that the one before has read."""
    return f"reversible ({count} couplings in turn)"


def _has_velocity(found: Blocks) -> bool:
    """Whether one state answers to itself and the field alone: v' = g v + f(x). A two-step method has none."""
    V = found.V
    return any(V[i, i] != 0 and V[i, 1 - i] == 0 and V[1 - i, i] != 0 for i in range(2))


def _invariants(found: Blocks) -> tuple[Matrix, Matrix]:
    """Trace and determinant of M(z), which no scaling of the states changes, as polynomials of degree 2 in z.

    All fields have the same z; coefficients from the constant one on.
    """
    method = replace(found, fields=(0,) * len(found.fields)).method(1.0)
    M = method.stability_matrix(np.array([0.0, 1.0, -1.0, 2.0])).real
    vandermonde = np.vander([0.0, 1.0, -1.0, 2.0], increasing=True)
    trace, det = (np.linalg.solve(vandermonde, x) for x in (np.trace(M, axis1=1, axis2=2), np.linalg.det(M)))
    return trace, det


def _two_state_one_stage(found: Blocks, *, history: bool) -> Name | None:
    """Momentum, two-step and second-order methods whose determinant does not depend on z."""
    trace, det = _invariants(found)
    t0, t1, d0 = trace[0], trace[1], det[0]
    if np.abs(trace[2:]).max() > CLOSE or np.abs(det[1:]).max() > CLOSE or abs(t1) < 1e-300:
        return None
    c = abs(t1)
    declared = "h: the number that multiplies the branch" if abs(c - 1) > CLOSE else "h = 1: only h f can be seen"
    if abs(t0) <= CLOSE and abs(d0 + 1) <= CLOSE:
        return leapfrog(found, c / 2)
    if abs(t0 - 2) <= CLOSE and abs(d0 - 1) <= CLOSE:
        form = "second_order_leapfrog" if history else one_step(found) or "symplectic Euler (position, velocity)"
        return Name(form, "x'' = f(x)", math.sqrt(c), "h: h^2 multiplies the force", 2)
    if history and abs(t0 - 1 - d0) <= CLOSE < abs(d0):  # with k = 0 the older state takes no part
        ball = f", heavy ball with momentum {d0:.3g}" if 0 < d0 < 1 else ""
        return Name(f"two-step (LM-ResNet, k = {-d0:.3g})", f"(1 + k) x' + (1 - k)/2 h x'' = f(x){ball}", c, declared)
    if abs(t0 - 1) <= CLOSE and abs(d0) <= CLOSE:
        return Name("momentum (gamma = 0)", "x' = f(x), forward Euler beside a state that takes no part", c, declared)
    dt = None if history else _time_step(found)
    if dt is not None and abs(t0 - 1 - d0) <= CLOSE and 0 < d0 < 1:
        name = f"damped symplectic Euler (position, velocity), friction {(1 - d0) / dt:.3g}"
        return Name(name, "x'' = f(x) - g x'", dt, "h: what multiplies both the force and the velocity", 2)
    if abs(t0 - 1 - d0) <= CLOSE and 0 < d0 < 1:
        return Name(f"momentum (gamma = {d0:.3g})", with_mass(d0, c), c, declared)
    if not history and abs(t0 - 1 - d0) <= CLOSE and -1 < d0 < 0:  # v' = v + 2 eta (f - v), at the middle of the step
        eta = (1 - d0) / 2
        system = "x' = f(x), v' = v + 2 eta (f(x) - v) at the middle of the step"
        return Name(f"asynchronous leapfrog (ALF, eta = {eta:.3g})", system, c / (2 * eta), declared)
    return None


def _time_step(found: Blocks) -> float | None:
    """The number h before the force and the new velocity alike: v' = a v + h f(x), x' = x + h v', cut at either place.

    Not one: then only products can be seen. And not 1 - a, by which a mean over the last values of a field is kept.
    """
    V, B, U = found.V, found.B[:, 0], found.U[0]
    for x, v in ((0, 1), (1, 0)):
        h, a = abs(float(B[v])), float(V[v, v])
        if not h or V[v, x] or abs(V[x, x] - 1) > CLOSE or abs(h - 1) <= CLOSE or abs(h - (1 - a)) <= CLOSE:
            continue
        kick_first = abs(V[x, v] - h * a) <= CLOSE * h and abs(abs(B[x]) - h * h) <= CLOSE * h and not U[v]
        drift_first = abs(V[x, v] - h) <= CLOSE * h and not B[x] and abs(U[v] - h * U[x]) <= CLOSE * h
        if kick_first or drift_first:
            return h
    return None


def _position_form(found: Blocks) -> Name | None:
    """Positions alone, x_(n+1) = 2 x_n - x_(n-1) + h^2 f(x_n, x_n - x_(n-1)), with a force of the velocity as well."""
    if len({id(stage) for stage in found.rows}) != 1 or found.A.any():
        return None
    for older, newer in ((0, 1), (1, 0)):
        moves_up = np.allclose(found.V[older], np.eye(2)[newer]) and not found.B[older].any()
        if not moves_up or not found.U[:, older].any():
            continue
        of_position = Blocks(np.zeros((1, 1)), np.eye(2)[[newer]], found.B[:, :1], found.V, (0,), found.rows[:1])
        name = _two_state_one_stage(of_position, history=True)
        if name is not None and name.order == 2:
            system = "x'' = f(x, x'), x' = (x_n - x_(n-1)) / h, so that x' enters with order 1"
            return replace(
                name, name=f"{name.name} (Stormer-Verlet, position form), force of position and velocity", system=system
            )
    return None


def _force_of_both(found: Blocks) -> Name | None:
    """Position and velocity, where one force reads both, each by itself: it is read as one of the position alone."""
    if len(found.rows) != 2 or found.rows[0] is not found.rows[1] or found.A.any():
        return None
    for q, p in ((0, 1), (1, 0)):
        row = next((i for i in range(2) if found.U[i, q] and not found.U[i, p]), None)
        if row is None or not found.V[q, p] or found.V[p, q] or not found.U[1 - row, p]:
            continue
        one = Blocks(np.zeros((1, 1)), found.U[[row]], found.B[:, [row]], found.V, (0,), found.rows[:1])
        name = _two_state_one_stage(one, history=False)
        if name is not None and name.order == 2:
            return replace(name, name=f"{name.name}, force of position and velocity", system="x'' = f(x, x')")
    return None


def _second_order(found: Blocks) -> Name | None:
    """Nesterov's method, forward Euler for x'' = f(x), and damped oscillators."""
    trace, det = _invariants(found)
    (t0, t1), (d0, d1) = trace[:2], det[:2]
    if np.abs([*trace[2:], *det[2:]]).max() > CLOSE:
        return _oscillator(found)
    c = abs(t1 / t0) if t0 else 0.0
    if 0 < d0 < 1 and c > 1e-12 and abs(t0 - 1 - d0) <= CLOSE and abs(d1 / d0 - t1 / t0) <= CLOSE * c:
        declared = "h: the number that multiplies the branch" if abs(c - 1) > CLOSE else "h = 1: only h f can be seen"
        system = f"{with_mass(d0, c)}, the field taken ahead of the state"
        return Name(f"Nesterov momentum (gamma = {d0:.3g})", system, c, declared)
    if abs(t0 - 2) <= CLOSE and abs(t1) <= CLOSE and abs(d0 - 1) <= CLOSE and abs(d1) > 1e-12:
        return Name("forward Euler (position, velocity)", "x'' = f(x)", math.sqrt(abs(d1)),
                    "h: h^2 multiplies the force", 2)  # fmt: skip
    return _oscillator(found)


def _verlet(found: Blocks) -> Name | None:
    """Two half kicks with one force around a drift; where the step is cut in its middle they are of two layers."""
    trace, det = _invariants(found)
    c = abs(trace[1])
    rest = [trace[0] - 2, *trace[2:], det[0] - 1, *det[1:]]
    if len(found.rows) != 2 or c < 1e-12 or np.abs(rest).max() > CLOSE:
        return None
    if not found.A.any() and np.allclose(found.U[0], found.U[1]) and not _meets_in_half_kicks(found):
        return None  # two fields at one point, with no drift between
    form = "stormer_verlet" if _meets_in_half_kicks(found) else one_step(found) or "stormer_verlet"
    return Name(form, "x'' = f(x)", math.sqrt(c), "h: h^2 multiplies the force", 2)


def _meets_in_half_kicks(found: Blocks) -> bool:
    """Whether two fields at one point kick the velocity by half of the time step that the drift takes.

    So it is where a step of Verlet's method is cut between its drifts; v + h (f(x) + g(x)) is one kick of two fields.
    """
    if len(found.rows) != 2 or len(found.V) != 2 or found.A.any():
        return False
    for y, v in ((0, 1), (1, 0)):
        drift, kicks = float(found.V[y, v]), np.abs(found.B[v])
        if drift and not found.V[v, y] and np.allclose(kicks, abs(drift) / 2, atol=CLOSE * abs(drift)):
            return True
    return False


def _damped_verlet(found: Blocks) -> Name | None:
    """Verlet's step with friction: half a kick, a drift by what that leaves, half a kick there, and a loss of velocity.

    With p_half = c_1 p + k_1 f(q), then q' = q + d p_half, p' = c_2 p_half + k_2 f(q') we have V_qp B_p1 = V_pp B_q1.
    The loss a = c_1 c_2 is in front of the second kick at most, which bounds the ratio of the kicks (BAOAB, no noise).
    """
    if found.n_fields != 1 or len(found.fields) != 2:
        return None
    for q, p in ((0, 1), (1, 0)):
        V, B, a = found.V, found.B, float(found.V[p, p])
        drift, kicks = float(V[q, p]), B[p]
        if not CLOSE < a < 1 - CLOSE or V[p, q] or abs(V[q, q] - 1) > CLOSE or not drift or B[q, 1] or not kicks.all():
            continue
        at_old = np.allclose(found.U[0], np.eye(2)[q], atol=CLOSE) and not found.A[0].any()
        at_new = np.allclose(found.U[1], V[q], atol=CLOSE) and np.allclose(found.A[1], B[q], atol=CLOSE)
        moves = abs(drift * kicks[0] - a * B[q, 0]) <= 10 * CLOSE * abs(drift * kicks[0])
        if at_old and at_new and moves and a - CLOSE <= kicks[0] / kicks[1] <= 1 + 10 * CLOSE:
            h = math.sqrt(abs(drift * kicks.sum()))
            return Name(f"damped stormer_verlet (a = {a:.3g})", "x'' = f(x) - g x'", h,
                        "h: h^2 is the drift times both kicks", 2)  # fmt: skip
    return None


def _verlet_of_two_fields(found: Blocks) -> Name | None:
    """Two half kicks around a drift, p' = F(q) and q' = G(p), each at what the one before has left."""
    if len(found.rows) != 3 or found.fields[0] != found.fields[2] or found.n_fields != 2:
        return None
    if not np.allclose(found.V, np.eye(2)) or not np.all((found.B != 0).sum(axis=0) == 1):
        return None
    writes = [int(np.argmax(np.abs(column))) for column in found.B.T]
    reads = [1 - stream for stream in writes]
    kick, drift, again = (float(found.B[stream, j]) for j, stream in enumerate(writes))
    if writes[0] == writes[1] or writes[2] != writes[0] or abs(kick - again) > CLOSE * abs(drift):
        return None
    U = np.eye(2)[reads]
    A = np.array([[found.B[reads[i], j] if j < i else 0.0 for j in range(3)] for i in range(3)])
    halves = abs(2 * abs(kick) - abs(drift)) <= CLOSE * abs(drift)
    if not halves or not np.allclose(found.U, U, atol=CLOSE) or not np.allclose(found.A, A, atol=CLOSE):
        return None
    return Name("stormer_verlet", "p' = F(q), q' = G(p)", abs(drift), "h: the number that multiplies the drift")


def _gated_pair(found: Blocks) -> Name:
    V, B = found.V, found.B
    kept = [i for i in range(2) if V[i].any()]
    means = " and ".join(f"{V[i, i]:.3g}" for i in kept)
    one = f"h: the gates, which depend on the state; the old is kept with {means} in the mean"
    if len(kept) == 1:
        return Name(MEMORY_CELL, "c' = -(1 - f) c + i g with h read out of c", 1.0, one)
    relaxes = np.allclose(np.diag(V) + B.sum(axis=1), 1.0, atol=1e-4)  # the gates of old and new add up to one
    diagonal = relaxes and np.allclose(V, np.diag(np.diag(V)))
    reads = [set(np.flatnonzero(found.U[j]).tolist()) for j in range(len(found.rows)) if B[:, j].any()]
    if diagonal and any(len(r) > 0 for r in reads):
        order = "Gauss-Seidel " if _reads_the_new(found) else ""
        of = f"gated {order}Euler of two states" + (" (LEM)" if order else "")
        return Name(of, "tau_i(x) x_i' = f_i - x_i, two time scales", 1.0, one)
    return Name("unnamed gated pair", "a system of two gated states", 1.0, one)


def _reads_the_new(found: Blocks) -> bool:
    """Whether some field is evaluated at a state as it is after it was moved: at its old value and at what moves it."""
    moved = [(found.V[k, k] * np.eye(len(found.V))[k], found.B[k]) for k in range(len(found.V))]
    return any(
        found.U[j, k] != 0 and np.allclose(found.A[j] * V[k], found.U[j, k] * B, atol=1e-4) and bool(B.any())
        for j in range(len(found.rows)) for k, (V, B) in enumerate(moved)
    )  # fmt: skip


def _two_fields(found: Blocks, symmetric: bool | None) -> Name | None:
    """Reversible couplings, and position-velocity systems whose position moves by the new velocity."""
    crossed = np.allclose(found.V, np.eye(2)) and len(found.rows) == 2 and not found.A[:, 1].any()
    if crossed and not np.allclose(found.A, 0) and not np.any((found.B != 0).sum(axis=0) > 1):
        reads = [int(np.argmax(np.abs(row))) for row in found.U]
        writes = [int(np.argmax(np.abs(column))) for column in found.B.T]
        at_new = abs(found.A[1, 0] - found.B[reads[1], 0]) <= CLOSE * abs(found.B[reads[1], 0])
        if at_new and reads[0] != writes[0] and reads[1] != writes[1] and set(writes) == {0, 1}:
            h, declared = _of_branches(found)
            if symmetric:
                return Name(HAMILTONIAN, "p' = -dH/dq, q' = dH/dp", h, declared)
            return Name(REVERSIBLE, "p' = F(q), q' = G(p)", h, declared)
    return _oscillator(found)


def _oscillator(found: Blocks) -> Name | None:
    """Y'' = f - gamma y - epsilon y' by symplectic Euler, cut after the velocity or after the position is renewed."""
    for y, v in ((0, 1), (1, 0)):
        if not found.V[v, v]:
            continue  # what moves the position is made anew by the field, and no velocity that is kept
        if not found.U[:, y].any() and not found.V[v, y]:
            continue  # no force of the position: what it sums up moves by itself
        ahead = _look_ahead(found, y, v)
        if ahead is not None:
            return ahead
        after = _drift_after_kick(found, y, v)
        dt = after or _kick_after_drift(found, y, v)
        if dt is not None:
            damped = abs(float(np.linalg.det(found.V)) - 1.0) > CLOSE
            return Name(
                f"{'damped ' * damped}oscillator, symplectic Euler ({'coRNN' if damped else 'UnICORNN'})",
                "y'' = f(y, y') - gamma y - epsilon y'" if damped else "y'' = f(y) - gamma y",
                abs(dt),
                f"h: dt = {abs(dt):.3g}, the number that multiplies the {'new ' * bool(after)}velocity",
            )
        if (dt := _drift_by_old(found, y, v)) is not None:
            still = abs(found.V[v, v] - 1) <= CLOSE and not found.U[:, v].any()
            return Name(
                f"forward Euler of 2 coupled states ({'' if still else 'damped '}oscillator)",
                "y'' = f(y) - gamma y" if still else "y'' = f(y, y') - gamma y - epsilon y'",
                abs(dt),
                f"h: dt = {abs(dt):.3g}, the number that multiplies the old velocity",
            )
    return None


def _look_ahead(found: Blocks, y: int, v: int) -> Name | None:
    """Nesterov's momentum with its own look-ahead: v' = b v + h f(y + mu v), y' = y + c v', cut at either place."""
    b, force = float(found.V[v, v]), found.U
    if found.V[v, y] or found.A.any() or not 0 < b < 1 or len({id(stage) for stage in found.rows}) != 1:
        return None  # a restoring force of its own, another stage, or no friction: a system of order 2
    if not force[:, y].all() or not found.B[v].any():
        return None
    ratios = force[:, v] / force[:, y]
    after = _drift_after_kick(found, y, v)
    carried = after or float(found.V[y, v])
    drifts = carried and abs(found.V[y, y] - 1.0) <= CLOSE and not found.B[y].any()
    if np.ptp(ratios) > CLOSE or not (after or drifts):
        return None
    mu = float(ratios[0]) / carried - (0.0 if after else 1.0)  # in units of what the velocity moves the position by
    if mu <= CLOSE:
        return None
    h = abs(carried * float(found.B[v].sum()))
    declared = "h: the number that multiplies the branch" if abs(h - 1) > CLOSE else "h = 1: only h f can be seen"
    system = f"{with_mass(b, h)}, the field taken ahead of the state"
    return Name(f"Nesterov momentum (gamma = {b:.3g}, look-ahead {mu:.3g})", system, h, declared)


def _drift_after_kick(found: Blocks, y: int, v: int) -> float | None:
    """The time step when the new position is the old one plus dt times the new velocity."""
    rows = np.concatenate([found.V, found.B], axis=1)
    moved = rows[y] - np.concatenate([np.eye(2)[y], np.zeros(len(found.rows))])
    where = np.abs(rows[v]) > 1e-12
    if not where.any():
        return None
    dt = float((moved[where] / rows[v][where]).mean())
    fits = abs(dt) > 1e-12 and np.allclose(moved, dt * rows[v], atol=CLOSE * abs(dt))
    return dt if fits else None


def _drift_by_old(found: Blocks, y: int, v: int) -> float | None:
    """The time step when the position moves by the old velocity, and each field reads the old states alone."""
    dt = float(found.V[y, v])
    drifts = abs(dt) > 1e-12 and abs(found.V[y, y] - 1) <= CLOSE and not found.B[y].any()
    reads_old = not found.A.any() and bool(found.U[:, y].any()) and bool(((found.U != 0).sum(axis=1) == 1).all())
    return dt if drifts and reads_old and 0 < found.V[v, v] <= 1 + CLOSE else None


def _kick_after_drift(found: Blocks, y: int, v: int) -> float | None:
    """The time step when the position moves by the old velocity, and the force is that at the new position."""
    dt = float(found.V[y, v])
    force = found.U[np.abs(found.U[:, y]) > 1e-12]
    if abs(dt) <= 1e-12 or abs(found.V[y, y] - 1.0) > CLOSE or found.B[y].any() or not len(force):
        return None
    return dt if np.allclose(force[:, v], dt * force[:, y], atol=CLOSE * abs(dt)) else None
