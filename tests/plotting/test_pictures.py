"""Every picture: an Axes with labels that have units, drawn without a display, with the numbers it was given."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.patches import Circle, FancyBboxPatch
from torch import nn

import stabkit
from stabkit import growth, jacobians, plotting
from stabkit.jacobians import from_dense
from tests.report.synthetic import make_chain, make_report, make_step, make_training

PARTS = {"spectral": 0.3, "non_normal": 0.4, "alignment": -0.2}


def exponents(k: int = 3, steps: int = 50) -> SimpleNamespace:
    local = torch.linspace(1, -1, k).expand(steps, 1, k) + 0.1 * torch.randn(
        steps, 1, k, generator=torch.Generator().manual_seed(0)
    )
    flags = torch.tensor([[True] * (k - 1) + [False]])
    return SimpleNamespace(
        exponents=local.mean(0), standard_errors=torch.full((1, k), 0.01), local_growth=local, converged=flags
    )


class Turn(nn.Module):
    """A rotation of the plane by a tenth of a radian."""

    def forward(self, x):
        c, s = np.cos(0.1), np.sin(0.1)
        return torch.stack([c * x[:, 0] - s * x[:, 1], s * x[:, 0] + c * x[:, 1]], 1)


def turning(points: torch.Tensor) -> stabkit.Flow:
    return stabkit.trace(nn.Sequential(*[Turn() for _ in range(4)]), points, depth="modules")


REPORT = make_chain([0.5, -0.2, 0.3], attribution=PARTS)
DRAWN = {
    "region": lambda ax: plotting.region(REPORT, ax),
    "growth": lambda ax: plotting.growth(REPORT, ax),
    "gradients": lambda ax: plotting.gradients(REPORT, ax),
    "flow_map": lambda ax: plotting.flow_map(turning(plotting.grid_points(lines=2, along=4)), ax, along=4),
    "attribution": lambda ax: plotting.attribution(REPORT, ax),
    "sliding_disc": lambda ax: plotting.sliding_disc(REPORT, ax),
    "norms": lambda ax: plotting.norms(REPORT, ax),
    "ridgelines": lambda ax: plotting.ridgelines(REPORT, ax),
    "update": lambda ax: plotting.update(replace(REPORT, training=make_training()), ax),
    "lyapunov": lambda ax: plotting.lyapunov(exponents(), ax),
    "convergence": lambda ax: plotting.lyapunov_convergence(exponents(), ax),
    "sums": lambda ax: plotting.sum_rule(exponents(), ax),
    "field": lambda ax: plotting.vector_field(turning(plotting.grid_points(lines=4, along=4)), ax),
    "portrait": lambda ax: plotting.phase_portrait(turning(torch.randn(3, 2)), ax),
    "pseudospectra": lambda ax: plotting.pseudospectra(from_dense(torch.eye(3)[None] * 0.5), ax, resolution=12),
}


def drawn_results() -> dict[str, object]:
    """A result of every kind that has a picture of its own, with a name for its method ``plot``."""
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(8)]
    flow = stabkit.trace(nn.Sequential(*layers).double(), torch.randn(3, 4, dtype=torch.float64))
    J = flow.steps[0].jacobian()
    return {
        "eigenvalues": stabkit.eigenvalues(J),
        "singular values": stabkit.singular_values(J),
        "non-normality": stabkit.non_normality(J),
        "density": jacobians.singular_value_density(J, probes=3),
        "lyapunov": stabkit.lyapunov_spectrum(flow),
        "finite time": stabkit.finite_time_exponents(flow),
        "gradients": stabkit.gradient_profile(flow),
        "alignment": growth.alignment_index(flow),
        "covariant": growth.covariant_vectors(flow),
    }


def test_every_result_draws_itself():
    titles = {}
    for name, result in drawn_results().items():
        ax = result.plot()
        assert ax.get_xlabel(), name
        assert ax.get_ylabel(), name
        titles[name] = ax.get_title()
        given = plotting.figure_of(ax).add_subplot()
        assert result.plot(given) is given
        assert len(plotting.render(plotting.figure_of(ax), "png")) > 1000
    assert len(set(titles.values())) == len(titles)
    assert ("Lyapunov" in titles["lyapunov"], "Finite-time" in titles["finite time"]) == (True, True)


def test_the_gradient_of_every_sample_is_drawn_in_powers_of_ten():
    model = nn.Sequential(*[nn.Linear(2, 2, bias=False) for _ in range(400)]).double()
    for layer in model:
        nn.init.eye_(layer.weight).data.mul_(0.1)
    profile = stabkit.gradient_profile(stabkit.trace(model, torch.ones(1, 2, dtype=torch.float64)))
    line = profile.plot().lines[0].get_ydata()
    np.testing.assert_allclose(np.diff(line), 1.0, rtol=1e-9)  # over 400 powers of ten, beyond any float


@pytest.mark.parametrize("name", DRAWN)
def test_axes_come_back_with_labels_and_a_title(name):
    new = DRAWN[name](None)
    assert isinstance(new, Axes)
    assert new.get_title()
    assert new.get_xlabel()
    assert new.get_ylabel()
    given = plotting.figure_of(DRAWN[name](None)).add_subplot()
    assert DRAWN[name](given) is given
    assert len(plotting.render(plotting.figure_of(new), "png")) > 1000


def test_parts_are_stacked_to_the_growth_of_each_step():
    ax = plotting.attribution(make_chain([0.5, 0.5], attribution=PARTS))
    tops = [patch.get_y() + patch.get_height() for patch in ax.patches]
    assert max(tops) == pytest.approx(0.7)
    assert min(tops) == pytest.approx(-0.2)
    words = {text.get_text() for text in ax.get_legend().get_texts()}
    assert words == {"spectral", "non-normal", "alignment", "growth"}


def test_discs_slide_from_minus_one_to_zero():
    ax = plotting.sliding_disc(damping=(0.0, 0.5, 1.0))
    centers = {patch.center for patch in ax.patches if isinstance(patch, Circle)}
    assert centers == {(-1.0, 0), (-0.5, 0), (0.0, 0)}
    with pytest.raises(ValueError, match=r"damping=\(1.5,\)"):
        plotting.sliding_disc(damping=(1.5,))


def test_modes_of_an_update_lie_at_minus_rate_times_curvature():
    ax = plotting.update(replace(REPORT, training=make_training()))
    marks = {line.get_marker(): list(line.get_xdata()) for line in ax.lines}
    assert marks["D"] == pytest.approx([-3.0])
    assert marks["o"] == pytest.approx([-2.5, -0.5])
    assert marks["|"] == pytest.approx([-2.0])
    assert ax.get_xlim()[0] < -3
    assert ax.get_aspect() == 1.0
    assert "ratio 1.50" in ax.get_title()


def test_a_mode_far_beyond_stands_on_the_frame_with_its_number():
    ax = plotting.update(replace(REPORT, training=make_training(preconditioned=4000.0)))
    (mark,) = (line for line in ax.lines if line.get_marker() == "<")
    assert mark.get_xdata()[0] > -8
    assert "z = −400" in mark.get_label()


def test_without_a_threshold_there_is_no_region_but_a_reason():
    bare = make_training(tableau=None, method=None, threshold=None, ratio=None, preconditioned=None)
    ax = plotting.update(replace(REPORT, training=bare))
    assert "no threshold" in ax.texts[0].get_text()


def test_ridges_are_densities_of_the_moduli_of_the_eigenvalues():
    z = tuple(complex(v) for v in np.full(50, 9.0))  # a + z = 10
    ax = plotting.ridgelines(make_report(make_step(z=z), make_step(1, z=z)))
    ridge = ax.lines[-1].get_xydata()
    assert ridge[np.argmax(ridge[:, 1]), 0] == pytest.approx(1.0, abs=0.02)


def test_partial_spectra_are_no_density():
    ax = plotting.ridgelines(make_report(make_step(spectrum_method="krylov")))
    assert "no whole spectrum" in ax.texts[0].get_text()


def test_an_exponent_that_has_not_converged_is_hollow_and_said_to_be():
    ax = plotting.lyapunov(exponents())
    assert "NOT converged" in ax.get_title()
    assert ax.lines[-1].get_markerfacecolor() == "none"
    assert len(ax.lines[-1].get_xdata()) == 1


def test_the_running_mean_ends_at_the_exponent():
    spectrum = exponents(k=2)
    ax = plotting.lyapunov_convergence(spectrum)
    ends = [line.get_ydata()[-1] for line in ax.lines if len(line.get_ydata()) == 50]
    assert ends == pytest.approx(spectrum.exponents[0].tolist(), rel=1e-5)


def test_the_field_of_a_rotation_is_perpendicular_to_its_radius():
    ax = plotting.vector_field(turning(plotting.grid_points(lines=4, along=4)))
    arrows = ax.collections[0]
    radius, field = np.asarray(arrows.XY), np.stack([arrows.U, arrows.V], 1)
    cosine = (radius * field).sum(1) / (np.linalg.norm(radius, axis=1) * np.linalg.norm(field, axis=1))
    assert cosine == pytest.approx(np.full(len(cosine), -np.sin(0.05)), abs=1e-5)


def test_the_flow_map_keeps_the_lengths_of_lines_under_a_rotation():
    shown = plotting.flow_map(turning(plotting.grid_points(lines=3, along=9)), along=9, panels=3).child_axes
    assert [ax.get_title() for ax in shown] == ["input", "after 2 steps", "after 4 steps"]
    for ax in shown:
        line = ax.lines[0].get_xydata()
        assert np.linalg.norm(np.diff(line, axis=0), axis=1).sum() == pytest.approx(4.0, rel=1e-5)


def test_flow_maps_refuse_what_is_not_planar():
    flow = stabkit.trace(nn.Linear(3, 3), torch.ones(2, 3))
    with pytest.raises(ValueError, match="two numbers"):
        plotting.flow_map(flow)
    with pytest.raises(ValueError, match="no multiple"):
        plotting.flow_map(turning(torch.ones(7, 2)))


def test_an_animation_is_a_gif_with_a_frame_between_every_two_depths(tmp_path):
    from PIL import Image

    points = plotting.grid_points(lines=2, along=3)
    path = plotting.animate_flow_map(turning(points), tmp_path / "flow.gif", along=3, between=2)
    with Image.open(path) as image:
        assert image.n_frames == 9
    with pytest.raises(ValueError, match=r"\.gif"):
        plotting.animate_flow_map(turning(points), tmp_path / "flow.mp4")


@pytest.mark.parametrize(("size", "words"), [(1, "x(n)"), (2, "x₁"), (5, "first principal direction")])
def test_a_portrait_names_its_axes(size, words):
    flow = stabkit.iterate(lambda x: 0.9 * torch.tanh(x), torch.randn(3, size), 6)
    assert plotting.phase_portrait(flow).get_xlabel() == words


def test_a_portrait_needs_one_space():
    flow = stabkit.trace(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 3)), torch.ones(1, 2), depth="modules")
    with pytest.raises(ValueError, match="one space"):
        plotting.phase_portrait(flow)


def test_level_lines_of_a_normal_matrix_are_circles_about_its_eigenvalues():
    ax = plotting.pseudospectra(from_dense(torch.zeros(1, 2, 2, dtype=torch.float64)), levels=(-0.5,), resolution=81)
    path = ax.collections[0].get_paths()[0].vertices
    assert np.hypot(*path.T) == pytest.approx(np.full(len(path), 10**-0.5), abs=2e-3)


@pytest.mark.parametrize("shape", [(1, 2, 3), (1, 500, 500)])
def test_pseudospectra_of_rectangular_or_large_jacobians_are_refused(shape):
    with pytest.raises(ValueError, match=str(shape[-1])):
        plotting.pseudospectra(from_dense(torch.zeros(shape)))


def test_the_graph_has_a_box_a_step_and_an_arc_a_skip():
    steps = [make_step(i) for i in range(9)] + [make_step(9, kind="transition", skip=None)]
    ax = plotting.graph(make_report(*steps))
    boxes = [patch for patch in ax.patches if isinstance(patch, FancyBboxPatch)]
    assert len(boxes) == 10
    assert [text.get_text() for text in ax.texts].count("1") == 9


def test_a_heat_map_of_training_shows_every_block_at_every_record():
    blocks = [{"name": name, "growth": 0.5, "gradient_norm": 10.0} for name in ("a", "b")]
    records = [{"step": 10 * i, "findings": ["exploding"] * (i == 2), "blocks": blocks} for i in range(4)]
    ax = plotting.training(records)
    mesh = next(c for c in ax.collections if isinstance(c, QuadMesh))
    assert np.ma.allclose(mesh.get_array(), 0.5)
    assert ax.lines[0].get_xdata().tolist() == [20.0]
    mesh = next(c for c in plotting.training(records, quantity="gradient_norm").collections if isinstance(c, QuadMesh))
    assert np.ma.allclose(mesh.get_array(), 1.0)
    with pytest.raises(ValueError, match="the blocks have growth, gradient_norm"):
        plotting.training(records, quantity="speed")
    with pytest.raises(ValueError, match="at least one record"):
        plotting.training([])


def test_what_is_looked_at_now_and_then_stands_for_the_records_about_it():
    records = [
        {"step": step, "findings": [], "blocks": [{"name": "a", "update_ratio": 1e-3 if step % 10 == 0 else math.nan}]}
        for step in range(0, 31, 5)
    ]
    ax = plotting.training(records, quantity="update_ratio")
    mesh = next(c for c in ax.collections if isinstance(c, QuadMesh))
    assert np.asarray(mesh.get_array()).ravel().tolist() == [-3.0] * 4
    assert mesh.get_coordinates()[0, :, 0].tolist() == [-5.0, 5.0, 15.0, 25.0, 35.0]
    assert ax.get_xlim() == (-2.5, 32.5)


def test_steps_without_attribution_are_said_to_have_none():
    ax = plotting.attribution(replace(REPORT, steps=tuple(replace(s, attribution=None) for s in REPORT.steps)))
    assert any("no attribution" in text.get_text() for text in ax.texts)
