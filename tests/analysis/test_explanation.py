"""What `analyze` says about why growth is what it is."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import stabkit
from stabkit.report.page import report_page


def residual(gain: float = 0.3, depth: int = 8) -> nn.Module:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.Linear(12, 12, bias=False)
            nn.init.normal_(self.f.weight, std=gain / math.sqrt(12))

        def forward(self, x):
            return x + self.f(x)

    torch.manual_seed(0)
    return nn.Sequential(*[Block() for _ in range(depth)]).double()


@pytest.fixture(scope="module")
def report() -> stabkit.Report:
    return stabkit.analyze(residual(), torch.randn(3, 12, dtype=torch.float64))


def test_parts_of_every_step_add_up_to_its_growth(report):
    for step in report.steps:
        assert sum(step.attribution.values()) == pytest.approx(step.growth, abs=1e-12)
        assert step.attribution["non_normal"] >= -1e-12


def test_spectral_part_is_the_energy_of_the_eigenvalues(report):
    for step in report.steps:
        energy = sum(abs(z + step.skip) ** 2 for z in step.z) / len(step.z)
        assert step.attribution["spectral"] == pytest.approx(0.5 * math.log(energy), abs=1e-9)


def test_margin_is_the_distance_of_the_worst_eigenvalue_from_the_disc(report):
    for step in report.steps:
        worst = max(abs(z + step.skip) for z in step.z)
        assert step.margin == pytest.approx(1 - worst, abs=1e-6)
        assert sum(step.mechanism.values()) == pytest.approx(1.0)


def test_independent_layers_follow_the_isotropic_rate():
    report = stabkit.analyze(residual(gain=0.8, depth=24), torch.randn(3, 12, dtype=torch.float64))
    assert report.explained["applies"] == "isotropic"
    assert report.explained["predictor"] == "persistent"
    assert report.explained["predictor_share"] == pytest.approx(report.explained["isotropic_share"], abs=0.05)
    assert report.explained["isotropic_share"] == pytest.approx(1.0, abs=0.35)


def test_all_of_it_survives_a_file_and_reaches_the_page(report, tmp_path):
    again = stabkit.Report.load(report.save(tmp_path / "r.json"))
    assert again.steps[0].attribution == report.steps[0].attribution
    assert again.explained["predictor"] == "persistent"
    assert again == report
    assert "data-parts" in report_page(again)


def test_without_spectra_nothing_is_attributed():
    report = stabkit.analyze(residual(), torch.randn(1, 12, dtype=torch.float64), spectrum="none")
    assert report.steps[0].attribution is None
    assert report.explained == {}


def test_what_is_not_finite_is_said_and_not_attributed():
    model = residual()
    model[3].f.weight.data.fill_(math.nan)
    report = stabkit.analyze(model, torch.randn(2, 12, dtype=torch.float64))
    assert report.verdict == "non-finite"
    assert report.steps[3].attribution is None
