"""Recurrences that are kept in units of the exponential of a running maximum, so that no exponential overflows.

With m' = max(m + w, k) the states x' = exp(m + w - m') x + exp(k - m') v stand for X = exp(m) x, of which
X' = exp(w) X + exp(k) v (RWKV, Peng et al. 2023; mLSTM, Beck et al. 2024). What multiplies the stored x is no number of
that recurrence: exp(w) is it times exp(m' - m). That is told where it is the same at several times, whatever m was.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stabkit.identification.form.operations import ADDS, MOVES
from stabkit.tracing.graph.graph import Graph
from stabkit.tracing.graph.scans import Scan
from stabkit.tracing.graph.values import Value, operation

EXTREMES = frozenset({"Maximum", "Minimum"})
_SAME = 1e-4  # relative; differences of maxima in single precision, which are exponentiated


def is_maximum(scan: Scan) -> bool:
    """Whether the states of a recurrence are running maxima: nothing on its way but sums, moves and extremes."""
    names = {operation(node) for node in scan.cycle}
    return names <= EXTREMES | MOVES | ADDS and not names.isdisjoint(EXTREMES)


def maximum_of(graph: Graph, scan: Scan, others: Sequence[Scan]) -> Scan | None:
    """The running maximum that makes the numbers of a recurrence; None where there is none."""
    if is_maximum(scan):
        return None
    for other in filter(is_maximum, others):
        wanted = {value for state in other.states for value in state}
        if _is_made_of(graph, scan, wanted):
            return other
    return None


def _is_made_of(graph: Graph, scan: Scan, wanted: set[Value]) -> bool:
    """Whether what enters a time step is made of some values, within two time steps."""
    first = scan.positions[scan.middle] - 2 * scan.period
    stack, seen = [v for node in scan.cycle for v in graph.inputs[node] if v.node not in scan.cycle], set[Value]()
    own = {value for state in scan.states for value in state}
    while stack:
        value = stack.pop()
        if value in wanted:
            return True
        if value not in seen and value not in own and graph.rank.get(value.node, -1) >= first:
            seen.add(value)
            stack.extend(graph.inputs.get(value.node, ()))
    return False


def without_maximum(graph: Graph, scan: Scan, maximum: Scan, factors: Sequence[Tensor]) -> Tensor | None:
    """The numbers of a recurrence at some times in a row without its running maximum; None unless always the same.

    Args:
        graph: the recorded graph.
        scan: the recurrence.
        maximum: its running maximum.
        factors: what multiplies its stored states from the time in the middle on.
    """
    nodes = [state[0].node for state in maximum.states]
    found: list[Tensor] = []
    for time, factor in enumerate(factors, scan.middle):
        low, high = (graph.rank[scan.states[i][0].node] for i in (time, time + 1))
        places = [i for i, node in enumerate(nodes) if low < graph.rank[node] < high]
        if len(places) != 1 or places[0] == 0:
            return None
        after, before = (_value_of(nodes[places[0] - lag]) for lag in (0, 1))
        if after is None or before is None or after.numel() != factor.numel():
            return None
        found.append(factor * torch.exp(after - before).reshape(factor.shape).to(factor))
    size = float(torch.stack(found).abs().max()) if found else 0.0
    alike = len(found) > 1 and all(bool(torch.allclose(a, found[0], rtol=_SAME, atol=_SAME * size)) for a in found)
    return found[0] if alike else None


def _value_of(node: Any) -> Tensor | None:
    """What an extreme of two values gave out."""
    one, other = (getattr(node, name, None) for name in ("_saved_self", "_saved_other"))
    if operation(node) not in EXTREMES or one is None or other is None:
        return None
    found: Tensor = torch.maximum(one, other) if operation(node) == "Maximum" else torch.minimum(one, other)
    return found.detach()
