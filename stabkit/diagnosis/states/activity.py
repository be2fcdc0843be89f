"""How much elementwise activations let through: their own derivative, at the recorded states."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass

import torch
from torch.autograd.graph import Node

from stabkit.identification.form.operations import ADDS, MOVES, PRODUCTS, SCALES, has_matrix
from stabkit.tracing import Flow, Step
from stabkit.tracing.graph.graph import Element, element_of
from stabkit.tracing.graph.values import meta_of, operation
from stabkit.tracing.products.segments import Segment
from stabkit.vocabulary import ActivationFacts, norm_of

_FLAT = 1e-3  # derivative, over its largest value, under which a one-sided unit passes nothing
_SATURATED = 0.05  # derivative, over its largest value, under which an entry counts as saturated


@dataclass(frozen=True)
class Activity:
    """How much one activation lets through.

    Attributes:
        operation: ``"Relu"``, ``"Tanh"``, ...
        module_path: the module that it runs in.
        units: how many units (channels) it has.
        observations: entries per unit: samples times positions.
        dead: share of units that pass nothing at any of them; 0 for two-sided activations.
        saturated: share of entries where the derivative is below a twentieth of its largest value; 0 for one-sided
            activations.
        log_derivative: mean log of the derivative over its largest value, at least log 1e-6, nats. The largest that it
            can have, or where that has no bound, the largest that it has here.
        fed_by: the module of the matrix that feeds it, where that lies in the same step.
        facts: what is known of it.
        gate: whether its output multiplies something else: a gate may well stay open or shut.
    """

    operation: str
    module_path: str
    units: int
    observations: int
    dead: float
    saturated: float
    log_derivative: float
    facts: ActivationFacts
    gate: bool
    fed_by: str = ""


def activities(flow: Flow, step: Step) -> tuple[Activity, ...]:
    """The activations of a step whose saved tensors are at hand (it was differentiated before)."""
    segment = step.segment
    around = _Around(segment)
    elements = dict.fromkeys(element_of(segment.graph, node) for node in segment.nodes)
    return tuple(
        _activity(flow, around, element, element.facts)
        for element in elements
        if element is not None
        and isinstance(element.facts, ActivationFacts)
        and element.facts.flat_side != "above"
        and around.inside.issuperset(element.nodes)
        and meta_of(element.target).shape  # a bound on a single number, as on a step size, is none
    )


class _Around:
    """The nodes of a segment, and who reads what each of them makes: asked for once, for all its activations."""

    def __init__(self, segment: Segment) -> None:
        self.segment = segment
        self.inside = set(segment.nodes)
        self.readers: defaultdict[Node, list[Node]] = defaultdict(list)
        for node in segment.nodes:
            for source in {value.node for value in segment.graph.inputs[node]}:
                self.readers[source].append(node)


def _activity(flow: Flow, around: _Around, element: Element, facts: ActivationFacts) -> Activity:
    node, two_sided, meta = element.nodes[0], facts.flat_side == "both", meta_of(element.target)
    derivative = element.pull(around.segment.graph, torch.ones(meta.shape, dtype=meta.dtype, device=meta.device))
    derivative = derivative.to(torch.float32)
    size = derivative.abs()
    # a slope without bound, as that of ReLU squared, is held against the steepest that occurs
    size = size / (facts.steepest if math.isfinite(facts.steepest) else size.max().clamp_min(1e-30))
    axis = _unit_axis(around, node, derivative.dim())
    rows = size.movedim(axis, 0).flatten(1) if size.dim() > 1 else size.reshape(-1, 1)
    flat = rows <= _FLAT
    return Activity(
        operation=element.name,
        module_path=flow.recorded.path_of(node),
        units=rows.shape[0],
        observations=rows.shape[1],
        dead=0.0 if two_sided else float(flat.all(1).float().mean()),
        saturated=float((rows < _SATURATED).float().mean()) if two_sided else 0.0,
        log_derivative=float(rows.clamp_min(1e-6).log().mean()),
        facts=facts,
        gate=_feeds_product(around, element.nodes[-1]),
        fed_by=_fed_by(flow, around, node),
    )


def _unit_axis(around: _Around, node: Node, dims: int) -> int:
    """Which axis counts units: the second after a convolution, the last otherwise."""
    current, inputs = node, around.segment.graph.inputs
    while current in around.inside and inputs.get(current):
        if operation(current).startswith("Convolution"):
            return 1 if dims > 2 else 0
        if has_matrix(current):
            break
        norm = norm_of(current)
        if norm is not None and "positions" in norm.over:
            return 1 if dims > 1 else 0
        current = inputs[current][0].node
    else:
        return 1 if dims == 4 else dims - 1  # the activation stands alone: images are (batch, channels, ...)
    return dims - 1


def _fed_by(flow: Flow, around: _Around, node: Node) -> str:
    """The module of the nearest matrix before an activation, along the first inputs."""
    current, inputs = node, around.segment.graph.inputs
    while current in around.inside and inputs.get(current):
        if has_matrix(current):
            return flow.recorded.recording.path_at(current._sequence_nr())
        current = inputs[current][0].node
    return ""


def _feeds_product(around: _Around, node: Node) -> bool:
    """Whether what it puts out is multiplied, perhaps after shifts and scalings, by something that depends on x."""
    reached, stack = {node}, [node]
    while stack:
        for reader in around.readers[stack.pop()]:
            alone = len(set(around.segment.graph.inputs[reader])) == 1
            if operation(reader) in PRODUCTS and not alone:
                return True
            if alone and reader not in reached and operation(reader) in SCALES | ADDS | MOVES:
                reached.add(reader)
                stack.append(reader)
    return False
