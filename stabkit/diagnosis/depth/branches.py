"""Additions of a branch to a skip: what the branch alone passes back, beside a skip that passes everything."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import Node

from stabkit.identification.form.operations import ADDS, MOVES, SCALES, has_matrix
from stabkit.tracing import Flow, Step
from stabkit.tracing.graph.values import Value, meta_of, operation, outputs_of, probes_of, random_tensors
from stabkit.tracing.products.node_derivatives import apply_node, is_python_node
from stabkit.tracing.products.segments import Segment
from stabkit.vocabulary import norm_of


@dataclass(frozen=True)
class Merge:
    """One addition of a branch to a skip.

    Attributes:
        module_path: where the branch ends: the module of its last matrix.
        gain: 1/2 log(|B|_F^2 / m) of the branch's Jacobian B with respect to the skip, over all samples, nats. -inf
            for a branch that passes nothing.
    """

    module_path: str
    gain: float


def merges(flow: Flow, step: Step, seed: int = 0) -> tuple[Merge, ...]:
    """The additions in a step of something that passed a branch to something that reached it past all branches.

    The step was differentiated before, so that its saved tensors are at hand.
    """
    segment = step.segment
    free = _free_values(segment)
    found = []
    for node in segment.nodes:
        inputs = list(dict.fromkeys(segment.graph.inputs[node]))
        if operation(node) not in ADDS or len(inputs) != 2 or node in segment.graph.recurrent:
            continue
        skips = [value for value in inputs if value in free]
        if len(skips) == 1:
            branch = inputs[0] if inputs[1] == skips[0] else inputs[1]
            path = flow.recorded.path_of(_last_matrix(segment, branch.node))
            found.append(Merge(path, _gain(segment, skips[0], branch, free, seed)))
    return tuple(found)


def _free_values(segment: Segment) -> set[Value]:
    """Values that the source reaches by moving, scaling, adding and normalising alone."""
    free = set(segment.source)
    for node in segment.nodes:
        inputs = segment.graph.inputs[node]
        name = operation(node)
        passes = (
            name in MOVES or name in ADDS or norm_of(node) is not None or (name in SCALES and len(set(inputs)) == 1)
        )
        if passes and not is_python_node(node) and any(value in free for value in inputs):
            free.update(outputs_of(node))
    return free


def _gain(segment: Segment, skip: Value, branch: Value, free: set[Value], seed: int) -> float:
    """The branch pulled back to the values that the skip was made of."""
    inside, stops, stack = set(segment.nodes), set(segment.source), [skip]
    while stack:
        value = stack.pop()
        stops.add(value)
        if value.node in inside:
            stack.extend(v for v in segment.graph.inputs[value.node] if v in free and v not in stops)
    sent = arrived = 0.0
    before = segment.nodes[: segment.nodes.index(branch.node) + 1] if branch.node in inside else []
    for probe in range(probes_of(meta_of(branch).numel)):
        grads: dict[Value, Tensor] = {branch: random_tensors([branch], seed + probe)[0]}
        sent += _energy(grads[branch])
        with torch.no_grad():
            for node in reversed(before):
                given = [None if value in stops else grads.pop(value, None) for value in outputs_of(node)]
                if all(g is None for g in given):
                    continue
                for value, grad in apply_node(node, given, segment.graph.inputs[node]):
                    grads[value] = grads[value] + grad if value in grads else grad
        arrived += sum(_energy(grad) for value, grad in grads.items() if value in stops)
    return 0.5 * math.log(arrived / sent) if arrived > 0 else (-math.inf if arrived == 0 else math.nan)


def _energy(tensor: Tensor) -> float:
    wide = torch.complex128 if tensor.is_complex() else torch.float64
    norm = float(torch.linalg.vector_norm(tensor, dtype=wide))
    return norm * norm


def _last_matrix(segment: Segment, node: Node) -> Node:
    current, inside = node, set(segment.nodes)
    while current in inside:
        if has_matrix(current) or not segment.graph.inputs[current]:
            return current
        current = segment.graph.inputs[current][0].node
    return node
