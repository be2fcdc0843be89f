import math
from fractions import Fraction

import numpy as np
import pytest

from stabkit import integrators

Z = np.array([-0.7, 0.3j, -1.2 + 0.8j])


def test_damping_joins_the_residual_to_the_plain_network():
    for form in ("in_resnet", "lambda_in_resnet", "exponential"):
        assert integrators.damped_euler(0, form) == integrators.named("forward_euler")
    assert integrators.damped_euler(1) == integrators.plain()
    assert integrators.damped_euler(Fraction(1, 5)).is_exact
    assert np.allclose(integrators.damped_euler(0.3, "lambda_in_resnet").stability_matrix(Z)[:, 0, 0], 0.7 + 1.3 * Z)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: integrators.damped_euler(float("nan")), "finite number"),
        (lambda: integrators.damped_euler(0.5, "other"), "choose 'in_resnet'"),
        (lambda: integrators.gated(-0.1), "between 0 and 1"),
        (lambda: integrators.stochastic_depth(0), r"\(0, 1\]"),
    ],
)
def test_parameters_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("k", [Fraction(-1, 2), Fraction(-1, 10), Fraction(1, 3)])
def test_lm_resnet_real_interval(k):
    assert integrators.lm_resnet(k).real_interval() == float(2 * (1 - k))
    assert np.allclose(np.linalg.det(integrators.lm_resnet(k).stability_matrix(Z)), -float(k))


def test_momentum_network_is_lm_resnet_with_another_step():
    g = 0.6
    momentum = integrators.momentum_resnet(g).amplification(Z)
    assert np.allclose(momentum, integrators.lm_resnet(-g).amplification((1 - g) * Z))


def test_polynet_is_neutral_up_to_one_on_the_imaginary_axis():
    assert integrators.named("polynet").real_interval() == 1
    assert integrators.named("polynet").imaginary_interval() == 1


def test_cornn_trace_and_determinant():
    dt, gamma, eps, a, b = 0.2, 0.7, 0.4, -0.5, 0.3
    M = integrators.cornn(dt, gamma, eps).stability_matrix(a, b)
    assert np.trace(M) == pytest.approx(2 + dt * (b - eps) + dt**2 * (a - gamma))
    assert np.linalg.det(M) == pytest.approx(1 + dt * (b - eps))


def test_unicornn_is_symplectic_and_neutral_below_four():
    dt, alpha, w = 0.5, 1.0, 3.0
    method = integrators.unicornn(dt, alpha)
    assert np.linalg.det(method.stability_matrix(w)) == pytest.approx(1)
    assert method.is_stable(4 / dt**2 - alpha - 0.01)
    assert not method.is_stable(4 / dt**2 - alpha + 0.01)


def test_lem_trace_and_determinant():
    p, q, c, e = 0.3, 0.6, -0.4, 1.1
    M = integrators.lem(p, q).stability_matrix(c, e)
    assert np.trace(M) == pytest.approx((1 - p) + (1 - q) + p * q * c * e)
    assert np.linalg.det(M) == pytest.approx((1 - p) * (1 - q))


def test_transformer_blocks_differ_by_the_product_of_their_fields():
    f, g = 0.3 - 0.1j, -0.4
    lie, parallel, macaron = (integrators.named(n).stability_matrix(f, g)[0, 0] for n in ("lie", "parallel", "macaron"))
    assert lie - parallel == pytest.approx(f * g)
    assert macaron == pytest.approx((1 + f / 2) ** 2 * (1 + g))


def test_second_order_leapfrog_is_stable_between_minus_four_and_zero():
    method = integrators.named("leapfrog_network")
    assert method.real_interval() == 4
    assert method.is_stable([-0.1, -3.9]).all()
    assert not method.is_stable([0.0, -4.0, 0.1]).any()  # double roots on the circle at both ends


def test_gated_unit_with_half_open_gate():
    method = integrators.gated(Fraction(1, 2))
    assert method.real_interval() == 3
    assert method.imaginary_interval() == pytest.approx(math.sqrt(3))
