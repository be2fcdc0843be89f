"""Loops inside one module that calls no others: recurrences of products with a graph."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from stabkit.identification import identify
from stabkit.tracing import trace

NODES, ROUNDS = 10, 7


def by_index(x, edges):
    row, col = edges
    return torch.zeros_like(x).index_add(0, col, 0.5 * x[row])


def by_scatter(x, edges):
    row, col = edges
    return torch.zeros_like(x).scatter_add(0, col[:, None].expand(-1, x.shape[1]), 0.5 * x[row])


class Chebyshev(nn.Module):
    def __init__(self, product):
        super().__init__()
        self.first, self.product = nn.Linear(3, 4), product
        self.weights = nn.Parameter(torch.rand(ROUNDS + 2))

    def forward(self, x, edges):
        old = self.first(x)
        new = self.product(old, edges)
        total = self.weights[0] * old + self.weights[1] * new
        for weight in self.weights[2:]:
            old, new = new, 2 * self.product(new, edges) - old
            total = total + weight * new
        return total


@pytest.mark.parametrize("product", [by_index, by_scatter])
def test_a_recurrence_of_three_terms_beside_a_sum_is_a_method_of_three_states(product):
    torch.manual_seed(0)
    a = torch.arange(NODES)
    edges = torch.stack([torch.cat([a, (a + 1) % NODES]), torch.cat([(a + 1) % NODES, a])])
    model = Chebyshev(product)
    found = identify(trace(model, torch.randn(NODES, 3), edges, batch_dim=None))
    rounds = [record for record in found if record.name not in ("fork", "join", "transition")]
    assert len(rounds) == ROUNDS
    assert {r.name for r in rounds} == {"general linear method of 3 states"}
    rounds = [record for record in rounds if record.method is not None]  # of the last step two states are dropped
    assert [record.method.states for record in rounds] == [3] * (ROUNDS - 1)
    weights = model.weights.tolist()
    for z in (0.3, -0.8):  # one after the other they sum Chebyshev polynomials, T_(n+1) = 2 z T_n - T_(n-1)
        states, total, angle = np.array([1.0, z, 0.0]), 0.0, np.arccos(z)
        for n, record in enumerate(rounds, 1):
            states = np.asarray(record.method.stability_matrix(z)).real @ states
            total += weights[n] * np.cos(n * angle)
            assert sorted(states) == pytest.approx(
                sorted([np.cos(n * angle), total, np.cos((n + 1) * angle)]), abs=1e-6
            )
