"""The picture of a region: numerical ranges, margins, and methods whose region is no disc."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from matplotlib.collections import PathCollection
from torch import nn

import stabkit
from stabkit import integrators, plotting
from stabkit.report.plane import plane_of
from tests.report.synthetic import make_report, make_step

SQUARE = (0.5 + 0.5j, -0.5 + 0.5j, -0.5 - 0.5j, 0.5 - 0.5j)


class Kutta(nn.Module):
    """One step of the classical Runge-Kutta method on x' = A x."""

    def __init__(self, A: torch.Tensor) -> None:
        super().__init__()
        self.f = nn.Linear(*A.shape, bias=False, dtype=A.dtype)
        self.f.weight = nn.Parameter(A)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        k1 = torch.sin(self.f(x))
        k2 = torch.sin(self.f(x + k1 / 2))
        k3 = torch.sin(self.f(x + k2 / 2))
        k4 = torch.sin(self.f(x + k3))
        return x + (k1 + 2 * k2 + 2 * k3 + k4) / 6


def dashed(ax) -> list[np.ndarray]:
    return [line.get_xydata() for line in ax.lines if line.get_linestyle() == "--"]


def test_numerical_ranges_are_the_dashed_outlines_that_reach_furthest():
    steps = [make_step(i, numerical_range=tuple(w * (1 + i) for w in SQUARE)) for i in range(5)]
    ax = plotting.region(make_report(*steps))
    assert sorted(outline[:, 0].max() for outline in dashed(ax)) == [1.5, 2.0, 2.5]
    assert all((outline[0] == outline[-1]).all() for outline in dashed(ax))  # closed
    assert "dashed: numerical range" in ax.get_title()
    assert not dashed(plotting.region(make_report(make_step())))


@pytest.mark.parametrize(("z", "words"), [(0.5, "−0.5 at b"), (-0.75, "+0.75 at b"), (-2.25, "−0.25 at b")])
def test_the_smallest_margin_is_ringed_and_said(z, words):
    far = make_step(0, name="a", z=(-1.0 + 0j,))
    ax = plotting.region(make_report(far, make_step(1, name="b", z=(complex(z), -1.0 + 0j))))
    assert f"margin {words}" in ax.get_title()
    (ring,) = [line for line in ax.lines if line.get_markerfacecolor() == "none" and line.get_marker() == "o"]
    assert ring.get_xydata().tolist() == [[z, 0.0]]


def test_a_runge_kutta_step_is_read_in_its_own_region():
    A = torch.tensor([[-0.5, 1.0], [-1.0, -0.5]], dtype=torch.float64)
    report = stabkit.analyze(nn.Sequential(Kutta(A), Kutta(A)), torch.zeros(1, 2, dtype=torch.float64))
    assert [step.method for step in report.steps] == ["rk4", "rk4"]
    ax = plotting.region(report)
    assert ax.get_title().startswith("Stability region, rk4")
    (dots,) = [c for c in ax.collections if isinstance(c, PathCollection) and len(c.get_offsets())]
    drawn = {(round(x, 9), round(y, 9)) for x, y in np.asarray(dots.get_offsets())}
    assert drawn == {(-0.5, 1.0), (-0.5, -1.0)}  # the eigenvalues of A: sin has slope 1 at 0
    fills = [path for c in ax.collections if not isinstance(c, PathCollection) for path in c.get_paths()]
    assert any(path.contains_point((-2.7, 0.0)) for path in fills)
    assert not any(path.contains_point((-2.9, 0.0)) for path in fills)


def test_eigenvalues_and_planes_of_a_method_agree():
    z = np.array([-0.5 + 1j, -0.5 - 1j, -2.5])
    rk4 = integrators.named("rk4")
    blocks = {name: tuple(map(tuple, getattr(rk4, name).tolist())) for name in "AUBV"}
    eigenvalues = rk4.stability_matrix(z)[:, 0, 0]
    given = tuple(complex(v) - 1 for v in eigenvalues)
    step = make_step(z=given, field_z=(tuple(z),), skip=1.0, tableau=blocks, stage_fields=(0,) * 4)
    plane = plane_of(step)
    assert plane is not None
    assert plane.method is not None
    np.testing.assert_allclose(rk4.stability_matrix(plane.z)[:, 0, 0], eigenvalues, rtol=1e-9)
    two_fields = make_step(tableau=blocks, stage_fields=(0, 1, 0, 1))
    assert plane_of(two_fields).method is None  # one eigenvalue does not tell two fields apart
    assert plane_of(make_step(z=None)) is None


def test_the_window_never_makes_the_regions_dots():
    z = tuple(complex(100 * k, 0) for k in range(50))
    ax = plotting.region(make_report(make_step(z=z)))
    low, high = ax.get_xlim()
    assert high - low < 20
    assert any("beyond" in text.get_text() for text in ax.texts)
