"""The integrator table of the reference numbers, each from exact rationals or 50-digit arithmetic elsewhere."""

import math

import numpy as np
import pytest

from stabkit import integrators

INTERVALS = {
    "forward_euler": (2, 0),
    "midpoint": (2, 0),
    "heun2": (2, 0),
    "ssp22": (2, 0),
    "ssp33": (2.5127453266183, 1.7320508075689),
    "heun3": (2.5127453266183, 1.7320508075689),
    "rk4": (2.7852935634053, 2.8284271247462),
    "dopri5": (3.3065678926349, 0.99718900863253),
    "rkc1": (50, 0),
    "rkc1(2)": (8, 0),
    "rkc1(17)": (2 * 17**2, 0),
    "ssp53": (6.2136118356, 2.6951728),
    "backward_euler": (math.inf, math.inf),
    "gauss2": (math.inf, math.inf),
    "radau_iia2": (math.inf, math.inf),
    "radau_iia3": (math.inf, math.inf),
    "ab2": (1, 0),
    "ab3": (6 / 11, 0.723627226986633),
    "leapfrog": (0, 1),
}


@pytest.mark.parametrize("name", INTERVALS)
def test_interval(name):
    method = integrators.named(name)
    real, imaginary = INTERVALS[name]
    assert float(method.real_interval()) == pytest.approx(real, rel=1e-10 if name != "ssp53" else 1e-11, abs=0)
    assert float(method.imaginary_interval()) == pytest.approx(imaginary, rel=3e-8 if name == "ssp53" else 1e-12)


@pytest.mark.parametrize(("name", "degrees"), [("bdf3", 86.0323668602), ("bdf4", 73.3516704746)])
def test_wedge_angle_is_not_floored(name, degrees):
    assert integrators.named(name).alpha() == pytest.approx(degrees, abs=1e-10)


def test_ssp53_reports_the_strict_value_and_the_tolerance():
    interval = integrators.named("ssp53").imaginary_interval()
    assert interval.tolerance == 1e-12
    assert interval.within == pytest.approx(2.695, abs=5e-4)
    # As published the coefficients make |R| exceed 1 by 1e-18 up to y = 1.35e-4, where the margin turns positive.
    assert interval.strict == 0
    margin = integrators.stability_intervals.modulus_margin(integrators.named("ssp53").characteristic, "imaginary")
    assert math.sqrt(integrators.rational_polynomials.PositiveRoots(margin).first()) == pytest.approx(1.4e-4, rel=0.05)


LOG_AMPLIFICATION = {
    -2.5: [0.4054651081, -0.0210534092, -0.4331896561, -1.2527629685, 1.1465070870, -1.0397207708, 1.6472311464],
    0.1j: [0.0049751654, -4.1528e-6, -6.9e-9, -0.0049751654, 2.55071e-5, -2.4391e-5, 0.0],
}
TOLERANCES = {-2.5: [1e-10] * 7, 0.1j: [1e-10, 5e-11, 5e-11, 1e-10, 5e-10, 5e-10, 1e-15]}
METHODS = ["forward_euler", "ssp33", "rk4", "backward_euler", "ab2", "bdf2", "leapfrog"]


@pytest.mark.parametrize("z", LOG_AMPLIFICATION)
@pytest.mark.parametrize("column", range(7))
def test_log_amplification(z, column):
    found = np.log(integrators.named(METHODS[column]).amplification(z))
    assert found == pytest.approx(LOG_AMPLIFICATION[z][column], abs=TOLERANCES[z][column])


def test_ssp_coefficient_of_forward_euler():
    assert integrators.named("forward_euler").ssp_coefficient() == 1


@pytest.mark.parametrize("gamma", [0.5, 0.9])
def test_momentum_network_reaches_further_on_the_real_axis_and_no_way_on_the_imaginary(gamma):
    method = integrators.momentum_resnet(gamma)
    assert method.real_interval() == pytest.approx(2 * (1 + gamma) / (1 - gamma), rel=1e-12)
    assert method.imaginary_interval() == 0
    assert method.amplification(0.1j) == pytest.approx({0.5: 1.0138, 0.9: 1.0305}[gamma], abs=5e-5)


@pytest.mark.parametrize("lam", [0.0, 0.2, 0.5, 1.0])
def test_damping_slides_eulers_disc_from_the_residual_to_the_plain_network(lam):
    circle = -(1 - lam) + np.exp(1j * np.linspace(0, 6, 50))
    assert np.allclose(integrators.damped_euler(lam).amplification(circle), 1, atol=1e-14)
    wide = integrators.damped_euler(lam, "lambda_in_resnet")
    assert np.allclose(wide.amplification((circle) / (1 + lam)), 1, atol=1e-14)
    assert integrators.damped_euler(lam).real_interval() == pytest.approx(2 - lam, rel=1e-14)
