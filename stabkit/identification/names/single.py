"""Names of methods: pattern matches on the tableau, on which stages share weights, and on the stability matrix."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np

from stabkit import integrators
from stabkit.identification.form.tableau import Blocks
from stabkit.identification.names.exponential import carried_back, exponential_step
from stabkit.identification.names.histories import steps_with_history, told_of, whole_solve
from stabkit.identification.names.reflections import splitting_by_resolvents
from stabkit.identification.names.starters import adams_behind, ends_of_parts
from stabkit.identification.names.starters import told_of as told_of_orders
from stabkit.identification.names.step_size import step_size
from stabkit.integrators import GeneralLinearMethod, LinearStability
from stabkit.tracing.graph.values import meta_of

CLOSE = 1e-6  # coefficients of single precision networks
_WITH_ITS_END = 3  # stages, at least, of a method of two and the field at its end
NO_STEP = "none: there is no branch that a step size could multiply"
EXPONENTIAL = "exponential Runge-Kutta type"
NO_TABLEAU = "unnamed Runge-Kutta"
POINTS = np.random.default_rng(0).normal(size=(12, 2)) @ np.array([1, 1j])


@dataclass(frozen=True)
class Name:
    """What a tableau is called.

    Attributes:
        name: its name.
        system: the continuous system that it integrates, in words.
        h: its step size.
        convention: how h was fixed.
        order: the order of the system: 2 when a second derivative answers to the field, so that z = h^2 times its
            eigenvalue.
    """

    name: str
    system: str
    h: float
    convention: str
    order: int = 1

    @property
    def is_known(self) -> bool:
        """Whether it has a name; else the tableau is what was read, and that it is a method is not said."""
        return not self.name.startswith("unnamed")

    @property
    def unit(self) -> float:
        """What multiplies the eigenvalue of a field in z."""
        return self.h**self.order


def name_one_state(found: Blocks) -> Name:
    """The name of a one-state tableau."""
    h, convention = step_size(found)
    a = float(found.V[0, 0])
    stages = len(found.A)
    if stages == 0 and 0 < a < 1:
        return Name(f"linear recurrence (a = {a:.3g})", "x' = -lambda x + u, u no function of x", 1.0, "h = 1")
    if stages == 0:
        name = "no branch" if a == 1.0 else f"scaled state (a = {a:.3g}), no branch"
        return Name(name, "none: nothing that depends on the state is added to it", 1.0, NO_STEP)
    if not found.B.any() and a == 1.0:
        return Name("forward Euler", "x' = f(x), with a step that is zero now", h, convention)
    if stages == 1 or (not found.A.any() and len({id(stage) for stage in found.rows}) == 1):
        return _single_stage(a, h, convention)
    history = steps_with_history(found)
    if history is not None:
        name, system, size, order = told_of(stages, *history)
        told = "h: h^2 multiplies the force" if order == 2 else "h: the number that multiplies the branch"
        return Name(name, system, size, told, order)
    if (solve := whole_solve(found)) is not None:
        return Name(solve[0], "x' = f(x), several steps of one field", solve[1], "h: that of each of the steps")
    if found.shared and found.n_fields == 1:
        return _runge_kutta(found, a, h, convention)
    if _is_poly(found, h):
        return Name(f"PolyNet (mpoly-{stages})", "none: I + F + GF, as a truncated backward Euler step", h, convention)
    if a == 0.0:
        return Name("plain", "none: a map without a skip, of several columns", h, convention)
    if not found.A.any():
        what = "forward Euler, parallel branches" if a == 1.0 else _scaled("parallel branches", a)
        return Name(what, "x' = f_1(x) + f_2(x) + ..., all evaluated at one point", h, convention)
    by_resolvents = splitting_by_resolvents(found)
    if by_resolvents is not None:
        return Name(*by_resolvents, 1.0, "h = 1: the resolvents as they are")
    return _tableau_of_own_fields(found) or Name(_composed(found, h, a), "x' = f_1(x) + f_2(x) + ...", h, convention)


def _tableau_of_own_fields(found: Blocks) -> Name | None:
    """The Runge-Kutta method whose numbers a step has, with another field at every stage; None where it has others.

    Such stages are those of x' = f(x, t) where the weights follow t; what order they make is that of one field alone.
    """
    h, own = float(found.B.sum()), len({id(stage) for stage in found.rows}) == found.n_fields == len(found.fields)
    if not own or h <= 0 or np.count_nonzero(found.B) < 2:  # g(x + f(x) / 2) alone: the number belongs to f
        return None
    known = _named_tableau(found.method(h))
    if known is None:
        return None
    method: Any = integrators.named(known)
    system = f"x' = f(x, t), weights of its own at every stage: of order {order_of(method)} where the fields are one"
    name, told = f"{known} tableau, a field of its own at every stage", "h: the sum of the weights of all stages"
    return Name(name, system, h, told)


def _single_stage(a: float, h: float, convention: str) -> Name:
    if a == 1.0:
        return Name("forward Euler", "x' = f(x)", h, convention)
    if a == 0.0:
        return Name("plain", "none: a map without a skip", h, convention)
    if 0.0 < a < 1.0:
        leak = abs(a + h - 1.0) <= CLOSE
        system = f"x' = f(x) - x, Euler with h = {h:.3g}" if leak else "x' = f(x) - lambda x"
        return Name(f"damped Euler (a = {a:.3g})", system, h, convention)
    if abs(a + 1) <= CLOSE and abs(h - 2) <= CLOSE:
        system = "none: 2 f - 1, a reflection at the values of f; two of them in turn are a Peaceman-Rachford step"
        return Name("reflection 2 f(x) - x", system, 1.0, "h = 1: the map as it is")
    # of one step only the products h lambda and h f can be seen: any a > 0 is the exponential of one
    system = (
        "x' = lambda x + f(x), exponential Euler with h lambda = log a" if a > 0 else "none: the skip turns the sign"
    )
    return Name(f"scaled skip (a = {a:.3g})", system, h, convention)


def _scaled(what: str, a: float) -> str:
    return f"damped Euler (a = {a:.3g}), {what}" if 0 < a < 1 else f"scaled skip (a = {a:.3g}), {what}"


def _is_poly(found: Blocks, h: float) -> bool:
    """Whether fields are chained, F_n(...F_1(x)), and all added, none a part of what the next reads."""
    s = len(found.rows)
    return (
        s > 1
        and len({meta_of(stage.output).numel for stage in found.rows}) == 1
        and bool(found.V[0, 0] == 1.0)
        and np.allclose(found.A, np.eye(s, k=-1))
        and np.allclose(found.U.ravel(), np.eye(s)[0])
        and np.allclose(found.B.ravel() / h, 1.0)
    )


def _is_chain(found: Blocks) -> bool:
    """Whether every stage but the first reads what the one before it gives out, and nothing else."""
    s = len(found.rows)
    below = np.eye(s, k=-1, dtype=bool)
    alone = bool((found.A[~below] == 0).all() and (found.A[below] != 0).all())
    return alone and not found.U[1:].any() and bool(found.U[0, 0] != 0)


def _runge_kutta(found: Blocks, a: float, h: float, convention: str) -> Name:
    system = "x' = f(x), several stages of one field"
    if _is_poly(found, found.B.ravel()[0]):  # its stages feed on each other without the state
        name = f"PolyNet (poly-{len(found.rows)})"
        return Name(name, "x' = f(x), a truncated backward Euler step (I - f)^-1", 1.0, "h = 1: f enters as it is")
    method = found.method(h)
    known = _named_tableau(method)
    if known is not None:
        return Name(known, system, h, convention)
    iterated = _fixed_point_iteration(method)
    if iterated is not None:
        return Name(iterated, system, h, convention)
    steps = _in_parts(found) or _behind_starters(found)
    if steps is not None:
        return Name(steps, system, h, convention)
    if a == 0.0:
        return Name("plain", "none: a map without a skip, applied several times", 1.0, "h = 1")
    exponential = exponential_step(found) or _of_lawson(found)
    if exponential is not None:
        name, h = exponential
        return Name(name, "x' = f(x) - lambda x, the linear part carried on exactly, h lambda = -log a", h, convention)
    if _is_exponential_midpoint(found, a):
        system = "x' = f(x) - lambda x, the linear part carried on exactly, the field taken in the middle"
        return Name(f"exponential midpoint (a = {a:.3g}, DPM-Solver-2S type)", system, h, convention)
    if _is_chain(found):
        system = "none: sum_k c_k F^k(x), powers of one map, as filters on graphs are"
        return Name(f"polynomial of one map (degree {len(found.rows)})", system, 1.0, "h = 1: the map as it is")
    if a != 1.0 or not np.allclose(found.U, 1.0):
        return Name("unnamed", "none that is consistent", h, convention)
    alike = [name for name, other in catalogue(None) if _same_function(method, other)]
    hint = f", R(z) of {alike[0]}" if alike else ""
    return Name(f"{NO_TABLEAU} ({method.stages} stages, order {order_of(method)}{hint})", system, h, convention)


def has_two_stages(name: str, count: int) -> bool:
    """Whether a Runge-Kutta method of no known tableau has two stages, so that three numbers say all of it."""
    return name.startswith(NO_TABLEAU) and count == 2


def by_numbers(name: str, system: str, method: LinearStability | None) -> tuple[str, str]:
    """Name and system of a Runge-Kutta method of no known tableau by its numbers; those of others as they are.

    It has two stages, or a linear part besides.
    """
    if not isinstance(method, GeneralLinearMethod) or method.states > 1 or method.n_fields > 1 or method.stages < 2:
        return name, system
    A, U, B, V = method.A, method.U[:, 0], method.B[0], float(method.V[0, 0])
    if has_two_stages(name, method.stages):
        b, c = [weight if abs(weight) > CLOSE else 0.0 for weight in B], float(A[1, 0])
        return f"2-stage Runge-Kutta (c = {c:.3g}, b = {b[0]:.3g} and {b[1]:.3g}, order {order_of(method)})", system
    # x = alpha(t) y, and stages of y: what carries the state to a stage grows or falls on the way to the next state
    skips = np.append(U, V)
    grows = np.diff(skips)  # at every stage: one number before all of them is a scaled skip
    monotone = bool((grows > CLOSE).all() or (grows < -CLOSE).all()) and bool((skips > 0).all())
    ends = [c for c in range(1, method.stages) if np.allclose(np.vstack([A[c:, :c] / U[c:, None], B[:c] / V]),
                                                              A[c, :c] / U[c], atol=CLOSE)]  # fmt: skip
    if name != "unnamed" or not monotone or abs(U[0] - 1) > CLOSE or abs(V - 1) <= CLOSE or ends:
        return name, system
    carried = ", ".join(f"{u:.3g}" for u in U)
    told = f"{EXPONENTIAL} ({method.stages} stages, carried on by {carried}, a = {V:.3g})"
    return told, "x' = f(x, t) - lambda(t) x, the linear part carried on to every stage by a number"


def _of_lawson(found: Blocks) -> tuple[str, float] | None:
    """Name and h of a Runge-Kutta method of the catalogue for e^(lambda t) x, its stages at the times of the skips."""
    back = carried_back(found)
    if back is None:
        return None
    h = float(back.B[0].sum())
    if abs(h) < 1e-12 or not np.allclose(
        back.A.sum(axis=1) / h, np.log(found.U[:, 0]) / np.log(float(found.V[0, 0])), atol=1e-4
    ):
        return None
    name, a = _runge_kutta(back, 1.0, h, "").name, float(found.V[0, 0])
    return None if name.startswith("unnamed") else (f"{name} with integrating factor (Lawson, a = {a:.3g})", h)


def _named_tableau(method: GeneralLinearMethod) -> str | None:
    """The method of the catalogue that has these numbers."""
    for name, other in catalogue(method.stages):
        ours, theirs = (method.A, method.B, method.U, method.V), (other.A, other.B, other.U, other.V)
        if all(np.allclose(x, y, atol=CLOSE) for x, y in zip(ours, theirs, strict=True)):
            return name
    return None


def _is_exponential_midpoint(found: Blocks, a: float) -> bool:
    """Whether x' = a x + b f(u x + c f(x)), with the stage between the two states.

    With x = alpha y and dy = f ds the stage is at the share (c / u) / (b / a) of the step (Lu et al. 2022, DPM-Solver).
    """
    if len(found.fields) != 2 or found.B[0, 0] or a <= 0 or abs(a - 1) <= CLOSE or not found.B[0, 1]:
        return False
    (first, u), c = found.U[:, 0], found.A[1, 0]
    return bool(first == 1.0 and min(a, 1.0) <= u <= max(a, 1.0) and 0 < (c / u) / (found.B[0, 1] / a) < 1)


def _fixed_point_iteration(method: GeneralLinearMethod) -> str | None:
    """``"backward_euler (by 5 fixed-point iterations)"`` for x' = x + h f(x + h f(...)), and others alike.

    Each stage is what the iteration would go on with if it ended there, so its row repeats the weights: those of the
    theta method, (1 - theta) f(x) + theta f(x'), or theta times the one of x' = x + h f((1 - theta) x + theta x').
    """
    s, b = method.stages, method.B[0]
    if s < 3 or not np.allclose(method.U, 1.0) or method.V[0, 0] != 1.0:
        return None
    last = np.eye(s)[-1]
    theta, one_point = float(b[-1]), bool(np.allclose(b, last, atol=CLOSE))
    if one_point:
        theta = float(method.A[-1, -2])
        rows = theta * np.eye(s, k=-1)
    else:
        rows = np.vstack([np.zeros(s), (1 - theta) * np.eye(s)[[0] * (s - 1)] + theta * np.eye(s)[:-1]])
        if not np.allclose(b, (1 - theta) * np.eye(s)[0] + theta * last, atol=CLOSE):
            return None
    if not 0 < theta <= 1 + CLOSE or not np.allclose(method.A, rows, atol=CLOSE):
        return None
    return f"{theta_method(theta, one_point=one_point)} (by {s - 1} fixed-point iterations)"


def theta_method(theta: float, *, one_point: bool) -> str:
    """What x' = x + h ((1 - theta) f(x) + theta f(x')) is called.

    With one point it is x' = x + h f((1 - theta) x + theta x').

    Example:
        >>> theta_method(0.5, one_point=True), theta_method(0.7, one_point=False)
        ('implicit_midpoint', 'theta method, theta = 0.7')
    """
    if abs(theta - 1) <= CLOSE:
        return "backward_euler"
    if abs(theta - 0.5) <= CLOSE:
        return "implicit_midpoint" if one_point else "trapezoid"
    return f"{'one-leg ' * one_point}theta method, theta = {theta:.3g}"


def order_of(method: GeneralLinearMethod) -> int:
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
    ours, theirs = method.stability_matrix(POINTS)[:, 0, 0], other.stability_matrix(POINTS)[:, 0, 0]
    return bool(np.abs(ours - theirs).max() <= CLOSE * np.abs(theirs).max())


@cache
def catalogue(stages: int | None) -> tuple[tuple[str, GeneralLinearMethod], ...]:
    """One-state, one-field explicit Runge-Kutta methods of the catalogue."""
    explicit = []
    for name in integrators.names():
        method: Any = integrators.named(name)
        if not isinstance(method, GeneralLinearMethod) or method.states != 1 or method.n_fields != 1:
            continue
        if method.is_explicit and np.allclose(method.V, 1.0) and np.allclose(method.U, 1.0):
            explicit.append((name, method))
    return tuple((n, m) for n, m in explicit if stages is None or m.stages == stages)


def _in_parts(found: Blocks) -> str | None:
    """``"5 steps of rk4"``, ``"2 steps of heun2 (h = 0.1, 0.05)"``, ``"forward Euler and then heun2"``; None else.

    A part ends where all later stages, and the result, take what is before them with the weights of the result. The
    last one may end inside of its step, where an adaptive solver interpolates to the time that it was asked for.
    """
    s, b = len(found.rows), found.B[0]
    if not np.allclose(found.U, 1.0) or found.V[0, 0] != 1.0:
        return None
    ends = ends_of_parts(found.A, b)
    named, told = [], ""
    for start, stop in itertools.pairwise([0, *ends, s]):
        part = slice(start, stop)
        one = Blocks(found.A[part, part], found.U[part], found.B[:, part], found.V, found.fields[part],
                     found.rows[part])  # fmt: skip
        inside = _ended_inside(one) if stop == s else None
        if inside is not None:
            named.append(inside[0])
            told = inside[1]
            named = [replace(n, name=with_its_end(n.name)) for n in named]
        elif ends and (name := name_one_state(one)).is_known:
            named.append(name)
        else:
            return None
    names, sizes = [name.name for name in named], [name.h for name in named]
    if not ends:
        return f"{names[0]} (h = {sizes[0]:.3g}, {told})"
    told = f", the last {told}" if told else ""
    same = max(sizes) - min(sizes) <= CLOSE * max(map(abs, sizes))
    shown = f" (h = {', '.join(f'{h:.3g}' for h in sizes)}{told})" if told or not same else ""
    return f"{len(names)} steps of {names[0]}{shown}" if len(set(names)) == 1 else " and then ".join(names) + shown


def _behind_starters(found: Blocks) -> str | None:
    """``"forward Euler and then 3 steps of ab2"``; None for what is no method of Adams and Bashforth."""
    if not np.allclose(found.U, 1.0) or found.V[0, 0] != 1.0:
        return None
    for count, h, orders in adams_behind(found.A, found.B[0]):
        part, weights = slice(0, count), np.vstack([found.A, found.B])[count : count + 1, :count]
        first = name_one_state(
            Blocks(found.A[part, part], found.U[part], weights, found.V, found.fields[part], found.rows[part])
        )
        steps = len(ends_of_parts(found.A[part, part], weights[0])) + 1
        if first.is_known and abs(first.h - steps * h) <= CLOSE * 10 * abs(first.h):
            return f"{first.name} and then {told_of_orders(orders)} (h = {h:.3g})"
    return None


def _ended_inside(part: Blocks) -> tuple[Name, str] | None:
    """The method of a step that ends inside of it, and where, in words; None where it is none.

    Its last stage is the field at the end of the whole step, which tells the weights of that; the result has others,
    those of a polynomial through both ends and what is known between (Hairer, Norsett and Wanner 1993, II.6).
    """
    s = len(part.rows)
    if s < _WITH_ITS_END or _named_tableau(part.method(step_size(part)[0])) is not None:
        return None
    inner = slice(0, s - 1)
    whole = Blocks(
        part.A[inner, inner], part.U[inner], part.A[-1:, inner], part.V, part.fields[inner], part.rows[inner]
    )
    name = name_one_state(whole)
    share = float(part.B.sum()) / name.h
    if _named_tableau(whole.method(name.h)) is None or not 0 < share < 1 + CLOSE:
        return None
    return name, f"ended after {share:.3g} of it by interpolation"


def with_its_end(name: str) -> str:
    """What a method is called that evaluates its field at the end of its step as well, which the next one begins with.

    With it Ralston's method of order 3 makes the pair of Bogacki and Shampine (1989), whose error is estimated.

    Example:
        >>> with_its_end("ralston3"), with_its_end("dopri5")
        ('bosh3', 'dopri5')
    """
    return "bosh3" if name == "ralston3" else name


def without_parallel(found: Blocks) -> Blocks:
    """Different fields at one point that are added with one weight, as experts are, are one field: their sum."""
    kept: list[int] = []
    for i in range(len(found.rows)):
        same = (
            np.allclose(found.A[i], found.A[j], atol=CLOSE) and np.allclose(found.U[i], found.U[j], atol=CLOSE)
            and np.allclose(found.A[:, i], found.A[:, j], atol=CLOSE)
            and np.allclose(found.B[:, i], found.B[:, j], atol=CLOSE)
            for j in kept
        )  # fmt: skip
        if not any(same):
            kept.append(i)
    return found.of_rows(kept)


def _without_held(found: Blocks) -> Blocks:
    """Without the inputs at which fields read the old state besides the newest one: f(x_l, x_0), x_0 held fixed."""

    def is_held(i: int) -> bool:
        several = sum(stage is found.rows[i] for stage in found.rows) > 1
        return several and bool(found.U[i, 0] == 1.0) and not found.A[i].any()

    kept = [i for i in range(len(found.rows)) if not is_held(i)]
    if len(kept) == len(found.rows) or len({id(found.rows[i]) for i in kept}) < len({id(s) for s in found.rows}):
        return found
    return found.of_rows(kept)


def _composed(found: Blocks, h: float, a: float) -> str:
    """A sequence of Euler steps of different fields, which may read the state that all began with as well."""
    whole = _without_held(found)
    held = "" if whole is found else ", fields that read x_0 too"
    found = without_parallel(whole)
    b = found.B[0] / h
    s = len(found.rows)
    if a != 1.0:
        return f"unnamed composition of {s} stages, a = {a:.3g}"
    lower = np.array([[b[j] if j < i else 0.0 for j in range(s)] for i in range(s)])
    if np.allclose(found.A / h, lower, atol=CLOSE) and np.allclose(found.U, 1.0):
        if s >= 3 and np.allclose(b, b[::-1]) and np.allclose(b[[0, -1]], 0.5) and np.allclose(b[1:-1], 1.0):
            return "Strang-ordered splitting (Macaron)"
        if np.allclose(b, 1.0):
            return f"Lie splitting ({s} Euler steps{held})"
        return f"splitting of {s} Euler steps, weights {', '.join(f'{x:.3g}' for x in b)}{held}"
    return f"unnamed ({s} stages{' of different fields' if found.weights_shared is False else ''})"
