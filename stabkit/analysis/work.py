"""How much the spectra of a report may cost, counted in operations, and which steps get how much of it.

Everything is counted and nothing is timed, so that the same call spends the same and gives the same numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from stabkit.identification.form.operations import has_matrix, is_opaque
from stabkit.jacobians.method_choice import krylov_products
from stabkit.tracing import Flow, Step, same_space
from stabkit.tracing.graph.values import Value, meta_of, operation, random_tensors

LEAST = 64  # products from which a spectrum says something
FEWEST = 32  # and from which the largest singular value alone does: of random matrices it is then known to about 2 %
_PER_NODE = 2e5  # operations that the call of one node is worth in a backward pass of torch's engine,
_PER_STACKED_NODE = 4e5  # and one by one, for each of several vectors at once
_PER_VECTOR = 2e6  # and the projected problem, for every vector of a Krylov basis
# and when it is traced anew: a millisecond of a thread whose products make 3e10 to 5e10 of them a second
_PER_TRACED_NODE = 4e7
# a product of two vectors with one sample is made at a lower rate than the operations of a training step: by 1.2 to 1.5
# for the blocks of a small vision transformer
_RATE = 1.3
# a convolution puts its weight in another order at each call: .2 to .5 ns a number and vector in the last two stages of
# resnet18 at 64 x 64, where nine tenths of a product's time go there, and 9e10 operations a second elsewhere
_PER_ORDERED_NUMBER = 35
_BASIS = 400  # operations that a new vector is made orthogonal with, for each of its numbers


@dataclass(frozen=True)
class Demand:
    """What the Krylov spectrum of one step asks for.

    Attributes:
        index: the index of the step.
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
    keeps_space = same_space(step.source, step.target)
    product = operations(step)
    cost = _RATE * product + _PER_STACKED_NODE * len(step.segment.nodes) + _PER_VECTOR + _BASIS * (m + n)
    cost += _PER_ORDERED_NUMBER * sum(_kernel(node) for node in step.segment.nodes)
    return Demand(step.index, product, cost, krylov_products(max(m, n)) * (2 if keeps_space else 1))


def operations(step: Step) -> float:
    """Floating-point operations of one product with the transposed Jacobian, all samples of the flow together.

    Those of matrix products and convolutions, from their shapes. A step with other operations that have weights or are
    products (a fused attention, a custom ``Function``) is run once, and what it calls is counted.
    """
    segment = step.segment
    counts = [_of_node(node, segment.graph.inputs[node]) for node in segment.nodes]
    if None not in counts:
        return sum(filter(None, counts), 0.0)
    with _Operations() as counter:
        step.vjp(random_tensors(step.target.values, 0))
    return float(counter.total)


def _kernel(node: Any) -> int:
    """The numbers of a convolution's weight."""
    return int(node._saved_weight.numel()) if operation(node) == "Convolution" else 0


def _of_node(node: Any, active: Sequence[Value]) -> float | None:
    """Those of one node; None where its shapes do not tell."""
    name, out = operation(node), meta_of(Value(node, 0))
    if name in ("Mm", "Addmm", "Bmm", "Baddbmm"):
        saved = (getattr(node, f"_saved_{kept}", None) for kept in ("self", "mat1", "batch1"))
        first = next((tensor for tensor in saved if tensor is not None), None)
        second = getattr(node, "_saved_batch2" if name == "Baddbmm" else "_saved_mat2", None)
        inner = second.shape[-2] if second is not None else first.shape[-1] if first is not None else 1
        return 2.0 * out.numel * inner * len(active)
    if name == "Convolution":
        weight: Tensor = node._saved_weight
        at = meta_of(active[0]) if node._saved_transposed else out
        return 2.0 * at.numel * weight[0].numel() * len(active)
    return None if is_opaque(node) or has_matrix(node) else 0.0


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts as ``torch.utils.flop_counter`` does, without its attempt to take every other operation apart."""

    def __init__(self) -> None:
        from torch.utils.flop_counter import flop_registry  # brings triton in, where that is installed

        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0
        self._counts: Any = flop_registry

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        count = self._counts.get(func._overloadpacket)
        if count is not None:
            self.total += count(*args, **(kwargs or {}), out_val=out)
        return out


def training_step(flow: Flow, samples: int, demands: Mapping[int, Demand]) -> float:
    """Operations of a forward and a backward pass of the whole batch, in the same count.

    Args:
        flow: the flow of the whole batch.
        samples: that the demands are for.
        demands: what every step asks for, by index.
    """
    return sum(
        3.0 * demands[step.index].operations * flow.batch / samples
        # the loop of a recurrent layer is one fused operation when it trains
        + _PER_NODE * sum(node not in step.segment.graph.recurrent for node in step.segment.nodes)
        for step in flow.steps
    )


def pays_to_shorten(flow: Flow, samples: int, demands: Sequence[Demand]) -> bool:
    """Whether products with the wanted samples alone save more than it takes to trace these anew.

    A recurrent layer written out costs its many nodes, however few the samples.

    Args:
        flow: the flow of the whole batch.
        samples: that are wanted.
        demands: what the steps that products are made with ask for, of the whole batch.
    """
    saved = LEAST * sum(one.operations for one in demands) * max(0.0, 1 - samples / flow.batch)
    return saved > _PER_TRACED_NODE * sum(len(step.segment.nodes) for step in flow.steps)


def allot(demands: Sequence[Demand], limit: float) -> dict[int, int]:
    """Products for every step that gets any, by index, all together within a limit of operations.

    Every step gets as many where that is enough to say something; otherwise the first ones get the least that is. The
    first of all gets something in any case: the fewest, where these alone pass the limit.

    Args:
        demands: the most important first.
        limit: operations.

    Example:
        >>> steps = [Demand(3, 1.0, 1.0, 400), Demand(0, 1.0, 1.0, 400), Demand(1, 2.0, 2.0, 400)]
        >>> allot(steps, 2000.0), allot(steps, 400.0), allot(steps, 100.0)
        ({3: 400, 0: 400, 1: 400}, {3: 100, 0: 100, 1: 100}, {3: 64})
        >>> allot(steps, 20.0)
        {3: 32}
    """
    shared = _level(demands, limit)
    if shared >= LEAST:
        return {one.index: min(one.products, shared) for one in demands}
    found: dict[int, int] = {}
    for one in demands:
        if found and one.cost * LEAST > limit:
            break
        count = LEAST if one.cost * FEWEST <= limit else FEWEST
        found[one.index] = min(one.products, count)
        limit -= one.cost * count
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
