"""A last block that is made with another constant than its peers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import stabkit
from stabkit.diagnosis.finding import serious


class Block(nn.Module):
    """A residual block whose branch is scaled by a constant."""

    def __init__(self, width: int, scale: float = 0.2, activate: bool = True) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(width, width), nn.Linear(width, width)
        for layer in (self.inner, self.outer):
            nn.init.orthogonal_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.scale, self.activate = scale, activate

    def forward(self, x: Tensor) -> Tensor:
        h = x + self.scale * self.outer(torch.tanh(self.inner(x)))
        return torch.tanh(h) if self.activate else h


def found(scales: list[float], last: dict[str, object]) -> list[stabkit.Finding]:
    torch.manual_seed(0)
    blocks = [Block(32, scale) for scale in scales]
    model = nn.Sequential(nn.Linear(16, 32), *blocks, Block(32, **last), nn.Linear(32, 4))
    return stabkit.diagnose(stabkit.trace(model, torch.randn(8, 16)))


@pytest.mark.parametrize("last", [{"scale": 1.0}, {"scale": 1.0, "activate": False}, {"scale": -1.0}])
def test_a_last_block_that_adds_its_branch_in_full_is_a_fact(last):
    told = found([0.2] * 8, last)
    assert not [f for f in told if serious(f)]
    (fact,) = [f for f in told if f.module_path == "9"]
    assert f"the last Block and was made with scale = {last['scale']} and not 0.2" in fact.evidence
    assert not fact.actions


@pytest.mark.parametrize(
    ("scales", "last", "fault"),
    [
        ([0.2] * 8, {"scale": 30.0, "activate": False}, ("exploding", "9")),  # far more gain than its peers
        ([0.2] * 3 + [6.0] + [0.2] * 4, {"scale": 0.2}, ("exploding", "4")),
        ([0.2] * 3 + [1.0] + [0.2] * 4, {"scale": 0.2}, ("unstable_step", "4")),  # as at the end, where it is a fact
        ([0.2, 0.21] * 4, {"scale": 1.0}, ("unstable_step", "9")),  # peers that agree on no constant tell nothing
    ],
)
def test_one_that_harms_or_that_its_place_does_not_explain_is_still_a_fault(scales, last, fault):
    told = [f for f in found(scales, last) if serious(f)]
    assert [(f.kind, f.module_path) for f in told] == [fault]
    assert "was made with" not in told[0].evidence


def test_a_weight_of_odd_size_is_no_matter_of_how_a_block_was_made():
    """Also of a last block that was made with another constant."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), *[Block(32, 0.2) for _ in range(8)], Block(32, 0.1), nn.Linear(32, 4))
    model[9].outer.weight.data.mul_(8.0)
    told = stabkit.diagnose(stabkit.trace(model, torch.randn(8, 16)))
    assert [f.module_path for f in told if serious(f)] == ["9"]
    assert not [f for f in told if "was made with" in f.evidence]


class Adapted(nn.Module):
    """A layer beside an adapter of low rank, of which the second matrix begins at zero."""

    def __init__(self, frozen: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.down, self.up = nn.Linear(16, 16), nn.Linear(16, 4, bias=False), nn.Linear(4, 16, bias=False)
        self.head = nn.Linear(16, 3)
        self.layer.requires_grad_(not frozen)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head((self.layer(x) + self.up(self.down(x))).relu())


def test_an_adapter_beside_frozen_weights_begins_at_zero():
    x = torch.randn(32, 16, generator=torch.Generator().manual_seed(0))
    report = stabkit.analyze(
        Adapted(True), x, loss=lambda out: nn.functional.cross_entropy(out, (x[:, 0] > 0).long()), spectrum="none"
    )
    assert [f for f in report.findings if f.severity != "info"] == []
