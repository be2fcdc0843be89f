from __future__ import annotations

import pytest
import torch
from torch import nn

import stabkit
from stabkit.errors import TraceError
from stabkit.growth import exponent_field, finite_time_exponents
from tests.growth.systems import DOUBLE, normal


def test_the_field_of_a_network_is_its_exponents_point_by_point():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    origin, directions = normal(4), (normal(4, seed=1), normal(4, seed=2))
    field = exponent_field(
        lambda x: stabkit.trace(model, x), origin, directions, extent=(-1, 1, 0, 2), resolution=(5, 3), k=2, chunk=4
    )
    assert field.exponents.shape == (3, 5, 2)
    assert field.converged.all()
    for row in range(3):
        for column in range(5):
            point = origin + field.first[column] * directions[0] + field.second[row] * directions[1]
            J = torch.autograd.functional.jacobian(model, point)
            expected = torch.linalg.svdvals(J)[:2].log() / 5
            torch.testing.assert_close(field.exponents[row, column], expected, rtol=0, atol=1e-8)


def test_a_ridge_stands_on_the_separatrix_of_a_pendulum():
    def step(x: torch.Tensor, h: float = 0.1) -> torch.Tensor:
        p = x[:, 1] - h * torch.sin(x[:, 0])
        return torch.stack([x[:, 0] + h * p, p], 1)

    axes = tuple(torch.eye(2, dtype=DOUBLE))
    field = exponent_field(
        lambda x: stabkit.iterate(step, x, 60),
        torch.zeros(2, dtype=DOUBLE),
        axes,
        extent=(0, 1, 0, 4),
        resolution=(1, 81),
    )
    momentum = float(field.second[field.exponents[:, 0, 0].argmax()])
    assert abs(momentum - 2) < 0.1  # energy p^2 / 2 - cos(0) = 1
    alone = finite_time_exponents(stabkit.iterate(step, torch.tensor([[0.0, 1.0]], dtype=DOUBLE), 60), 1)
    torch.testing.assert_close(field.exponents[20, 0], alone.exponents[0], rtol=0, atol=1e-7)


def test_samples_that_influence_each_other_are_no_field():
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).double()
    axes = tuple(torch.eye(2, dtype=DOUBLE))
    with pytest.raises(TraceError, match="influence each other"):
        exponent_field(lambda x: stabkit.trace(model, x), torch.zeros(2, dtype=DOUBLE), axes, resolution=(2, 2))
    with pytest.raises(TraceError, match="directions"):
        exponent_field(lambda x: stabkit.trace(model, x), torch.zeros(3, dtype=DOUBLE), axes)
