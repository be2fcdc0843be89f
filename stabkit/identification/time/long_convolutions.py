"""Linear recurrences that are computed as a convolution by Fourier transforms: those that made its kernel.

The kernel K_l = sum_n c_n a_n^l of a diagonal state-space layer (S4D, Gu et al. 2022) is made of powers, exp(l z), for
all l at once. What multiplies a state per time is then a = exp(z). This is told where the numbers say so: the powers
are 1 at l = 0, each later one is the one before times that at 1, and K_l is the sum of those at l alone, with the same
weights for all l; and where the transform is long enough not to wrap around.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from stabkit.identification.form.operations import ADDS, MOVES
from stabkit.tracing.graph.graph import Graph
from stabkit.tracing.graph.scans import FEWEST
from stabkit.tracing.graph.values import Value, meta_of, operation

_PASSES = MOVES | ADDS | {"Mul", "Sum", "ConstantPadNd"}
_SAME = 1e-4  # relative: exponentials of long times in single precision
_MOST = 500  # operations that a kernel is made of, which are looked at


@dataclass(frozen=True, eq=False)
class Powers:
    """The numbers whose powers make up a kernel.

    Attributes:
        factors: a, for every entry of the state.
        residual: by how much the powers miss each other, relative.
        count: how many times the kernel has.
    """

    factors: Tensor
    residual: float
    count: int


def powers_of_kernels(graph: Graph, nodes: Iterable[Node], is_fed: Callable[[Value], bool]) -> Iterator[Powers]:
    """The powers that kernels of convolutions by Fourier transforms are made of.

    Args:
        graph: a recorded graph, with parameters on it.
        nodes: the operations among which inverse transforms are looked for.
        is_fed: whether a value is made of an input of the model.
    """
    for node in nodes:
        if operation(node) != "FftC2R":
            continue
        given = [value for value in _transformed(graph, node) if meta_of(value).shape]
        fed = [is_fed(value) for value in given]
        if any(fed):
            for value, is_input in zip(given, fed, strict=True):
                if not is_input and (found := _powers(graph, value)) is not None:
                    yield found


def _transformed(graph: Graph, node: Node) -> list[Value]:
    """What was transformed forth before an inverse transform of products of transforms."""
    stack, seen, found = list(graph.inputs[node]), set[Value](), list[Value]()
    while stack:
        value = stack.pop()
        if value in seen:
            continue
        seen.add(value)
        if operation(value.node) == "FftR2C":
            found.extend(graph.inputs.get(value.node, ()))
        elif operation(value.node) in _PASSES:
            stack.extend(graph.inputs.get(value.node, ()))
    return found


def _powers(graph: Graph, value: Value) -> Powers | None:
    """The powers that a kernel is a sum of; None where it is none."""
    long = meta_of(value).shape[-1]
    kernel = value
    while operation(kernel.node) in ("ConstantPadNd", "Slice") and graph.inputs.get(kernel.node):
        kernel = graph.inputs[kernel.node][0]
    count = meta_of(kernel).shape[-1]
    if count < FEWEST or long < 2 * count - 1:
        return None
    for node in _exponentials(graph, kernel):
        made: Any = node
        V = made._saved_result.detach()
        for axis in (axis for axis, size in enumerate(V.shape) if size == count):
            rows = V.movedim(axis, 0)
            away = max(_apart(rows[0], torch.ones_like(rows[0])), _apart(rows[1:], rows[:-1] * rows[1]))
            if away <= _SAME and _is_sum_of(kernel, Value(node, 0), axis, count):
                return Powers(rows[1], away, count)
    return None


def _exponentials(graph: Graph, value: Value) -> list[Node]:
    """The nearest exponentials that a value is made of."""
    stack, seen, found = [value], set[Value](), list[Node]()
    while stack and len(seen) < _MOST:
        v = stack.pop()
        if v in seen:
            continue
        seen.add(v)
        if operation(v.node) == "Exp":
            found.append(v.node)
        else:
            stack.extend(graph.inputs.get(v.node, ()))
    return found


def _is_sum_of(kernel: Value, powers: Value, axis: int, count: int) -> bool:
    """Whether a kernel is, at every time, a sum of the powers at that time, with weights that are the same for all."""
    meta, weights = meta_of(kernel), list[Tensor]()
    for time in (1, count // 2, count - 1):
        given = torch.zeros(meta.shape, dtype=meta.dtype, device=meta.device)
        given[..., time] = 1
        pulled: Tensor | None = torch.autograd.grad(
            [kernel.edge], [powers.edge], [given], retain_graph=True, allow_unused=True
        )[0]
        if pulled is None:
            return False
        rows = pulled.movedim(axis, 0)
        weights.append(rows[time].clone())
        rows = rows.clone()
        rows[time] = 0
        if bool(rows.any()):
            return False
    return bool(weights[0].any()) and all(_apart(w, weights[0]) <= _SAME for w in weights)


def _apart(a: Tensor, b: Tensor) -> float:
    size = float(b.abs().max())
    return float((a - b).abs().max()) / size if size else float(bool(a.any()))
