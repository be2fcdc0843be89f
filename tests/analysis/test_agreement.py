"""What a report says of a step is what the single analyzers say."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import stabkit


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.f = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.f(x))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[Block(6) for _ in range(5)], nn.Linear(6, 3)).double()


def skewed(output: Tensor) -> Tensor:
    return (output[:, 0] * 3 - output[:, 1].square()).sum()


@pytest.mark.parametrize("loss", [None, skewed], ids=["random", "loss"])
def test_a_report_and_the_single_analyzers_measure_the_same_growth_and_parts(loss):
    model, x = network(), torch.randn(3, 6).double()
    report = stabkit.analyze(model, x, loss=loss, seed=5)
    flow = stabkit.trace(model, x, seed=5)
    found = stabkit.attribute(flow, loss, seed=5)
    profile = stabkit.gradient_profile(flow, loss, seed=5, probes=4 if loss is None else 1)
    torch.testing.assert_close(found.growth, profile.log_growth, rtol=1e-12, atol=1e-12)
    assert [step.growth for step in report.steps] == pytest.approx(profile.log_growth.mean(1).tolist(), abs=1e-12)
    for step in report.steps:
        parts = {name: float(getattr(found, name)[step.index].mean()) for name in step.attribution}
        assert step.attribution == pytest.approx(parts, abs=1e-12)
    assert float(found.closing_error.abs().max()) < 1e-12


def test_the_loss_reaches_the_attribution():
    model, x = network(), torch.randn(3, 6).double()
    random, given = (stabkit.analyze(model, x, loss=loss).steps[2].attribution for loss in (None, skewed))
    assert random["spectral"] == pytest.approx(given["spectral"], abs=1e-12)
    assert abs(random["alignment"] - given["alignment"]) > 1e-3


def test_the_chain_is_checked_where_batch_norms_are_given_the_statistics_of_the_batch():
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Tanh()) for _ in range(4)]
    model = nn.Sequential(*blocks).double().eval()
    report = stabkit.analyze(model, torch.randn(32, 6, dtype=torch.float64), spectrum="none")
    assert any("batch" in note for note in report.notes)
    assert report.chain_error < 1e-10
