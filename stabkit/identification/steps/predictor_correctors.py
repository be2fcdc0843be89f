"""Predictors and correctors: a step that evaluates its field at a predicted state, and remembers values of the field.

    p = x + sum_j a_j f_j,    x' = x + c f(p) + sum_j c_j f_j,

the f_j being earlier stages and what was kept of the steps before (Hairer, Norsett and Wanner 1993, III.1).
"""

from __future__ import annotations

import numpy as np

from stabkit.identification.form.tableau import Blocks, Matrix
from stabkit.identification.names.multistep import memory_of
from stabkit.identification.names.single import CLOSE, Name
from stabkit.integrators.multistep import quadrature_weights


def predictor_corrector(found: Blocks) -> Name | None:
    """The name of a tableau of one field whose states are a solution and values of its field; None where it is not so.

    Example:
        >>> A, U = np.array([[0, 0], [0.15, 0]]), np.array([[1, 0], [1, -0.05]])  # ab2, corrected by the trapezoid
        >>> B, V = np.array([[0.05, 0.05], [1, 0]]), np.array([[1.0, 0], [0, 0]])
        >>> predictor_corrector(Blocks(A, U, B, V, (0, 0), ())).name
        'predictor-corrector (ab2, trapezoid), PECE'
    """
    if found.n_fields != 1 or not len(found.A) or len(found.V) < 2:
        return None
    for x in range(len(found.V)):
        kept = memory_of(found, x)
        if kept is not None and found.V[x, x] > 0:
            return _named(found, x, list(kept.order), kept.stage, kept.scale)
    return None


def _named(found: Blocks, x: int, memory: list[int], kept: int, scale: float) -> Name | None:
    last = len(found.A) - 1
    now = [j for j in range(last) if not found.A[j].any() and np.array_equal(found.U[j], np.eye(len(found.V))[x])]
    ahead = found.A[last].any() or found.U[last, memory].any()
    a = float(found.V[x, x])  # the prediction is one of the end of the step, where the linear part has made the same
    carried = [a if j == last else 1.0 for j in range(len(found.A))]
    if not ahead or not np.allclose(found.U[:, x], carried, atol=CLOSE) or not found.B[x, last]:
        return None
    old_ahead, old = found.U[last, memory] * scale, found.V[x, memory] * scale
    predicted = np.concatenate([found.A[last, now], old_ahead])
    corrected = np.concatenate([found.B[x, [last]], found.B[x, now], old])
    h = float(found.B[x].sum() + old.sum())
    if abs(h) < 1e-12:
        return None
    form = "PEC" if kept == last else "PECE"
    pair = _adams(predicted / h, corrected / h) if len(now) <= 1 and last == len(now) and a == 1.0 else None
    stages = f"{last + 1} stage{'s' * (last > 0)}"
    name = f"predictor-corrector ({pair}), {form}" if pair else (
        f"predictor-corrector ({stages}, {len(memory)} value{'s' * (len(memory) > 1)} kept)"
    )  # fmt: skip
    system = "x' = f(x), predicted and corrected"
    if a != 1.0:  # UniPC (Zhao et al. 2023): both formulas carry the linear part on
        weights = ", ".join(f"{weight / h:.3g}" for weight in corrected)
        name = f"exponential {name[:-1]}, a = {a:.3g}), {form} (UniPC type)"
        system = f"x' = f(x) - lambda x, h lambda = -log a, corrected with weights {weights} from the newest value on"
    return Name(name, system, h, "h: the sum of the weights of all values of the field")


def _adams(predicted: Matrix, corrected: Matrix) -> str | None:
    """The methods of Adams that predict and correct, by their weights on the values of the field, the newest first."""
    predicted, corrected = (np.trim_zeros(weights, "b") for weights in (predicted, corrected))
    k, m = len(predicted), len(corrected)
    if k < 1 or m < 2:
        return None
    explicit, implicit = quadrature_weights(range(k), k - 1, k), quadrature_weights(range(m), m - 2, m - 1)
    ours = [*predicted, *corrected]
    theirs = [float(weight) for weight in (*explicit[::-1], *implicit[::-1])]
    if not np.allclose(ours, theirs, atol=CLOSE):
        return None
    return f"{'forward Euler' if k == 1 else f'ab{k}'}, {'trapezoid' if m == 2 else f'am{m - 1}'}"
