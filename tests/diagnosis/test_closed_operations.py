"""An operation that lets no gradient through, as all that it is given is out of its range, and no layer before it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import stabkit
from stabkit.diagnosis.finding import serious

IMAGE = torch.randn(16, 1, 9, 7, generator=torch.Generator().manual_seed(3))
TARGETS = torch.rand(16, 4, generator=torch.Generator().manual_seed(4)) + 0.3


class Network(nn.Module):
    """Two layers, and what is made of them, with a third."""

    def __init__(self, function: Callable[[Tensor, nn.Module], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = nn.Linear(4, 8), nn.Linear(8, 4), nn.Linear(4, 4)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.second(torch.tanh(self.first(x))), self.third)


def reported(function: Callable[[Tensor, nn.Module], Tensor], targets: Tensor | None = TARGETS) -> stabkit.Report:
    def mean_square(out: Tensor) -> Tensor:
        return (out - (1.0 if targets is None or out.shape != targets.shape else targets)).square().mean()

    return stabkit.analyze(
        Network(function), torch.randn(16, 4, generator=torch.Generator().manual_seed(1)), loss=mean_square
    )


def warped(h: Tensor, third: nn.Module) -> Tensor:
    grid = h[:, None, :2][:, :, None] + torch.tensor([3.0, 5.0])
    return functional.grid_sample(IMAGE, grid, align_corners=True)[:, :, 0]


CLOSED: dict[str, tuple[Callable[[Tensor, nn.Module], Tensor], str, bool]] = {
    "grid_sample": (warped, "16 of 16 points of its grid lie outside of -1 to 1", True),
    "clamp": (lambda h, third: third((20 + h).clamp(-1, 1)), "64 of 64 entries lie out of its range (-1 to 1)", True),
    "hardsigmoid": (lambda h, third: third(h) * functional.hardsigmoid(h - 30), "out of its range (-3 to 3)", True),
    "hardtanh": (lambda h, third: third(functional.hardtanh(h + 5)), "(-1 to 1), at 4.", True),
    "a product": (lambda h, third: third(h * torch.zeros(4)), "multiplies by a constant of 4 zeros", False),
    "masked_fill": (lambda h, third: third(h.masked_fill(h < 99, 0.0)), "its mask fills 64 of 64", False),
    "where": (lambda h, third: third(torch.where(h > 99, h, 0.0)), "the other branch in 64 of 64", False),
}


@pytest.mark.parametrize("name", CLOSED)
def test_the_operation_is_named_with_the_share_that_is_out_of_range(name):
    function, cause, tried = CLOSED[name]
    found = [f for f in reported(function).findings if serious(f)]
    (closed,) = [f for f in found if f.kind == "no_gradient" and "arrives at" in f.evidence]
    assert f"it arrives at {name} in the model, test_closed_operations.py:" in closed.evidence
    assert cause in closed.evidence
    assert closed.module_path == ""
    assert ("tried on a copy: with" in closed.evidence) is tried
    assert not [f for f in found if f.kind in ("vanishing", "dead", "saturated")]


def test_what_nothing_comes_back_over_follows_from_it():
    report = reported(warped)
    assert report.verdict == "vanishing"
    (followed,) = [f for f in report.findings if f.kind == "vanishing"]
    assert followed.severity == "info"
    assert "this is what grid_sample in the code of the model lets through" in followed.evidence
    (closed,) = [f for f in report.findings if "arrives at" in f.evidence]
    assert "2 g / (n - 1) - 1" in closed.remedy
    assert "here 7 x 9" in closed.remedy


@pytest.mark.parametrize(
    "function",
    [
        lambda h, third: third(h.clamp(-1, 1)),  # some lie within
        lambda h, third: third(h) + h * functional.hardsigmoid(0 * h - 9),  # there is a way round it
        lambda h, third: third(h) + third(h * torch.zeros(4)),
        lambda h, third: third(h) + warped(h - torch.tensor([3.0, 5.0, 0.0, 0.0]), third),
    ],
)
def test_what_lets_some_of_it_through_is_no_finding(function):
    assert not [f for f in reported(function, None).findings if serious(f)]


def test_an_expert_that_a_mask_leaves_out_is_chosen_by_the_data():
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            masks = [x[:, :1] > 0, x[:, :1] <= 0, x[:, :1] > 99]
            return x + sum(e(x) * m.float() for e, m in zip(self.experts, masks, strict=True))

    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(1))
    report = stabkit.analyze(Experts(), x, loss=lambda out: (out - TARGETS).square().mean())
    assert not [f for f in report.findings if serious(f)]


def test_units_that_are_dead_are_left_to_their_own_finding():
    found = [f for f in reported(lambda h, third: third(functional.relu(h - 50))).findings if serious(f)]
    assert [f.kind for f in found] == ["dead"]
