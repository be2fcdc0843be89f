from __future__ import annotations

import networkx as nx
import torch
from torch import Tensor, nn

from stabkit.tracing import trace
from stabkit.tracing.graph.graph import Graph
from stabkit.tracing.graph.values import operation, value_of
from stabkit.tracing.recording.inputs import non_leaf


def recorded(function, *shape: int) -> Graph:
    x = non_leaf(torch.randn(*shape, dtype=torch.float64))
    return Graph([value_of(x)], [value_of(function(x.view_as(x)))])


def test_nodes_stand_after_the_nodes_they_take_values_from():
    graph = recorded(lambda x: (x.tanh() + x.sin()) * x.exp(), 3)
    for node in graph.nodes:
        assert all(graph.rank.get(value.node, -1) < graph.rank[node] for value in graph.inputs[node])


def test_a_view_regenerated_after_an_in_place_write_keeps_the_order_topological():
    # its sequence number is larger than that of the node that consumes it
    def function(x: Tensor) -> Tensor:
        base = x.sin()
        view = base[:, 1:]
        base.mul_(2)
        base[:, :2] += 1
        return view.exp().sum(1) + base.sum(1)

    graph = recorded(function, 2, 4)
    for node in graph.nodes:
        assert all(graph.rank.get(value.node, -1) < graph.rank[node] for value in graph.inputs[node])
    assert graph.clock == sorted(graph.clock)


def test_operations_beside_the_path_are_left_out():
    def function(x: Tensor) -> Tensor:
        x.cos()  # leads nowhere
        return x.tanh() + torch.ones(3, dtype=torch.float64, requires_grad=True).exp()  # exp is not from the input

    assert [operation(node) for node in recorded(function, 3).nodes] == ["View", "Tanh", "Add"]


def test_an_unrelated_target_is_not_reached():
    x, y = (non_leaf(torch.ones(2)) for _ in range(2))
    assert not Graph([value_of(x)], [value_of(y.exp())]).reached
    assert Graph([value_of(x)], [value_of((x * y).exp())]).reached


def test_states_that_selection_throws_away_are_no_longer_alive():
    def hidden_states(x: Tensor) -> Tensor:
        collected = [x]
        for _ in range(4):
            collected.append(collected[-1].tanh())
        return torch.stack(collected)[-1]

    graph = recorded(hidden_states, 3)
    assert [len(graph.inputs[node]) for node in graph.nodes if operation(node) == "Stack"] == [1]


def test_a_preallocated_buffer_does_not_carry_what_is_overwritten():
    def solver(x: Tensor) -> Tensor:
        solution = torch.zeros(4, *x.shape, dtype=x.dtype)
        solution[0] = x
        for step in range(3):
            x = x + 0.1 * x.sin()
            solution[step + 1] = x
        return solution[-1]

    x = non_leaf(torch.randn(3, dtype=torch.float64))
    target = value_of(solver(x))
    pruned, whole = Graph([value_of(x)], [target]), Graph([value_of(x)], [target], prune=False)
    assert sum(operation(node) == "CopySlices" for node in whole.nodes) == 4
    assert sum(operation(node) == "CopySlices" for node in pruned.nodes) == 1


def test_the_networkx_graph_carries_operations_module_paths_and_steps():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    graph = trace(model, torch.randn(2, 3)).graph
    assert nx.is_directed_acyclic_graph(graph)
    found = [(data["operation"], data["module_path"], data["step"]) for _, data in sorted(graph.nodes(data=True))]
    assert found == [("source", "", -1), ("Addmm", "0", 0), ("Tanh", "1", 1), ("Addmm", "2", 2)]
    assert [shape for *_, shape in graph.edges(data="shape")] == [(2, 3), (2, 4), (2, 4)]


def test_a_constant_that_is_joined_to_the_state_and_cut_off_again_is_a_constant():
    """The step size as a column beside the state, as flow maps that are learned write it."""
    x, h = torch.randn(3, 4, requires_grad=True).clone(), torch.full((3, 1), 0.1)
    whole = torch.cat([x, h], -1)
    state, step = whole[..., :-1], whole[..., -1:]
    target = state + step * torch.tanh(state)
    graph = Graph([value_of(x)], [value_of(target)])
    assert value_of(step).node not in graph.nodes
    (product,) = (node for node in graph.nodes if operation(node) == "Mul")
    assert len(graph.inputs[product]) == 1
    grads = torch.autograd.grad(target.sum(), x, retain_graph=True)[0]
    assert torch.allclose(grads, 1 + 0.1 / torch.cosh(x) ** 2)
