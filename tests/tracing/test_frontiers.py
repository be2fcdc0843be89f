from __future__ import annotations

import networkx as nx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stabkit.tracing.graph.frontiers import Frontiers
from stabkit.tracing.graph.graph import Graph
from stabkit.tracing.graph.values import Value, meta_of, value_of
from stabkit.tracing.products.segments import Segment
from stabkit.tracing.recording.inputs import non_leaf

CODES = st.lists(st.tuples(st.integers(0, 8), st.integers(0, 50), st.integers(0, 50)), min_size=1, max_size=14)


def program(x: Tensor, codes: list[tuple[int, int, int]]) -> Tensor:
    """A random program with branches, views, in-place writes, shared values and changes of shape.

    What a backward formula saves is a copy, so that every in-place write is legal.
    """
    values = [x.sin()]
    for code, first, second in codes:
        a, b = values[first % len(values)], values[second % len(values)]
        match code:
            case 0:
                values.append(a.clone().tanh().clone())
            case 1:
                values.append(a + b)
            case 2:
                values.append(a.clone() * b.clone().cos())
            case 3:
                values.append(torch.cat([a[:, 1:], b[:, :1]], dim=1))
            case 4:
                a.mul_(0.5)
            case 5:
                a[:, :2] = b[:, 1:].clone().sin()
            case 6:
                values.append(a.t())  # shares its storage with a
            case 7:
                values.append(a[:, [1, 2, 0]])
            case 8:
                left, right = a.clone().split([1, 2], dim=1)
                values.append(torch.cat([right, left * b[:, :1].clone()], dim=1))
    return sum(values[1:], values[0]).exp()


def chain(graph: Graph, positions: list[int], cotangent: Tensor) -> Tensor:
    frontiers = Frontiers(graph)
    cotangents = [cotangent]
    for start, stop in zip(positions[-2::-1], positions[:0:-1], strict=True):
        cotangents = Segment(graph, frontiers.at(start), frontiers.at(stop), start, stop).vjp(cotangents)
    return cotangents[0]


@settings(deadline=None, max_examples=60)
@given(CODES, st.integers(0, 1000), st.integers(0, 1000))
def test_the_frontier_at_any_two_positions_is_an_exact_state(codes, first, second):
    x = non_leaf(torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    out = program(x, codes)
    graph = Graph([value_of(x)], [value_of(out)])
    positions = sorted({0, first % (len(graph.nodes) + 1), second % (len(graph.nodes) + 1), len(graph.nodes)})
    cotangent = torch.linspace(-1, 1, 9, dtype=torch.float64).view(3, 3)
    (truth,) = torch.autograd.grad(out, x, cotangent, retain_graph=True)
    torch.testing.assert_close(chain(graph, positions, cotangent), truth, rtol=1e-12, atol=1e-12)


@settings(deadline=None, max_examples=40)
@given(CODES)
def test_cuts_are_the_dominators_of_the_target(codes):
    x = non_leaf(torch.randn(3, 3, dtype=torch.float64))
    graph = Graph([value_of(x)], [value_of(program(x, codes))])
    # values as vertices of a graph of their own, so that an operation with two outputs is no cut by itself
    values = nx.DiGraph()
    for node in graph.nodes:
        for value in graph.inputs[node]:
            values.add_edge(value, node)
        values.add_edges_from((node, Value(node, output)) for output in range(len(node._input_metadata)))
    dominator = nx.immediate_dominators(values, graph.sources[0])
    expected, vertex = {graph.sources[0]}, graph.targets[0]
    while vertex != graph.sources[0]:
        expected |= {vertex} if isinstance(vertex, Value) else set()
        vertex = dominator[vertex]
    frontiers = Frontiers(graph)
    assert {frontiers.at(position)[0] for position in frontiers.cuts()} == expected


@settings(deadline=None, max_examples=40)
@given(CODES)
def test_widths_count_the_values_born_before_and_used_after(codes):
    x = non_leaf(torch.randn(3, 3, dtype=torch.float64))
    graph = Graph([value_of(x)], [value_of(program(x, codes))])
    frontiers = Frontiers(graph)
    for position, width in enumerate(frontiers.width):
        born = {*graph.sources, *(Value(n, i) for n in graph.nodes[:position] for i in range(9))}
        used = {value for node in graph.nodes[position:] for value in graph.inputs[node]} | set(graph.targets)
        assert set(frontiers.at(position)) == born & used
        assert width == len(born & used)


@pytest.mark.parametrize(
    ("step", "width"),
    [
        (lambda h: (h[0] + h[0].tanh(),), 1),  # residual
        (lambda h: (h[1], 0.9 * h[1] + h[0].tanh()), 2),  # two-step
        (lambda h: (h[0] + h[1].tanh(), h[1] + (h[0] + h[1].tanh()).sin()), 2),  # reversible
    ],
    ids=["residual", "two-step", "reversible"],
)
def test_width_between_blocks_is_the_number_of_carried_values(step, width):
    x = non_leaf(torch.randn(2, 3))
    state = tuple(x * (i + 1) for i in range(width))
    boundaries = []
    for _ in range(4):
        state = step(state)
        boundaries.append([value_of(tensor) for tensor in state])
    graph = Graph([value_of(x)], [value_of(sum(state[1:], state[0]))])
    frontiers = Frontiers(graph)
    for values in boundaries[1:-1]:
        position = max(graph.rank[value.node] for value in values) + 1
        assert frontiers.width[position] == width
        assert set(frontiers.at(position)) == set(values)


def test_densely_connected_layers_have_a_growing_frontier():
    x = non_leaf(torch.randn(2, 3))
    features = [x]
    for _ in range(4):
        features.append(torch.cat(features, dim=1).mean(1, keepdim=True))
    graph = Graph([value_of(x)], [value_of(torch.cat(features, dim=1))])
    frontiers = Frontiers(graph)
    ends = [graph.rank[value_of(feature).node] + 1 for feature in features[1:]]
    assert [frontiers.width[end] for end in ends] == [2, 3, 4, 5]


def test_a_skip_is_two_values_wide_and_its_ends_one():
    x = non_leaf(torch.randn(2, 3))
    graph = Graph([value_of(x)], [value_of((x.tanh() + x).exp())])
    frontiers = Frontiers(graph)
    assert frontiers.width == [1, 2, 1, 1]
    assert meta_of(frontiers.at(1)[0]).shape == (2, 3)
