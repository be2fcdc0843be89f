from __future__ import annotations

import subprocess
import sys

import matplotlib
import matplotlib.style
import pytest
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

from stabkit import plotting
from tests.report.synthetic import make_chain

DRAWN = [plotting.region, plotting.growth, plotting.gradients]


@pytest.mark.parametrize("kind", ["png", "svg", "pdf"])
def test_the_same_report_gives_the_same_bytes(kind):
    first, second = (plotting.render(plotting.growth(make_chain([0.1, 0.2])).figure, kind) for _ in range(2))
    assert first == second


def test_no_plot_touches_pyplot_or_its_settings():
    code = (
        "import sys, matplotlib; before = matplotlib.rcParams.copy()\n"
        "from stabkit import plotting\nfrom tests.report.synthetic import make_chain\n"
        "plotting.render(plotting.overview(make_chain([0.1])), 'svg')\n"
        "assert 'matplotlib.pyplot' not in sys.modules\nassert matplotlib.rcParams.copy() == before"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("draw", DRAWN)
def test_text_is_small_in_new_figures_and_the_user_s_own_in_given_axes(draw):
    report = make_chain([0.1, 0.2])
    assert draw(report).yaxis.label.get_fontsize() == 8
    with matplotlib.rc_context({"font.size": 17}):
        ax = draw(report, Figure().subplots())
    assert ax.yaxis.label.get_fontsize() == 17


@pytest.mark.parametrize("draw", DRAWN)
def test_everything_drawn_lies_in_the_picture(draw):
    names = {"name": "model.encoder.layers.encoder_layer_11.residual_block"}
    figure = draw(make_chain([2.3] * 12, **names)).figure
    figure.draw_without_rendering()
    width, height = figure.get_size_inches() * figure.dpi
    box = figure.get_tightbbox().transformed(figure.dpi_scale_trans)
    assert box.x0 >= -1
    assert box.y0 >= -1
    assert box.x1 <= width + 1
    assert box.y1 <= height + 1


def test_the_figure_of_a_part_of_a_figure():
    figure = Figure()
    ax = figure.subfigures(1, 2)[1].subplots()
    assert plotting.figure_of(ax) is figure


OVER_DEPTH = [
    plotting.growth,
    plotting.norms,
    plotting.attribution,
    plotting.ridgelines,
    plotting.region,
    plotting.graph,
]


@pytest.mark.parametrize("draw", OVER_DEPTH)
def test_a_name_with_dollars_is_no_mathematics(draw):
    ax = draw(make_chain([0.1, 0.2], name="$\\frac{$", attribution={"spectral": 0.1}))
    assert len(plotting.render(plotting.figure_of(ax), "png")) > 1000


@pytest.mark.parametrize(
    "draw", [d for d in (*OVER_DEPTH, plotting.sliding_disc, plotting.gradients) if d is not plotting.ridgelines]
)
def test_nothing_black_is_drawn_on_a_dark_ground(draw):
    with matplotlib.rc_context(matplotlib.style.library["dark_background"]):
        ax = draw(make_chain([0.1, -0.2], attribution={"spectral": 0.1}))
        plotting.figure_of(ax).draw_without_rendering()
        drawn = [line.get_color() for line in ax.lines] + [patch.get_edgecolor() for patch in ax.patches]
        drawn += [text.get_color() for text in (ax.title, ax.xaxis.label, *ax.texts)]
    bright = [max(to_rgba(color)[:3]) > 0.3 for color in drawn if to_rgba(color)[3] > 0]
    assert bright
    assert all(bright)
