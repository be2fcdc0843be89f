import numpy as np
import pytest

from stabkit.integrators.level_sets import level_set


def test_circle_is_one_closed_curve_with_the_inside_on_the_left():
    ((points, closed),) = level_set(lambda z: np.abs(z) - 1, (-1.5, 1.5, -1.5, 1.5), 64)
    assert closed
    assert np.allclose(np.abs(points), 1, atol=1e-13)
    area = np.sum((points.conj() * np.roll(points, -1)).imag) / 2
    assert area == pytest.approx(np.pi, rel=1e-2)


def test_curve_that_leaves_the_box_is_open():
    curves = level_set(lambda z: z.real - 0.3, (-1, 1, -1, 1), 20)
    assert [closed for _, closed in curves] == [False]
    assert np.allclose(curves[0][0].real, 0.3)
    assert np.all(np.diff(curves[0][0].imag) > 0)  # upwards, with the negative side on the left


def test_two_discs_and_a_hole():
    def ring_and_disc(z):
        ring = np.maximum(np.abs(z + 1.5) - 1, 0.4 - np.abs(z + 1.5))
        return np.minimum(ring, np.abs(z - 1.5) - 0.7)

    curves = level_set(ring_and_disc, (-3, 3, -2, 2), 120)
    areas = sorted(np.sum((p.conj() * np.roll(p, -1)).imag) / 2 for p, _ in curves)
    assert areas == pytest.approx([-np.pi * 0.16, np.pi * 0.49, np.pi], rel=1e-2)  # the hole runs clockwise


def test_saddle_keeps_the_inside_corners_apart():
    curves = level_set(lambda z: -(z**2).imag, (-1, 1, -1, 1), 1)  # inside where x y > 0: two opposite corners
    assert len(curves) == 2
