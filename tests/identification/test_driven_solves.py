"""State-space models that solve a linear system in every time step: one implicit step, and no splitting."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from stabkit import identify, trace

N = 6


class Layer(nn.Module):
    """LSSL (Gu et al. 2021): h' of a rule, and what is read out of it."""

    def __init__(self, rule):
        super().__init__()
        torch.manual_seed(0)
        self.A = nn.Parameter(-torch.eye(N) + 0.3 * torch.randn(N, N))
        self.D = nn.Parameter(-torch.eye(N) + 0.3 * torch.randn(N, N))
        self.B, self.C = nn.Parameter(torch.randn(N, 2)), nn.Parameter(torch.randn(3, N))
        self.dt, self.rule = nn.Parameter(torch.tensor(0.1)), rule

    def forward(self, u):
        h = u.new_zeros(len(u), N)
        eye = torch.eye(N).to(u)
        self.inverse = torch.linalg.inv(eye - self.dt / 2 * self.A)
        self.made = self.inverse @ (eye + self.dt / 2 * self.A)
        told = []
        for t in range(u.shape[1]):
            h = self.rule(self, h, u[:, t] @ self.B.T)
            told.append(torch.tanh(h @ self.C.T))
        return torch.stack(told, 1)


def solved(m, theta, right, matrix=None):
    left = torch.eye(N).to(right) - theta * m.dt * (m.A if matrix is None else matrix)
    return torch.linalg.solve(left, right.T).T


def bilinear(m, h, u):
    return solved(m, 0.5, h + m.dt / 2 * (h @ m.A.T) + m.dt * u)


def backward(m, h, u):
    return solved(m, 1.0, h + m.dt * u)


def between(m, h, u):
    return solved(m, 0.7, h + 0.3 * m.dt * (h @ m.A.T) + m.dt * u)


def held(m, h, u):
    return h @ m.made.T + m.dt * u @ m.inverse.T


def names(rule):
    flow = trace(Layer(rule).double(), torch.randn(3, 7, 2).double())
    return [r for r in identify(flow) if r.name not in ("fork", "join", "transition")]


@pytest.mark.parametrize(
    ("rule", "name"),
    [(bilinear, "trapezoid"), (backward, "backward_euler"), (between, "theta method, theta = 0.7")],
)
def test_a_driven_linear_solve_is_one_step(rule, name):
    found = names(rule)
    assert {(r.name, r.evidence) for r in found} == {(name, "proven")}
    assert all("u(t)" in r.system for r in found)
    whole = [r for r in found if not r.notes[:1] or not r.notes[0].endswith(("a fork", "a join"))]  # all but the ends
    assert all((r.method is None) == name.startswith("theta") for r in whole)


def test_the_same_rule_with_its_matrix_made_before_is_told_by_how_it_was_made():
    assert all(r.name.startswith("trapezoid (bilinear") for r in names(held))


def two_matrices(m, h, u):
    return solved(m, 0.5, h + m.dt / 2 * (h @ m.D.T) + m.dt * u)


def with_a_field(m, h, u):
    return solved(m, 0.5, h + m.dt / 2 * (h @ m.A.T) + m.dt * torch.tanh(h + u))


def twice(m, h, u):
    return solved(m, 1.0, solved(m, 1.0, h + m.dt * u), m.D)


@pytest.mark.parametrize("rule", [two_matrices, with_a_field, twice])
def test_what_is_no_rule_of_one_matrix_is_not_called_one(rule):
    assert not any(r.name in ("trapezoid", "backward_euler") or r.name.startswith("theta") for r in names(rule))
