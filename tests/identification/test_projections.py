"""Quotients of inner products inside of a step: projections and line searches are no solvers, rounds of one are."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from stabkit.identification import identify
from stabkit.tracing import trace

WIDTH = 12


def along(f, x):
    """The part of f along x."""
    return (f * x).sum(-1, keepdim=True) / (x * x).sum(-1, keepdim=True) * x


def mlp():
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))


class Block(nn.Module):
    def __init__(self, step):
        super().__init__()
        self.f, self.g, self.step = mlp(), mlp(), step
        self.A = nn.Parameter(torch.randn(WIDTH, WIDTH) / WIDTH**0.5)

    def forward(self, x):
        return self.step(self, x)


def rejected(block, x):
    f = block.f(x)
    return x + f - along(f, x)


def both_rejected(block, x):
    f, g = block.f(x), block.g(x)
    return x + (f - along(f, x)) + (g - along(g, x))


def orthogonal(block, x):
    f, g = block.f(x), block.g(x)
    g = g - along(g, f)
    return x + f + g - along(g, x)


def line_search(block, x):
    r = -(x @ block.A.T @ block.A)
    q = r @ block.A.T
    return x + (r * r).sum(-1, keepdim=True) / (q * q).sum(-1, keepdim=True) * r


def conjugate_gradients(block, x, rounds=3):
    p = r = x + block.f(x)
    y, rr = torch.zeros_like(x), (r * r).sum(-1, keepdim=True)
    for _ in range(rounds):
        q = p @ block.A.T @ block.A + p
        a = rr / (p * q).sum(-1, keepdim=True)
        y, r = y + a * p, r - a * q
        new = (r * r).sum(-1, keepdim=True)
        p, rr = r + new / rr * p, new
    return y


def names(step):
    torch.manual_seed(0)
    found = identify(trace(nn.Sequential(*(Block(step) for _ in range(3))), torch.randn(3, WIDTH)))
    return {(r.name, r.evidence) for r in found}


@pytest.mark.parametrize("step", [rejected, both_rejected, orthogonal, line_search])
def test_branches_of_which_parts_are_taken_away_are_one_field(step):
    assert names(step) == {("forward Euler", "proven")}


def test_rounds_of_one_operator_are_a_solver():
    assert names(conjugate_gradients) == {("iterative solver inside", "unknown")}
