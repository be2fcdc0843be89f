"""What h and A are over time, where they are numbers of the code: told with the rule, and not where it is unclear."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.linalg import expm
from torch import nn

import stabkit
from stabkit.identification import identify
from stabkit.identification.time.rates import rule_of_constants
from tests.identification import scan_models as models
from tests.identification.test_over_time import TIMES, drawn, read

ORDER = 6


def legendre(window: float, order: int = ORDER) -> np.ndarray:
    """The A of the memory of Voelker et al. (2019), for one time step."""
    i, j = np.meshgrid(np.arange(order), np.arange(order), indexing="ij")
    return np.where(i < j, -1.0, (-1.0) ** (i - j + 1)) * (2 * i + 1) / window


RULES = {
    "exponential": expm,
    "trapezoid": lambda A: np.linalg.solve(np.eye(len(A)) - A / 2, np.eye(len(A)) + A / 2),
    "backward Euler": lambda A: np.linalg.inv(np.eye(len(A)) - A),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("window", [10.0, 128.0])
@pytest.mark.parametrize("order", [3, 6, 8])
def test_a_constant_matrix_tells_the_one_rule_under_which_its_numbers_repeat(rule, window, order):
    made = RULES[rule](legendre(window, order)).astype(np.float32)
    assert rule_of_constants(made.astype(float)) == rule


def test_random_matrices_tell_no_rule():
    draw = np.random.default_rng(0)
    for count in range(300):
        M = draw.normal(size=(3 + count % 6,) * 2) / 2
        for other in (M, np.linalg.qr(M)[0], np.tril(M), 0.9 * np.eye(len(M)) + 0.1 * M, M + M.T):
            assert rule_of_constants(other) is None


class Memory(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.u, self.out = nn.Linear(3, 4), nn.Linear(4 * ORDER, 3)
        self.register_buffer("M", torch.tensor(expm(legendre(12.0)), dtype=torch.float32))
        self.register_buffer("b", torch.rand(ORDER))

    def forward(self, x):
        u, m, states = self.u(x), x.new_zeros(len(x), 4, ORDER), []
        for t in range(x.shape[1]):
            m = m @ self.M.T + u[:, t, :, None] * self.b
            states.append(m.flatten(1))
        return x + torch.tanh(self.out(torch.stack(states, 1)))


def test_a_memory_of_discretised_constants_is_read_over_time():
    torch.manual_seed(0)
    flow = stabkit.trace(nn.Sequential(Memory(), Memory(), Memory()), drawn())
    (found,) = identify(flow, checks=False)[0].over_time
    assert found.name.startswith("exponential step (exact in the state")
    turn = float(np.abs(np.linalg.eigvals(legendre(12.0)).imag).max())
    assert any(f"imaginary parts up to {turn:.3g}" in note for note in found.notes)


@pytest.mark.parametrize("make", [models.linoss_imex, models.linoss_im])
def test_oscillators_tell_their_step_and_stiffness_and_one_time_of_the_input(make):
    found = read(models.network(make))
    (rates,) = [note for note in found.notes if note.endswith("where v = dy/dt")]
    assert rates.startswith("h from 0.")
    assert ", A from 0." in rates
    assert found.n_steps == TIMES
    assert not any("successive times" in note for note in found.notes)


@pytest.mark.parametrize("make", [models.s4d_zoh, models.s4d_bilinear, models.s4d_backward])
def test_rules_of_known_parameters_tell_what_they_make_of_them(make):
    assert any(note.startswith("h A ") for note in read(models.network(make)).notes)


class Learned(nn.Module):
    """A fixed A and a learned step size, which the matrix is made of in every pass."""

    def __init__(self, rule: str) -> None:
        super().__init__()
        self.register_buffer("A", torch.tensor(5 * legendre(10.0), dtype=torch.float32))
        self.u, self.out = nn.Linear(3, 4), nn.Linear(4 * ORDER, 3)
        self.rule, self.log_step = rule, nn.Parameter(torch.tensor(-2.0))

    def made(self):
        h, one = self.log_step.exp(), torch.eye(ORDER)
        if self.rule == "exponential":
            return torch.linalg.matrix_exp(h * self.A)
        if self.rule == "backward Euler":
            return torch.linalg.inv(one - h * self.A)
        return torch.linalg.solve(one - h / 2 * self.A, one + h / 2 * self.A)

    def forward(self, x):
        M, u, m, states = self.made(), self.u(x), x.new_zeros(len(x), 4, ORDER), []
        for t in range(x.shape[1]):
            m = m @ M.T + u[:, t, :, None]
            states.append(m.flatten(1))
        return x + torch.tanh(self.out(torch.stack(states, 1)))


@pytest.mark.parametrize("rule", RULES)
def test_one_learned_step_size_before_a_fixed_matrix_tells_the_rule(rule):
    torch.manual_seed(0)
    flow = stabkit.trace(nn.Sequential(*[Learned(rule) for _ in range(3)]), drawn())
    (found,) = identify(flow, checks=False)[0].over_time
    assert found.name.startswith(rule)
    ends = np.linalg.eigvals(5 * legendre(10.0)).real * np.exp(-2.0)
    assert any(f"real parts from {ends.min():.3g} to {ends.max():.3g}" in note for note in found.notes)
