"""Operations that average the nodes of a graph with their neighbours, and what a model is without some of them.

A product with a fixed square matrix that is normalised, or a sum over edges: what is gathered by one list of nodes and
added up by another. How much each takes of what tells nodes apart is measured where it runs, which weights
that are small beside their biases do not change; on trial all but the first few leave every node as it is.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from stabkit.diagnosis.finding import Finding
from stabkit.diagnosis.remedies.short_training import STEPS, clearly_better, short_training
from stabkit.diagnosis.states.collapse import TELLS, dispersion
from stabkit.errors import StabkitError
from stabkit.tracing import Flow
from stabkit.tracing.recording.forward_pass import ForwardPass
from stabkit.tracing.recording.function_calls import FunctionCalls, name_of

_PRODUCTS = frozenset({"matmul", "rmatmul", "mm", "bmm", "einsum", "spmm", "sparse_mm"})
_GATHERS = frozenset({"index_select", "getitem"})
_SCATTERS = frozenset({"index_add", "scatter_add", "scatter_reduce", "index_reduce"})
_RADIUS, _POWERS = 1.01, 30  # the largest eigenvalue of a normalised matrix is 1; steps of the power method to it
_FEWEST = 3  # nodes, and operations in a row that make them alike
_LARGEST = 4096  # nodes of a matrix that is made dense to be read
_HELD = 8  # gathered lists that may still be added up
_KEPT = 2  # layers that average in a usual network of graphs
_MOST = 0.5  # of the fall, from which it is theirs: what else makes states alike is small weights beside biases
_ALIKE = 1e-3  # of the energy of a state, what tells nodes apart where they alone are enough
_LEAST = 1e-16  # of the energy of a state, which is rounding
_KNOWN = "known to help, and not tried: 2 to 4 such layers, a skip from the first state to each (GCNII), or PairNorm"
_REFERENCE = (
    "Li, Han and Wu, Deeper insights into graph convolutional networks, 2018; Oono and Suzuki, 2020; "
    "Chen et al., Simple and deep graph convolutional networks (GCNII), 2020"
)


class Averages(FunctionCalls):
    """Sees averages over neighbours, and takes those after some for the identity.

    Attributes:
        products: how many were products with a matrix.
        scatters: how many were sums over edges.
        fall: log of how often less tells nodes apart behind them than before, each by itself, all together.
    """

    def __init__(self, kept: int | None = None, every: int = 0) -> None:
        super().__init__()
        self._every = every  # how many one pass has, where there are several passes
        self.products = self.scatters = 0
        self.fall = 0.0
        self._kept = kept
        self._read: dict[int, tuple[Tensor, bool]] = {}
        self._gathered: list[tuple[Tensor, Tensor]] = []

    @property
    def count(self) -> int:
        """How many there were of both sorts."""
        return self.products + self.scatters

    @property
    def _place(self) -> int:
        return (self.count - 1) % self._every if self._every else self.count - 1

    def _called(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name, out = name_of(func), func(*args, **kwargs)
        if not isinstance(out, Tensor) or not out.is_floating_point():
            return out
        if name in _GATHERS and isinstance(args[0], Tensor) and out.requires_grad and _picks(args):
            self._gathered = [*self._gathered[-_HELD:], (args[0], out)]
        state = self._averaged(name, args, out)
        if state is None:
            return out
        if name in _PRODUCTS:
            self.products += 1
        else:
            self.scatters += 1
        if self._kept is not None:
            return out if self._place < self._kept else self._instead(name, out, state)
        before, after = (dispersion(t.movedim(-2, 0) if name in _PRODUCTS else t) for t in (state, out))
        if before > 0 and after > 0:
            self.fall += math.log(before / after)
        return out

    @staticmethod
    def _instead(name: str, out: Tensor, state: Tensor) -> Tensor:
        """The state of every node as it was, also where the sum was written in place."""
        return state if name not in _SCATTERS else out.copy_(state)

    def _averaged(self, name: str, args: tuple[Any, ...], out: Tensor) -> Tensor | None:
        """The state of the nodes that an operation averages; None for any other."""
        if name in _PRODUCTS:
            return self._of_product(args, out)
        if name not in _SCATTERS:
            return None
        states = [s for s, g in self._gathered if s.shape == out.shape and any(_made_of(a, g) for a in args)]
        return states[-1] if states else None

    def _of_product(self, args: tuple[Any, ...], out: Tensor) -> Tensor | None:
        flat = [each for a in args for each in (a if isinstance(a, list | tuple) else [a])]
        given = [a for a in flat if isinstance(a, Tensor)]
        fixed = [a for a in given if not a.requires_grad]
        if len(given) != 2 or len(fixed) != 1:
            return None
        state = next(a for a in given if a.requires_grad)
        return state if state.shape == out.shape and self._is_normalised(fixed[0]) else None

    def _is_normalised(self, matrix: Tensor) -> bool:
        if id(matrix) not in self._read:
            self._read[id(matrix)] = matrix, _is_normalised(matrix)  # an id is that of one tensor while that is alive
        return self._read[id(matrix)][1]


def _picks(args: tuple[Any, ...]) -> bool:
    """Whether entries are gathered by a list of them."""
    lists = [each for a in args[1:] for each in (a if isinstance(a, tuple) else (a,))]
    return any(isinstance(each, Tensor) and each.dtype in (torch.int64, torch.int32) for each in lists)


def _made_of(argument: Any, gathered: Tensor) -> bool:
    """Whether what is added up is what was gathered, or that times weights, or behind a layer."""
    if not isinstance(argument, Tensor) or argument.grad_fn is None or len(argument) != len(gathered):
        return False
    stack, seen = [argument.grad_fn], set[Any]()
    while stack and len(seen) < 16:  # a message is a few operations long
        node = stack.pop()
        if node is gathered.grad_fn:
            return True
        if node not in seen:
            seen.add(node)
            stack += [parent for parent, _ in node.next_functions if parent is not None]
    return False


def _is_normalised(matrix: Tensor) -> bool:
    """Whether a matrix is square and averages: no entry below zero, most of each row of others, a radius of 1."""
    if matrix.dim() < 2 or matrix.shape[-1] != matrix.shape[-2] or not _FEWEST <= matrix.shape[-1] <= _LARGEST:
        return False
    held = matrix.detach()
    held = (held if held.layout == torch.strided else held.to_dense()).double()
    held = held if held.dim() == 2 else held.flatten(0, -3)[0]
    if bool((held < 0).any()) or not bool(held.isfinite().all()) or not bool(held.any()):
        return False
    if float(held.diagonal().sum()) > 0.9 * float(held.sum()):
        return False
    vector = held.new_ones(len(held))
    for _ in range(_POWERS):
        after = held @ vector
        radius = float(after.norm() / vector.norm())
        vector = after / after.norm().clamp_min(1e-300)
    return 1 / _RADIUS < radius < _RADIUS


def averages(call: ForwardPass) -> Averages | None:
    """The averages over neighbours of one pass; None where the code does not run under a mode that looks on."""
    seen = Averages()
    try:
        with torch.inference_mode(False), call.kept(), torch.enable_grad(), seen:
            call.called()
    except (StabkitError, RuntimeError):
        return None
    return seen


def with_neighbours(flow: Flow, finding: Finding, loss: Any) -> Finding:
    """A collapse as the oversmoothing that it is, where it goes with the averages over neighbours.

    Args:
        flow: the traced pass.
        finding: that states become alike over depth.
        loss: a callable on the output, or None.
    """
    seen = averages(flow.forward_pass)
    if seen is None or seen.count < _FEWEST or "before" not in finding.numbers:
        return finding
    whole = math.log(finding.numbers["before"] / max(finding.numbers["after"], _LEAST))
    if not (seen.fall > _MOST * whole > 0 or finding.numbers["before"] * math.exp(-seen.fall) < _ALIKE):
        return finding
    sorts = [f"{seen.products} products with a fixed normalised adjacency"] * bool(seen.products)
    sorts += [f"{seen.scatters} sums over the edges of a graph"] * bool(seen.scatters)
    words = finding.evidence
    for what in ("tokens", "samples"):
        words = words.replace(TELLS.format(what), TELLS.format("the nodes of the graph"))
    evidence = (
        f"oversmoothing: {' and '.join(sorts)} average every node with its neighbours, again and again, until all "
        f"nodes are alike; {words}; each of these operations by itself leaves 1/"
        f"{math.exp(seen.fall / seen.count):.3g} of what tells nodes apart, and together they are "
        f"{min(1.0, seen.fall / whole):.0%} of the fall"
    )
    remedy = finding.remedy
    fewer = _fewer(flow, loss, seen.count)
    if fewer:
        evidence += fewer
        own = f"; or {remedy}" if finding.actions else ""
        remedy = f"average over neighbours in {_KEPT} layers and let the others be layers of single nodes{own}"
    elif not finding.actions and finding.severity != "info":
        remedy += f"; {_KNOWN}"
    return replace(finding, evidence=evidence, remedy=remedy, reference=_REFERENCE)


def _fewer(flow: Flow, loss: Any, count: int) -> str:
    """What a short training says of a model that averages in few layers, in words; empty where it is no better."""
    plain = short_training(flow, loss)
    treated = short_training(flow, loss, within=lambda: Averages(_KEPT, count))
    if plain is None or treated is None or not clearly_better(treated, plain):
        return ""
    return (
        f"; {STEPS} steps of plain SGD take the loss {plain} as it is, {treated} where the first {_KEPT} average alone"
    )
