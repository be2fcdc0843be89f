import math

import numpy as np
import pytest

from stabkit import integrators
from stabkit.integrators import Region, order_star

BOUNDED = ["forward_euler", "heun2", "rk4", "dopri5", "ssp104", "ab2", "ab3", "ab4", "ab5", "am3", "plain", "lm_resnet"]
UNBOUNDED = ["backward_euler", "bdf2", "bdf4", "bdf6", "trapezoid", "radau_iia3", "theta(2/3)"]


@pytest.mark.parametrize("name", BOUNDED + UNBOUNDED)
def test_boundary_points_have_spectral_radius_one(name):
    method = integrators.named(name)
    A, U, B, V = method.A, method.U, method.B, method.V
    for curve in method.region().curves:
        z = curve.points[np.abs(curve.points) < 1e3]
        M = V + z[:, None, None] * (B @ np.linalg.solve(np.eye(len(A)) - z[:, None, None] * A, U + 0j))
        radius = np.abs(np.linalg.eigvals(M)).max(axis=-1)
        assert np.abs(radius - 1).max() < 1e-10


@pytest.mark.parametrize("name", ["rk4", "ab4", "dopri5", "am3", "momentum_resnet"])
def test_area_agrees_with_counting_points(name):
    method = integrators.named(name)
    region = method.region()
    left, right, bottom, top = region.box
    rng = np.random.default_rng(0)
    inside = method.is_stable(rng.uniform(left, right, 60000) + 1j * rng.uniform(bottom, top, 60000))
    share = (right - left) * (top - bottom)
    spread = share * math.sqrt(inside.mean() * (1 - inside.mean()) / len(inside))
    assert abs(region.area - share * inside.mean()) < 4 * spread


def test_area_of_discs():
    assert integrators.named("forward_euler").region().area == pytest.approx(math.pi, rel=1e-10)
    assert integrators.scaled_residual(0.5).region().area == pytest.approx(4 * math.pi, rel=1e-10)
    assert integrators.named("lambda_in_resnet").region().area == pytest.approx(math.pi / 1.2**2, rel=1e-10)
    assert integrators.stochastic_depth(0.5, rescaled=True).region().area == pytest.approx(math.pi / 4, rel=1e-4)
    assert integrators.named("leapfrog").region().area == pytest.approx(0, abs=1e-12)
    assert integrators.named("backward_euler").region().area == math.inf


def test_area_of_a_lemniscate():
    # |1 + z + z^2/2| <= 1 is |w^2 + 1| <= 2 with w = 1 + z, an oval of Cassini: a = 1, b^2 = 2
    t = (np.arange(4096) + 0.5) * 2 * np.pi / 4096
    squared = -np.cos(2 * t) + np.sqrt(4 - np.sin(2 * t) ** 2)  # r^2, foci at +-i
    assert integrators.named("heun2").region().area == pytest.approx(np.mean(squared) * np.pi, rel=1e-9)


def test_signed_distance_to_discs():
    rng = np.random.default_rng(2)
    z = rng.uniform(-4, 4, 500) + 1j * rng.uniform(-4, 4, 500)
    euler = integrators.named("forward_euler").region()
    assert np.allclose(euler.signed_distance(z), np.abs(z + 1) - 1, atol=1e-9)
    backward = integrators.named("backward_euler").region()
    assert np.allclose(backward.signed_distance(z), 1 - np.abs(z - 1), atol=1e-9)
    assert euler.signed_distance(z.reshape(20, 25)).shape == (20, 25)


def test_signed_distance_at_the_end_of_the_real_interval():
    rk4 = integrators.named("rk4")
    assert float(rk4.region().signed_distance(-rk4.real_interval())) == pytest.approx(0, abs=1e-9)
    assert float(rk4.region().signed_distance(-3.2)) == pytest.approx(3.2 - rk4.real_interval(), rel=1e-6)


def test_boxes_show_the_boundary():
    left, right, bottom, top = integrators.named("rk4").region().box
    assert left < -2.785
    assert right > 0.4
    assert bottom == pytest.approx(-top)
    assert 3 < top < 4
    assert integrators.named("rkc1(30)").region().box[0] < -1800
    with pytest.raises(ValueError, match="is empty"):
        Region(integrators.named("rk4"), (0, -1, -1, 1))


@pytest.mark.parametrize("name", ["rk4", "ab3", "bdf2"])
def test_locus_and_level_set_draw_the_same_boundary(name):
    region = integrators.named(name).region()
    locus = np.concatenate([c.points for c in region.curves])
    for curve in region.level_curves(150):
        gap = np.abs(curve.points[:, None] - locus[None, :]).min(axis=1)
        assert gap.max() < 0.01
        assert np.allclose(integrators.named(name).amplification(curve.points), 1, atol=1e-10)


@pytest.mark.parametrize("name", ["rk4", "ab4", "dopri5"])
def test_region_lies_to_the_left_of_its_boundary(name):
    region = integrators.named(name).region()
    for curve in region.curves:
        tangent = np.roll(curve.points, -1) - curve.points
        left = (curve.points + 1e-5j * tangent / np.abs(tangent))[5:-5]
        assert region.contains(left).mean() > 0.99


@pytest.mark.parametrize("name", ["forward_euler", "heun2", "rk4", "gauss2"])
def test_order_star_has_one_more_sector_than_the_order(name):
    method = integrators.named(name)
    circle = 0.05 * np.exp(2j * np.pi * np.arange(4000) / 4000)
    outside = order_star(method, circle) > 1
    assert np.count_nonzero(outside & ~np.roll(outside, 1)) == method.order + 1
