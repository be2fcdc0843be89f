"""Finite-time exponents over a plane through the space of inputs or initial states."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from stabkit.arguments import accepts
from stabkit.errors import TraceError
from stabkit.growth.finite_time import finite_time_exponents
from stabkit.results import Result
from stabkit.tracing import FlowLike


@dataclass(frozen=True)
class ExponentField(Result):
    """Finite-time exponents on a grid; ridges of the largest separate inputs that end up apart.

    Attributes:
        exponents: ``(rows, columns, k)``, in nats per step; finite-time exponents, not Lyapunov exponents.
        converged: ``(rows, columns)``, whether all of them have.
        first: ``(columns,)``, coordinates along the first direction.
        second: ``(rows,)``, coordinates along the second.
        origin: the point at (0, 0).
        directions: the two directions.
        steps: length of the flow.
    """

    exponents: Tensor
    converged: Tensor
    first: Tensor
    second: Tensor
    origin: Tensor
    directions: tuple[Tensor, Tensor]
    steps: int


@accepts
def exponent_field(
    flow_of: Callable[[Tensor], FlowLike],
    origin: Tensor,
    directions: tuple[Tensor, Tensor],
    *,
    extent: tuple[float, float, float, float] = (-1.0, 1.0, -1.0, 1.0),
    resolution: tuple[int, int] = (64, 64),
    k: int = 1,
    chunk: int = 1024,
    seed: int = 0,
) -> ExponentField:
    """Finite-time exponents at ``origin + a * directions[0] + b * directions[1]`` over a grid of (a, b).

    Args:
        flow_of: makes a flow from a batch of points, say ``lambda x: stabkit.trace(model, x)`` or
            ``lambda x: stabkit.iterate(step, x, 100)``. Samples must be independent.
        origin: one point, without a batch dimension.
        directions: two tensors of its shape.
        extent: least and largest a, least and largest b.
        resolution: how many values of a, and of b.
        k: how many exponents, the largest.
        chunk: how many points are one batch.
        seed: the seed of the frames.

    Raises:
        TraceError: shapes do not fit, or the samples of the flow influence each other.

    Source:
        Haller, "Distinguished material surfaces and coherent structures in three-dimensional fluid flows" (2001); for
        networks Storm, Linander, Bec, Gustavsson and Mehlig, "Finite-time Lyapunov exponents of deep neural networks"
        (2024).

    Example:
        >>> import torch, stabkit
        >>> x, y = torch.eye(2, dtype=torch.float64)
        >>> flow_of = lambda points: stabkit.iterate(lambda z: 2 * z, points, 5)
        >>> field = exponent_field(flow_of, torch.zeros(2, dtype=torch.float64), (x, y), resolution=(3, 2))
        >>> field.exponents.shape, round(float(field.exponents.mean()), 6)
        (torch.Size([2, 3, 1]), 0.693147)
    """
    if any(direction.shape != origin.shape for direction in directions):
        shapes = [tuple(direction.shape) for direction in directions]
        raise TraceError(f"directions have shapes {shapes}; expected that of origin, {tuple(origin.shape)}")
    if min(resolution) < 1 or chunk < 1:
        raise TraceError(f"resolution={resolution}, chunk={chunk}; expected positive numbers")
    first = torch.linspace(extent[0], extent[1], resolution[0], dtype=torch.float64)
    second = torch.linspace(extent[2], extent[3], resolution[1], dtype=torch.float64)
    b, a = (grid.reshape(-1, *[1] * origin.dim()).to(origin) for grid in torch.meshgrid(second, first, indexing="ij"))
    points = origin + a * directions[0] + b * directions[1]
    exponents, converged, steps = [], [], 0
    for part in torch.split(points, chunk):
        flow = flow_of(part)
        if flow.batch != len(part):
            raise TraceError(f"{len(part)} points became {flow.batch} samples: they influence each other in this flow")
        found = finite_time_exponents(flow, k, seed=seed)
        exponents.append(found.exponents)
        converged.append(found.converged.all(1))
        steps = len(flow)
    shape = (resolution[1], resolution[0])
    return ExponentField(
        exponents=torch.cat(exponents).reshape(*shape, k),
        converged=torch.cat(converged).reshape(shape),
        first=first,
        second=second,
        origin=origin,
        directions=directions,
        steps=steps,
    )
