from __future__ import annotations

import math

import numpy as np
import pytest
from matplotlib.figure import Figure

from stabkit import plotting
from tests.report.synthetic import make_chain, make_report, make_step

GROWTHS = [0.5, -0.25, 1.0, -2.0]


def sum_line(ax) -> np.ndarray:
    (right,) = [other for other in ax.figure.axes if other is not ax]
    return np.asarray(right.lines[0].get_ydata())


def test_bars_are_the_growth_and_the_line_is_its_sum_from_the_output():
    ax = plotting.growth(make_chain(GROWTHS))
    assert [bar.get_height() for bar in ax.patches] == GROWTHS
    assert sum_line(ax).tolist() == [-0.75, -1.25, -1.0, -2.0, 0.0]


@pytest.mark.parametrize("growths", [GROWTHS, [2.3] * 30, [-0.1] * 60, [0.0], [1e-9, -1e3]])
def test_both_axes_have_zero_at_one_height_and_nothing_is_cut(growths):
    ax = plotting.growth(make_chain(growths))
    heights = []
    for axes in ax.figure.axes:
        low, high = axes.get_ylim()
        assert low <= axes.dataLim.y0
        assert axes.dataLim.y1 <= high
        heights.append(-low / (high - low))
    assert heights[0] == pytest.approx(heights[1])


def test_whiskers_are_the_intervals():
    ax = plotting.growth(make_report(make_step(0, growth=1.0, growth_interval=(0.75, 1.5))))
    (whiskers,) = ax.collections
    assert np.asarray(whiskers.get_segments()[0])[:, 1].tolist() == [0.75, 1.5]


def test_a_growth_that_is_not_finite_is_a_cross_and_ends_the_sum():
    ax = plotting.growth(make_report(*(make_step(i, growth=g) for i, g in enumerate([0.5, math.nan, -math.inf, 1.0]))))
    crosses = next(line for line in ax.lines if line.get_marker() == "x")
    assert crosses.get_xdata().tolist() == [1, 2]
    np.testing.assert_array_equal(sum_line(ax), [np.nan, np.nan, np.nan, 1.0, 0.0])
    assert "2 not finite" in ax.get_title()


def test_transitions_are_hatched():
    ax = plotting.growth(make_report(make_step(0, kind="transition"), make_step(1)))
    assert [bool(bar.get_hatch()) for bar in ax.patches] == [True, False]


def test_gradient_norms_stand_at_the_states_and_end_at_the_output():
    ax = plotting.gradients(make_chain(GROWTHS))
    line = ax.lines[0]
    np.testing.assert_allclose(line.get_ydata(), np.exp([-0.75, -1.25, -1.0, -2.0, 0.0]))
    assert line.get_xdata().tolist() == [-0.5, 0.5, 1.5, 2.5, 3.5]
    assert ax.get_yscale() == "log"


@pytest.mark.parametrize("rate", [math.log(10), -math.log(10), 20.0, -20.0, 0.0])
def test_thirty_decades_and_none_can_be_drawn(rate):
    ax = plotting.gradients(make_chain([rate] * 30))
    ax.figure.draw_without_rendering()
    low, high = ax.get_ylim()
    assert high / low >= 9.99
    assert len([tick for tick in ax.get_yticks() if low <= tick <= high]) >= 1


def test_zero_and_infinite_norms_are_marked():
    norms = [math.nan, 0.0, 3.0]
    ax = plotting.gradients(make_report(*(make_step(i, gradient_norm=n, growth=0.0) for i, n in enumerate(norms))))
    marks = {line.get_marker(): line.get_xdata().tolist() for line in ax.lines if line.get_marker() in "vx"}
    assert marks == {"v": [0.5], "x": [-0.5]}
    assert ax.get_title() == "Gradient norm (▼ zero, × not finite)"


@pytest.mark.parametrize("draw", [plotting.growth, plotting.gradients])
def test_names_while_they_fit_and_indices_beyond(draw):
    few = draw(make_report(*(make_step(i, name=f"encoder.layers.encoder_layer_{i}") for i in range(8))))
    labels = [tick.get_text() for tick in few.get_xticklabels()]
    assert labels[3] == "…oder_layer_3"
    many = draw(make_report(*(make_step(i) for i in range(60))))
    many.figure.draw_without_rendering()
    assert len(many.get_xticks()) < 10
    assert "step" in many.get_xlabel()


@pytest.mark.parametrize("draw", [plotting.region, plotting.growth, plotting.gradients, plotting.overview])
def test_a_report_without_steps_can_be_drawn(draw):
    drawn = draw(make_report())
    figure = drawn if isinstance(drawn, Figure) else drawn.figure
    figure.draw_without_rendering()
    assert any(ax.get_title() for ax in figure.axes)


def test_compared_norms_end_at_one():
    ax = plotting.compare({"a": make_chain(GROWTHS), "b": make_chain([3.0, 3.0])})
    assert [line.get_ydata()[-1] for line in ax.lines] == [1.0, 1.0]
    assert ax.lines[1].get_ydata()[0] == pytest.approx(math.exp(6))
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["a", "b"]
