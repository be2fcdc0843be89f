from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from matplotlib.patches import Circle

from stabkit import integrators, plotting
from tests.report.synthetic import make_report, make_step


def discs(ax) -> set[tuple[float, float]]:
    return {(patch.center[0], patch.radius) for patch in ax.patches if isinstance(patch, Circle)}


def points(ax) -> np.ndarray:
    offsets = [np.asarray(c.get_offsets()) for c in ax.collections if isinstance(c, PathCollection)]
    x, y = np.concatenate(offsets).T
    return np.sort_complex(x + 1j * y)


def test_the_disc_of_each_skip_and_every_eigenvalue():
    z = [(-0.5 + 0.5j,), (0.25 + 0j, -1 - 1j), (0.1 + 0j,)]
    steps = [make_step(i, skip=a, z=z[i]) for i, a in enumerate([1.0, 0.75, None])]
    ax = plotting.region(make_report(*steps))
    assert discs(ax) == {(-1.0, 1.0), (-0.75, 1.0), (0.0, 1.0)}
    np.testing.assert_allclose(points(ax), np.sort_complex([-0.5 + 0.5j, 0.25, -1 - 1j, 0.1]))
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_aspect()) == ("Re z", "Im z", 1.0)


def test_depth_is_the_color():
    steps = [make_step(i, z=(complex(i / 10),)) for i in range(5)]
    ax = plotting.region(make_report(*steps))
    (dots,) = [c for c in ax.collections if isinstance(c, PathCollection)]
    assert np.round(np.asarray(dots.get_offsets())[:, 0] * 10).tolist() == dots.get_array().tolist()
    (bar,) = ax.child_axes
    assert bar.get_ylabel() == "step"


def test_far_eigenvalues_stay_in_the_frame_as_triangles():
    z = (*(0.01j * k for k in range(100)), 1e6 + 0j, complex("nan"), complex("inf"))
    ax = plotting.region(make_report(make_step(z=z)))
    high, shown = ax.get_xlim()[1], points(ax)
    assert len(shown) == 101
    assert shown.real.max() < high < 30
    assert "1 beyond, |z| up to 1e+06" in [text.get_text() for text in ax.texts]


@pytest.mark.parametrize("z", [None, ()])
def test_a_report_without_eigenvalues_says_so(z):
    ax = plotting.region(make_report(make_step(z=z)))
    ax.figure.draw_without_rendering()
    assert ("no eigenvalues" in " ".join(t.get_text() for t in ax.texts)) == (z is None)


def test_a_part_of_the_spectrum_is_called_a_part():
    ax = plotting.region(make_report(make_step(spectrum_method="krylov")))
    assert "largest |a + z| only" in [text.get_text() for text in ax.texts]


def test_many_different_discs_share_one_entry_of_the_legend():
    ax = plotting.region(make_report(*(make_step(i, skip=1 - i / 20) for i in range(20))))
    assert len(discs(ax)) == 20
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["|a + z| ≤ 1, a = 0.05 to 1"]


def test_given_axes_are_drawn_on_and_returned():
    ax = Figure().subplots()
    assert plotting.region(make_report(make_step()), ax=ax) is ax


def test_a_spectrum_with_its_doubtful_values_hollow():
    values = np.array([[1j, -1j, 0.5 + 0j]])
    ax = plotting.spectrum(SimpleNamespace(values=values, converged=np.array([[True, True, False]])))
    np.testing.assert_allclose(points(ax), np.sort_complex(values[0]))
    hollow = [c for c in ax.collections if len(c.get_facecolor()) == 0 and len(c.get_offsets())]
    assert np.asarray(hollow[0].get_offsets()).tolist() == [[0.5, 0.0]]


def test_singular_values_fall_on_a_logarithmic_axis():
    spectrum = SimpleNamespace(values=np.array([[1.0, 10.0, 0.1]]), converged=np.ones((1, 3), bool))
    ax = plotting.spectrum(spectrum)
    np.testing.assert_allclose(points(ax), [1 + 10j, 2 + 1j, 3 + 0.1j])
    assert ax.get_yscale() == "log"


@pytest.mark.parametrize(
    ("name", "inside", "outside"),
    [("forward_euler", (-1, 0.0), (-2.1, 0.0)), ("rk4", (-2.7, 0.0), (-2.9, 0.0)), ("trapezoidal", (-5, 3), (1, 1))],
)
def test_the_region_of_a_method(name, inside, outside):
    ax = plotting.method(integrators.named(name))
    filled = ax.collections[0]
    paths = filled.get_paths()
    assert any(path.contains_point(inside) for path in paths)
    assert not any(path.contains_point(outside) for path in paths)


@pytest.mark.parametrize("name", ["leapfrog", "backward_euler", "rkc2", "momentum_resnet", "zero_order_hold", "revnet"])
def test_unusual_regions_can_be_drawn(name):
    # no interior, unbounded, very long, several states, not rational, several fields
    ax = plotting.method(integrators.named(name))
    ax.figure.draw_without_rendering()
    assert np.isfinite([*ax.get_xlim(), *ax.get_ylim()]).all()


def test_eigenvalues_lie_on_top_of_the_region_and_inside_the_picture():
    z = np.array([[-1 + 0.5j, -1 - 0.5j], [-40.0, np.nan]])
    ax = plotting.method(integrators.named("rk4"), z=z)
    drawn = ax.collections[-1].get_offsets()
    assert np.asarray(drawn).tolist() == [[-1, 0.5], [-1, -0.5], [-40, 0]]
    assert ax.get_xlim()[0] < -40 < ax.get_xlim()[1]
