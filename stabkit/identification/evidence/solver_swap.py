"""The solver-swap test: the read method replaced by others of the same order, from the blocks alone.

A network whose output changes much under an equally accurate solver is no discretised differential equation (Ott,
Katiyar, Hennig and Tiemann, ICLR 2021). The field of a block comes from the block as a map: of an Euler step it is
f = B - 1; of a method of order p the logarithm of the map, to that order,

    f = (B - 1) - (B - 1)^2 / 2 + (B - 1)^3 / 3 - ...,

with powers as forward differences along x, B x, B B x, ...: the derivative at the first of equally spaced points.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

from stabkit import integrators

Map = Callable[[Tensor], Tensor]
#: Explicit Runge-Kutta methods of orders 1 to 4.
_SOLVERS = ("forward_euler", "midpoint", "kutta3", "rk4")
HIGHEST_ORDER = len(_SOLVERS)


def solver_swaps(blocks: Sequence[Map], start: Tensor, end: Tensor, order: int = 1) -> dict[str, float]:
    """The change of the last state under two other solvers, as a fraction of the distance travelled.

    Args:
        blocks: the steps as maps of the state.
        start: the first state.
        end: the last one.
        order: the order of the method that the blocks are, 1 to 4.

    Returns:
        ``"paired"``: one step for two blocks, with the mean of their fields; ``"half steps"``: two for each.
    """
    fields = [_field(block, order) for block in blocks]
    paired = start
    for f, g in zip(fields[::2], [*fields[1::2], None], strict=False):
        paired = _step(f, paired, 1.0, order) if g is None else _step(_mean(f, g), paired, 2.0, order)
    halves = start
    for f in fields:
        halves = _step(f, _step(f, halves, 0.5, order), 0.5, order)
    travelled = float((end - start).double().norm())
    changes = {"paired": paired, "half steps": halves}
    return {name: float((x - end).double().norm()) / travelled if travelled > 0 else 0.0 for name, x in changes.items()}


def _field(block: Map, order: int) -> Map:
    # weights of x, B x, B B x, ...: (-1)^(k+1)/k of the k-th forward difference
    weights = np.zeros(order + 1)
    for k in range(1, order + 1):
        for j in range(k + 1):
            weights[j] += (-1) ** (k + 1) / k * math.comb(k, j) * (-1) ** (k - j)

    def field(x: Tensor) -> Tensor:
        total = float(weights[0]) * x
        for weight in weights[1:]:
            x = block(x)
            total = total + float(weight) * x
        return total

    return field


def _mean(f: Map, g: Map) -> Map:
    return lambda x: (f(x) + g(x)) / 2


def _step(field: Map, x: Tensor, h: float, order: int) -> Tensor:
    method = integrators.named(_SOLVERS[order - 1])
    stages: list[Tensor] = []
    for row in method.A:
        y = x
        for a, k in zip(row, stages, strict=False):
            y = y + h * float(a) * k if a else y
        stages.append(field(y))
    for b, k in zip(method.B[0], stages, strict=True):
        x = x + h * float(b) * k
    return x
