import math
from fractions import Fraction

import numpy as np
import pytest

from stabkit import integrators


def test_exponential_euler_is_exact_on_its_linear_part():
    method = integrators.named("exponential_euler")
    z = np.array([-3.0, 0.2j, 1e-12])
    assert np.allclose(method.stability_matrix(z, 0.0)[:, 0, 0], np.exp(z))
    assert np.allclose(method.stability_matrix(0.0, z)[:, 0, 0], 1 + z)
    step = integrators.damped_euler(Fraction(1, 5), "exponential").stability_matrix(z)[:, 0, 0]
    assert np.allclose(method.stability_matrix(-0.2, z)[:, 0, 0], step)


def test_zero_order_hold_is_the_exact_flow():
    hold = integrators.named("zoh")
    assert hold.real_interval() == hold.imaginary_interval() == math.inf
    assert hold.is_stable([-50.0, 3j, -1 + 1j]).all()
    assert not hold.is_stable(0.01)


def test_sampled_interval_ends_where_the_function_crosses_one():
    method = integrators.StabilityFunction(lambda z: np.cos(1j * z * 0.5) * 0.5, name="half cosh", at_infinity=math.inf)
    assert method.real_interval() == pytest.approx(2 * math.acosh(2), rel=1e-10)


@pytest.mark.parametrize("rescaled", [False, True])
def test_stochastic_depth_grows_as_simulated(rescaled):
    p, z = 0.7, -0.6 + 0.5j
    method = integrators.stochastic_depth(p, rescaled)
    factor = 1 + z * (1 / p if rescaled else 1)
    assert method.amplification(z) == pytest.approx(math.sqrt(p * abs(factor) ** 2 + 1 - p), rel=1e-14)
    rng = np.random.default_rng(0)
    steps = np.where(rng.uniform(size=(400000, 2)) < p, abs(factor) ** 2, 1.0).prod(axis=1)
    assert steps.mean() == pytest.approx(float(method.amplification(z)) ** 4, rel=0.01)


def test_rescaling_shrinks_the_disc():
    assert integrators.stochastic_depth(Fraction(3, 5)).real_interval() == 2
    assert integrators.stochastic_depth(Fraction(3, 5), rescaled=True).real_interval() == 1.2
    assert integrators.stochastic_depth(0.6, rescaled=True).imaginary_interval() == 0


def test_mean_square_of_two_state_methods():
    momentum, stay = integrators.momentum_resnet(0.5), integrators.momentum_resnet(0.0)
    mixed = integrators.MeanSquareMethod([momentum, stay], [0.25, 0.75])
    z = -0.8 + 0.1j
    M, N = momentum.stability_matrix(z), stay.stability_matrix(z)
    second = 0.25 * np.kron(M, M.conj()) + 0.75 * np.kron(N, N.conj())
    assert mixed.amplification(z) == pytest.approx(math.sqrt(np.abs(np.linalg.eigvals(second)).max()), rel=1e-12)
    with pytest.raises(ValueError, match="need one state"):
        mixed.real_interval()


@pytest.mark.parametrize(
    ("outcomes", "probabilities", "message"),
    [(["rk4"], [0.5, 0.5], "1 outcomes"), (["rk4"], [0.5], "summing to 1"), (["trapezoid"], [1.0], "explicit")],
)
def test_bad_mixtures_are_explained(outcomes, probabilities, message):
    with pytest.raises(ValueError, match=message):
        integrators.MeanSquareMethod([integrators.named(n) for n in outcomes], probabilities)
