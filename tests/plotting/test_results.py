"""Plots over depth take what the measuring functions return, not only reports."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from matplotlib.collections import PolyCollection
from torch import nn

import stabkit
from stabkit import plotting
from stabkit.plotting.style import ORANGE
from tests.report.synthetic import make_chain, make_report, make_step


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.f(x))


@pytest.fixture(scope="module")
def flow() -> stabkit.Flow:
    torch.manual_seed(0)
    return stabkit.trace(nn.Sequential(*[Block() for _ in range(4)]), torch.randn(5, 6))


def band(ax) -> np.ndarray:
    (filled,) = [c for c in ax.collections if isinstance(c, PolyCollection)]
    return filled.get_paths()[0].vertices


def test_a_gradient_profile_is_drawn_with_its_own_numbers(flow):
    profile = stabkit.gradient_profile(flow)
    bars = [patch.get_height() for patch in plotting.growth(profile).patches]
    np.testing.assert_allclose(bars, profile.log_growth.mean(1), rtol=1e-6)
    line = plotting.gradients(profile).lines[0].get_ydata()
    np.testing.assert_allclose(line, profile.gradient_norms.log().mean(1).exp(), rtol=1e-6)
    lines = plotting.norms(profile).lines
    np.testing.assert_allclose(lines[2].get_ydata(), profile.state_norms.log().mean(1).exp(), rtol=1e-6)


def test_an_attribution_is_drawn_with_its_own_numbers(flow):
    found = stabkit.attribute(flow)
    ax = plotting.attribution(found)
    lines = next(c.get_segments() for c in ax.collections)
    np.testing.assert_allclose([s[0][1] for s in lines], found.growth.mean(1), rtol=1e-6)


def test_the_norms_of_a_report_have_intervals_and_reach_the_last_state(flow):
    report = stabkit.analyze(flow.model, torch.randn(5, 6))
    ax = plotting.gradients(report)
    assert len(ax.lines[0].get_xdata()) == len(report.steps) + 1
    heights = band(ax)[:, 1]
    low, high = report.steps[0].gradient_norm_interval
    assert low < report.steps[0].gradient_norm < high
    assert {low, high} <= set(heights.tolist())
    states = plotting.norms(report).lines[2]
    assert states.get_ydata()[-1] == pytest.approx(report.output_state_norm)


def test_a_flow_is_drawn_with_its_stages_and_skips(flow):
    ax = plotting.graph(flow)
    stages = [line for line in ax.lines if line.get_marker() == "o"]
    skips = [text for text in ax.texts if text.get_text() == "1" and text.get_color() == ORANGE]
    assert len(stages) == len(skips) == 4  # forward Euler: one stage, one skip
    words = [text.get_text() for text in ax.texts]
    assert words.count("forward Euler") == 4


def test_the_stages_of_a_method_are_circles_in_their_box():
    kutta = stabkit.integrators.named("rk4")
    blocks = {name: tuple(map(tuple, getattr(kutta, name).tolist())) for name in "AUBV"}
    report = make_report(make_step(tableau=blocks, stage_fields=(0,) * 4), make_step(1, kind="transition", skip=None))
    ax = plotting.graph(report)
    assert len([line for line in ax.lines if line.get_marker() == "o"]) == 4


@pytest.mark.parametrize("growths", [[0.0] * 4, [3e-17, 0.0], [math.nan] * 3])
@pytest.mark.parametrize("draw", [plotting.growth, plotting.attribution])
def test_rounding_does_not_look_like_growth(draw, growths):
    ax = draw(make_report(*(make_step(i, growth=g, attribution={"spectral": 3e-17}) for i, g in enumerate(growths))))
    low, high = ax.get_ylim()
    assert high - low >= 0.01


def test_exponents_of_a_report_are_drawn(flow):
    report = stabkit.analyze(flow.model, torch.randn(5, 6))
    spectrum = stabkit.lyapunov_spectrum(stabkit.trace(flow.model, torch.randn(5, 6)), 4)
    assert len(report.lyapunov.exponents[0]) == spectrum.exponents.shape[1]
    assert plotting.lyapunov(report).get_ylabel() == "exponent (nats per step)"
    ends = [line.get_ydata()[-1] for line in plotting.lyapunov_convergence(report).lines[1:]]
    np.testing.assert_allclose(ends, report.lyapunov.exponents[0])
    with pytest.raises(ValueError, match="no Lyapunov exponents"):
        plotting.sum_rule(make_chain([0.1]))


def test_points_that_are_no_lines_can_be_followed(flow):
    walk = stabkit.iterate(lambda x: 0.9 * x, torch.randn(7, 2), 3)
    ax = plotting.flow_map(walk, along=None)
    assert [len(panel.collections[0].get_offsets()) for panel in ax.child_axes] == [7] * 4


@pytest.mark.parametrize("draw", [plotting.phase_portrait, plotting.flow_map])
def test_states_that_are_not_finite_are_refused(draw):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].weight.data.fill_(math.nan)
    broken = stabkit.trace(model, torch.ones(61, 2), depth="modules", check=False)
    with pytest.raises(ValueError, match="not finite"):
        draw(broken)


def test_results_draw_themselves(flow):
    found = stabkit.finite_time_exponents(flow, 3)
    assert found.plot().get_title().startswith("Finite-time exponents")
    with pytest.raises(TypeError, match="is no Lyapunov spectrum, so it has no running means"):
        plotting.lyapunov_convergence(found)
    assert stabkit.gradient_profile(flow).plot().get_title() == "States and gradients over depth"
    assert stabkit.attribute(flow).plot().get_title() == "Where the growth comes from"
    assert make_chain([0.1]).plot().get_title().startswith("Stability region")
