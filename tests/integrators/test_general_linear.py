import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stabkit import integrators
from stabkit.integrators import GeneralLinearMethod

ENTRY = st.fractions(-2, 2, max_denominator=5)


@st.composite
def tableaux(draw, explicit=True, states=1):
    s = draw(st.integers(1, 4))
    A = [[draw(ENTRY) if (j < i or not explicit) else Fraction(0) for j in range(s)] for i in range(s)]
    U, B, V = (
        [[draw(ENTRY) for _ in range(n)] for _ in range(m)] for m, n in [(s, states), (states, s), (states,) * 2]
    )
    return A, U, B, V


@settings(deadline=None, max_examples=60)
@given(tableaux())
def test_explicit_stability_polynomial_by_three_routes(tableau):
    A, U, B, V = (np.array(block, dtype=float) for block in tableau)
    method = GeneralLinearMethod(*tableau)
    by_determinant = [float(c) for c in method.characteristic.numerator] or [0.0]
    powers = [V[0, 0]] + [(B @ np.linalg.matrix_power(A, k) @ U).item() for k in range(len(A))]
    z = np.array([0.3, -1.2 + 0.4j, 1j])
    direct = [(V + a * B @ np.linalg.inv(np.eye(len(A)) - a * A) @ U).item() for a in z]
    assert np.allclose(np.polynomial.polynomial.polyval(z, by_determinant), direct, rtol=1e-11, atol=1e-11)
    assert np.allclose(np.polynomial.polynomial.polyval(z, powers), direct, rtol=1e-11, atol=1e-11)
    assert np.allclose(method.stability_matrix(z)[:, 0, 0], direct, rtol=1e-11, atol=1e-11)


@settings(deadline=None, max_examples=40)
@given(tableaux(explicit=False, states=2))
def test_implicit_method_with_two_states_against_dense_algebra(tableau):
    A, U, B, V = (np.array(block, dtype=float) for block in tableau)
    method = GeneralLinearMethod(*tableau)
    z = 0.31 - 0.77j
    system = np.eye(len(A)) - z * A
    if np.linalg.cond(system) > 1e6:
        return
    M = V + z * B @ np.linalg.solve(system, U)
    assert np.allclose(method.stability_matrix(z), M, rtol=1e-9, atol=1e-9)
    p = method.characteristic.coefficients @ z ** np.arange(method.characteristic.degree + 1)
    zeta = np.linalg.eigvals(M)
    values = np.polynomial.polynomial.polyval(zeta, p)
    assert np.all(np.abs(values) <= 1e-7 * np.polynomial.polynomial.polyval(np.abs(zeta) + 1, np.abs(p)))


@pytest.mark.parametrize("name", ["ab4", "bdf5", "am4", "sspms53"])
def test_many_points_agree_with_one_by_one(name):
    method = integrators.named(name)
    rng = np.random.default_rng(1)
    z = rng.uniform(-4, 4, 3000) + 1j * rng.uniform(-4, 4, 3000)
    many = method.amplification(z)
    alone = np.abs(np.linalg.eigvals(method.stability_matrix(z))).max(axis=-1)
    assert np.allclose(many, alone, rtol=1e-11)
    assert np.array_equal(method.is_stable(z), alone <= 1)
    assert method.amplification(z.reshape(50, 60)).shape == (50, 60)


def test_fields_take_their_own_z():
    lie = integrators.named("lie")
    z, w = np.array([[0.5], [1j]]), np.array([-1.0, 0.3j, 2.0])
    assert np.allclose(lie.stability_matrix(z, w)[..., 0, 0], (1 + z) * (1 + w))
    assert np.allclose(lie.amplification(0.25), 1.25**2)
    with pytest.raises(ValueError, match="3 values of z for 2 field"):
        lie.stability_matrix(1, 2, 3)


def test_reversible_network_has_determinant_one():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 100))
    M = integrators.named("revnet").stability_matrix(a, b)
    assert np.allclose(np.linalg.det(M), 1)
    assert np.allclose(np.trace(M, axis1=1, axis2=2), 2 + a * b)


def test_pole_and_infinity():
    backward = integrators.named("backward_euler")
    assert backward.amplification(1.0) == math.inf
    assert integrators.named("gauss2").amplification([3 + math.sqrt(3) * 1j])[0] > 1e14
    assert backward.amplification(np.inf) == 0
    assert integrators.named("trapezoid").damping_at_infinity() == 1
    assert integrators.named("bdf3").damping_at_infinity() == 0
    assert integrators.named("rk4").damping_at_infinity() == math.inf


def test_rational_tableau_stays_exact():
    method = GeneralLinearMethod([[0, 0], ["1/3", 0]], [[1], [1]], [[0, Fraction(1, 7)]], [[1]])
    assert method.is_exact
    assert method.characteristic.numerator == (1, Fraction(1, 7), Fraction(1, 21))
    assert not GeneralLinearMethod([[0]], [[1]], [[1 / 3]], [[1]]).is_exact
    assert GeneralLinearMethod([[0]], [[1]], [[0.5]], [[1]]).is_exact


def test_composition_multiplies_the_stability_matrices():
    first, second = integrators.named("leapfrog"), integrators.lm_resnet(Fraction(1, 3))
    z = np.array([0.2 - 0.5j, -1.0])
    M = first.then(second).stability_matrix(z)
    assert np.allclose(M, second.stability_matrix(z) @ first.stability_matrix(z))
    assert np.allclose(first.scaled("1/2").stability_matrix(z), first.stability_matrix(z / 2))
    with pytest.raises(ValueError, match="2 states and the second 1"):
        first.then(integrators.named("rk4"))


def test_one_z_along_a_direction():
    imex = integrators.named("imex_euler")
    z = np.array([-3.0, 0.5j])
    assert np.allclose(imex.along(0.25, 0.75).stability_matrix(z)[:, 0, 0], (1 + z / 4) / (1 - 0.75 * z))
    with pytest.raises(ValueError, match="1 factors for 2 fields"):
        imex.along(1)


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        (([[0]], [[1, 0]], [[1]], [[1]]), r"U has 1 rows of length \[2\].*must be \(1, 1\)"),
        (([[0]], [[1]], [[1]], []), "V is empty"),
        (([[0]], [[1]], [[float("nan")]], [[1]]), "B holds nan"),
        (([[0]], [[1]], [[1j]], [[1]]), "B holds 1j"),
        ((3, [[1]], [[1]], [[1]]), "A must be a matrix"),
    ],
)
def test_bad_blocks_are_named(blocks, message):
    with pytest.raises(ValueError, match=message):
        GeneralLinearMethod(*blocks)


def test_equal_methods_are_equal_and_hash_alike():
    one, two = integrators.named("heun2"), integrators.named("ssp22")
    assert one == two
    assert hash(one) == hash(two)
    assert one != integrators.named("midpoint")


def test_identity_has_a_double_eigenvalue_and_is_stable():
    assert integrators.named("symplectic_euler").is_stable(0.0)  # V = I, semisimple
    jordan = GeneralLinearMethod([], [], [[], []], [[1, 1], [0, 1]])
    assert not jordan.is_stable(0.0)
    assert not integrators.named("bdf7").is_zero_stable
    assert integrators.named("bdf6").is_zero_stable
