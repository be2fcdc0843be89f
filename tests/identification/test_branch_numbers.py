"""A step size that is a product of numbers of the code: which they are is told."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import stabkit

Step = Callable[["Block", Tensor], Tensor]


class Block(nn.Module):
    def __init__(self, step: Step) -> None:
        super().__init__()
        self.step, self.f, self.alpha = step, nn.Linear(5, 5), nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        return self.step(self, x)


def read(step: Step) -> stabkit.identification.Identification:
    torch.manual_seed(0)
    flow = stabkit.trace(nn.Sequential(*(Block(step) for _ in range(3))), torch.randn(4, 5))
    return stabkit.identify(flow, checks=False)[1]


@pytest.mark.parametrize(
    ("step", "h", "told"),
    [
        (lambda m, x: x + 0.2 * (2.0 * torch.tanh(m.f(x))), 0.4, "0.2 at the sum and 2 before it"),  # NF-ResNets
        (lambda m, x: torch.add(x, 3 * torch.tanh(m.f(x)), alpha=0.5), 1.5, "0.5 at the sum and 3 before it"),
        (lambda m, x: (torch.tanh(m.f(x)) / 4 * m.alpha).mul(0.5) + x, 0.0875, "0.5 at the sum and 0.175 before it"),
        (lambda m, x: x - 0.1 * (5 * torch.tanh(m.f(x))), 0.5, "0.1 at the sum and 5 before it"),
    ],
)
def test_numbers_of_a_branch_are_told_one_by_one(step, h, told):
    found = read(step)
    assert found.name == "forward Euler"
    assert found.step_size == pytest.approx(h)
    assert told in found.convention


@pytest.mark.parametrize(
    "step",
    [
        lambda m, x: x + 0.2 * torch.tanh(m.f(x)),
        lambda m, x: x + 0.2 * torch.tanh(2 * m.f(x)),
        lambda m, x: x + 0.2 * (1.0 * torch.tanh(m.f(x))),
    ],
)
def test_a_number_alone_is_the_one_that_multiplies_the_branch(step):
    assert read(step).convention == "h: the number that multiplies the branch"
