"""Runge-Kutta methods of several states that are coupled by numbers, written out state by state.

For y' = L y + sum_k d_k f_k(w_k y) with a 2 x 2 matrix L, as position and velocity with friction, q' = v and
v' = f(q) - g v, are, a method with the tableau (A, b) and the step h has the stages and the new state

    Y_i = y + h sum_j A_ij (L Y_j + sum_k d_k f_k(w_k Y_j)),    y' = y + h sum_i b_i (L Y_i + sum_k d_k f_k(w_k Y_i))

so that V = R(h L), which tells h L. For L of a free motion this is the method of Nystrom that a Runge-Kutta method
makes (Hairer, Norsett and Wanner 1993, II.14).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from stabkit.identification.form.tableau import Blocks, Matrix
from stabkit.identification.names.single import CLOSE, Name, catalogue

_ROUNDS = 30  # of Newton's method, which has found a root long before, or finds none


def runge_kutta_of_states(found: Blocks) -> Name | None:
    """The Runge-Kutta method of the catalogue that a step of several states is; None for others."""
    stages = list({id(stage): stage for stage in found.rows}.values())
    keys = list(dict.fromkeys(stage.key for stage in stages))
    groups = [[stage for stage in stages if stage.key == key] for key in keys]
    count = len(groups[0]) if groups else 0
    if count < 2 or any(len(group) != count for group in groups):
        return None
    for name, method in catalogue(count):
        told = _numbers(found, method, groups)
        if told is None:
            continue
        L, d = told
        for q, p in ((0, 1), (1, 0)) if len(L) == 2 and len(groups) == 1 else ():
            h, kick = float(L[q, p]), float(d[p, 0])
            if abs(L[q, q]) <= CLOSE and abs(d[q, 0]) <= CLOSE and abs(h) > CLOSE:
                both = len(found.rows) > len(stages) or abs(L[p, p]) > CLOSE
                size, rule = (h, "h: what multiplies both the velocity and the force") if abs(kick - h) <= CLOSE else (
                    abs(h * kick) ** 0.5, "h: h^2 multiplies the force")  # fmt: skip
                system = "x'' = f(x, x')" if both else "x'' = f(x)"
                return Name(f"{name} (position, velocity)", system, abs(size), rule, 2)
        sizes = np.abs(d[np.abs(d) > CLOSE])
        h = float(sizes.max())
        rule = "h: the number that multiplies the branches" if np.ptp(sizes) <= CLOSE else (
            "h: the largest of the numbers that multiply the branches")  # fmt: skip
        return Name(f"{name} of {len(L)} coupled states", "x' = L x + f(x), a system of states", h, rule)
    return None


def _numbers(found: Blocks, method: Any, groups: list[list[Any]]) -> tuple[Matrix, Matrix] | None:
    """The matrix h L and what multiplies each field, by columns, where a step has the numbers of a method."""
    r, s = len(found.V), method.stages
    L = _root(method, found.V)
    if L is None:
        return None
    one, A, b = np.eye(r), method.A, method.B
    solved = np.linalg.inv(np.eye(s * r) - np.kron(A, L))
    # the stages, one below the other, of the old states and of what each of them gives to y'
    of_states, of_fields = solved @ np.kron(np.ones((s, 1)), one), solved @ np.kron(A, one)
    weights = np.kron(b, one) + np.kron(b, L) @ of_fields
    place = {id(stage): i for group in groups for i, stage in enumerate(group)}
    field = {id(stage): k for k, group in enumerate(groups) for stage in group}
    column = {id(stage): j for j, stage in enumerate(found.rows)}
    d = np.zeros((r, len(groups)))
    for k, group in enumerate(groups):
        given = np.concatenate([found.B[:, column[id(stage)]] for stage in group])
        d[:, k] = np.linalg.lstsq(np.vstack([weights[:, i * r : (i + 1) * r] for i in range(s)]), given, rcond=None)[0]
    if not (np.abs(d) > CLOSE).any(axis=0).all():
        return None
    size = max(1.0, float(np.abs(d).max()))
    reads: dict[tuple[int, int], Matrix] = {}  # what each input of a field is of the states, as its first stage tells
    for j, stage in enumerate(found.rows):
        i, k = place[id(stage)], field[id(stage)]
        number = sum(other is stage for other in found.rows[:j])
        w = reads.setdefault((k, number), found.U[j])
        here = slice(i * r, (i + 1) * r)
        told = [weights[:, here] @ d[:, k], w @ of_states[here]]
        read = [found.B[:, j], found.U[j]]
        for other in range(len(found.rows)):
            at, of = place[id(found.rows[other])], field[id(found.rows[other])]
            told.append(np.atleast_1d(w @ of_fields[here, at * r : (at + 1) * r] @ d[:, of]))
            read.append(np.atleast_1d(found.A[j, other]))
        if np.abs(np.concatenate(told) - np.concatenate(read)).max() > CLOSE * size:
            return None
    return L, d


def _root(method: Any, V: Matrix) -> Matrix | None:
    """The small matrix X with R(X) = V, by Newton's method from V - 1; None where there is none near."""
    powers = [1.0, *(float((method.B[0] @ np.linalg.matrix_power(method.A, k)).sum()) for k in range(method.stages))]
    r = len(V)
    X = V - np.eye(r)
    for _ in range(_ROUNDS):
        of = [np.linalg.matrix_power(X, k) for k in range(len(powers))]
        error = sum(c * P for c, P in zip(powers, of, strict=True)) - V
        if np.abs(error).max() <= CLOSE * 1e-6:
            break
        slope = sum(powers[k] * np.kron(of[i], of[k - 1 - i].T) for k in range(1, len(powers)) for i in range(k))
        X = X - np.linalg.lstsq(slope, error.reshape(-1), rcond=None)[0].reshape(r, r)
        if not np.isfinite(X).all():
            return None
    return X if np.abs(error).max() <= CLOSE and np.abs(X).max() < 10 else None
