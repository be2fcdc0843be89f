"""How much the spectra of a report may cost, counted in operations, and which steps get how much of it.

Everything is counted and nothing is timed, so that the same call spends the same and gives the same numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.flop_counter import FlopCounterMode

from stabkit.jacobians.shared import krylov_products
from stabkit.tracing import Flow, Step
from stabkit.tracing.values import random_tensors

LEAST = 64  # products from which a spectrum says something
_PER_NODE = 2e5  # operations that the call of one node is worth in a backward pass of torch's engine,
_PER_STACKED_NODE = 1e6  # and one by one, for several vectors at once
_PER_VECTOR = 2e6  # and the projected problem, for every vector of a Krylov basis
_BASIS = 400  # operations that a new vector is made orthogonal with, for each of its numbers


@dataclass(frozen=True)
class Demand:
    """What the Krylov spectrum of one step asks for.

    Attributes:
        index: of the step.
        operations: floating-point operations of one product for the samples whose spectra are wanted.
        cost: the same with all that goes with it.
        products: that all its values may take, without a limit on the work.
    """

    index: int
    operations: float
    cost: float
    products: int


def demand(step: Step) -> Demand:
    """What the spectrum of a step of a flow of the wanted samples asks for."""
    m, n = step.target.size, step.source.size
    keeps_space = step.source.sample_shapes == step.target.sample_shapes
    product = operations(step)
    cost = product + _PER_STACKED_NODE * len(step.segment.nodes) + _PER_VECTOR + _BASIS * (m + n)
    return Demand(step.index, product, cost, krylov_products(max(m, n)) * (2 if keeps_space else 1))


def operations(step: Step) -> float:
    """Floating-point operations of one product with the transposed Jacobian, all samples of the flow together."""
    counter: Any = FlopCounterMode(display=False)
    with counter:
        step.vjp(random_tensors(step.target.values, 0))
    return float(counter.get_total_flops())


def training_step(flow: Flow, samples: int, demands: Mapping[int, Demand]) -> float:
    """Operations of a forward and a backward pass of the whole batch, in the same count.

    Args:
        flow: of the whole batch.
        samples: that the demands are for.
        demands: of every step, by index.
    """
    return sum(
        3.0 * demands[step.index].operations * flow.batch / samples + _PER_NODE * len(step.segment.nodes)
        for step in flow.steps
    )


def allot(demands: Sequence[Demand], limit: float) -> dict[int, int]:
    """Products for every step that gets any, by index, all together within a limit of operations.

    Every step gets as many where that is enough to say something; otherwise the first ones get the least that is, and
    the first of all gets it in any case.

    Args:
        demands: the most important first.
        limit: operations.

    Example:
        >>> steps = [Demand(3, 1.0, 1.0, 400), Demand(0, 1.0, 1.0, 400), Demand(1, 2.0, 2.0, 400)]
        >>> allot(steps, 2000.0), allot(steps, 400.0), allot(steps, 100.0)
        ({3: 400, 0: 400, 1: 400}, {3: 100, 0: 100, 1: 100}, {3: 64})
    """
    shared = _level(demands, limit)
    if shared >= LEAST:
        return {one.index: min(one.products, shared) for one in demands}
    found: dict[int, int] = {}
    for one in demands:
        if found and one.cost * LEAST > limit:
            break
        found[one.index] = min(one.products, LEAST)
        limit -= one.cost * LEAST
    return found


def _level(demands: Sequence[Demand], limit: float) -> int:
    """The most products that every step may have; what one does not need is there for the others."""
    left, cost, level = limit, sum(one.cost for one in demands), 0.0
    for one in sorted(demands, key=lambda one: one.products):
        level = left / cost
        if level < one.products:
            return int(level)
        left -= one.cost * one.products
        cost -= one.cost
    return max((one.products for one in demands), default=0)
