"""The step size h of a method, and the convention by which it is fixed."""

from __future__ import annotations

import numpy as np

from stabkit.identification.form.tableau import Blocks

NUMBER = "h: the number that multiplies the branch"


def with_mass(gamma: float, c: float) -> str:
    """The system of a momentum, x_(n+1) = x_n + gamma (x_n - x_(n-1)) + c f(x), in words.

    Over 1 - gamma it is eps H x'' + H x' = c / (1 - gamma) f(x) at steps of one, so that H = c / (1 - gamma) is the
    length of a step of x' = f(x) with a mass, and c is not, unless H is 1 (v' = gamma v + (1 - gamma) f).

    Example:
        >>> with_mass(0.9, 0.1)
        "eps x'' + x' = f(x), eps = H/(1 - gamma), at steps of H = h/(1 - gamma) = 1"
    """
    return f"eps x'' + x' = f(x), eps = H/(1 - gamma), at steps of H = h/(1 - gamma) = {c / (1 - gamma):.3g}"


def step_size(found: Blocks) -> tuple[float, str]:
    """The step size h of a one-state method, and the convention by which it is fixed.

    Only products of h and the field can be seen. One field evaluated several times gets the h that makes the method
    consistent (the weights b sum to 1); otherwise a number that the code puts before its branches is h.
    """
    b = found.B[0]
    if found.shared and found.n_fields == 1:
        total = float(b.sum())
        if abs(total) > 1e-12:
            return total, "h: the sum of the weights of all stages"
        return 1.0, "h = 1: the weights of the stages sum to zero"
    sizes = np.abs(b[b != 0])
    if not sizes.size:
        return 1.0, "h = 1: the branch is multiplied by zero"
    h = float(np.max(sizes))
    if abs(h - 1.0) <= 1e-12:
        return 1.0, "h = 1: only the product h f can be seen"
    return h, NUMBER
