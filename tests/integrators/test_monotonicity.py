import math

import numpy as np
import pytest

from stabkit import integrators

# Gottlieb, Ketcheson and Shu 2011, chapters 2, 4, 6 and 8
KNOWN = {
    "ssp22": 1, "ssp33": 1, "ssp104": 6, "rk4": 0, "midpoint": 0, "trapezoid": 2, "implicit_midpoint": 2,
    "backward_euler": math.inf, "sspms32": 1 / 2, "sspms42": 2 / 3, "sspms43": 1 / 3, "sspms53": 1 / 2, "ab2": 0,
}  # fmt: skip


@pytest.mark.parametrize("name", KNOWN)
def test_ssp_coefficient(name):
    assert integrators.named(name).ssp_coefficient() == pytest.approx(KNOWN[name], rel=1e-14)


def test_ssp53_as_published():
    assert integrators.named("ssp53").ssp_coefficient() == pytest.approx(2.65062919, abs=1e-8)


@pytest.mark.parametrize("name", ["ssp33", "ssp104", "ssp53"])
def test_steps_up_to_the_coefficient_do_not_increase_the_maximum(name):
    method = integrators.named(name)
    upwind = np.eye(12) - np.roll(np.eye(12), 1, axis=0)  # u' = -upwind u: Euler keeps the maximum up to h = 1

    def largest(h):
        s, rhs = method.stages, -h * upwind
        stages = np.linalg.solve(np.eye(12 * s) - np.kron(method.A, rhs), np.kron(np.ones((s, 1)), np.eye(12)))
        step = np.eye(12) + np.kron(method.B, rhs) @ stages
        return np.abs(step).sum(axis=1).max()

    assert largest(0.999 * method.ssp_coefficient()) <= 1 + 1e-9
    assert largest(1.3 * method.ssp_coefficient()) > 1 + 1e-6


def test_internal_amplification_of_midpoint_is_the_modulus_of_z():
    z = np.array([-1.0, 2j, 0.5 + 0.5j])
    assert np.allclose(integrators.named("midpoint").internal_amplification(z), np.abs(z))
