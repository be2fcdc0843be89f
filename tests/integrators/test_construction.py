from fractions import Fraction

import numpy as np
import pytest

from stabkit import integrators


def test_shu_osher_and_butcher_forms_of_ssp33_are_one_method():
    alpha = [[1, 0, 0], ["3/4", "1/4", 0], ["1/3", 0, "2/3"]]
    beta = [[1, 0, 0], [0, "1/4", 0], [0, 0, "2/3"]]
    method = integrators.from_shu_osher(alpha, beta)
    assert method == integrators.named("ssp33")
    assert method.is_exact


def test_implicit_shu_osher_form():
    # backward Euler: y_1 = y_0 + h f(y_1), result y_1
    method = integrators.from_shu_osher([[0], [1]], [[1], [0]])
    assert method == integrators.named("backward_euler")


@pytest.mark.parametrize("implicit", [False, True])
def test_multistep_eigenvalues_are_the_roots_of_rho_minus_z_sigma(implicit):
    rng = np.random.default_rng(3)
    alpha, beta = rng.normal(size=(2, 5))
    beta[-1] *= implicit
    z = -0.4 + 0.9j
    M = integrators.from_multistep(alpha, beta).stability_matrix(z)
    expected = np.roots((alpha - z * beta)[::-1])
    assert np.allclose(np.sort_complex(np.linalg.eigvals(M)), np.sort_complex(expected))


def test_multistep_state_advances_the_recurrence():
    bdf2, z = integrators.bdf(2), -0.7
    y = [1.0, 0.8]
    newer = (4 / 3 * y[1] - 1 / 3 * y[0]) / (1 - 2 / 3 * z)
    assert np.allclose(bdf2.stability_matrix(z) @ [y[1], y[0]], [newer, y[1]])


def test_additive_tableaux_share_their_stages():
    half = Fraction(1, 2)
    method = integrators.from_additive_butcher(
        [([[0, 0], [half, 0]], [0, 1]), ([[0, 0], [0, half]], [0, 1])]
    )  # IMEX midpoint, Ascher, Ruuth and Spiteri 1997, section 2.4
    z, w = 0.3j, -2.0
    middle = (1 + z / 2) / (1 - w / 2)
    assert np.allclose(method.stability_matrix(z, w), 1 + (z + w) * middle)
    assert method.order == 2


def test_partitioned_tableau_of_stormer_verlet():
    half = Fraction(1, 2)
    pair = integrators.from_partitioned_butcher(
        ([[half, half], [half, half]], [half, half]), ([[0, 0], [half, half]], [half, half]), order=2
    )
    for a, b in [(0.3, -1.1), (2.0, 0.7)]:
        drift, kick = np.array([[1, a], [0, 1]]), np.array([[1, 0], [b / 2, 1]])
        assert np.allclose(integrators.named("stormer_verlet").stability_matrix(a, b), kick @ drift @ kick)
        assert pair.states == 2


def test_symplectic_euler_matches_its_two_updates():
    a, b = 0.4, -1.7
    kick, drift = np.array([[1, 0], [b, 1]]), np.array([[1, a], [0, 1]])
    assert np.allclose(integrators.named("symplectic_euler").stability_matrix(a, b), drift @ kick)


def test_stability_function_is_realised_exactly():
    N, D = [1, "2/3", "1/6"], [1, "-1/3"]
    method = integrators.from_stability_function(N, D)
    assert method.characteristic.numerator == (1, Fraction(2, 3), Fraction(1, 6))
    assert method.characteristic.denominator == (1, Fraction(-1, 3))
    z = 0.2 - 1.3j
    assert np.allclose(method.stability_matrix(z), (1 + 2 * z / 3 + z * z / 6) / (1 - z / 3))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: integrators.from_butcher([[0]], [1, 0]), r"for 2 weights b"),
        (lambda: integrators.from_multistep([1], [1]), "need k"),
        (lambda: integrators.from_multistep([-1, 0], [1, 0]), r"alpha\[k\] is 0"),
        (lambda: integrators.from_shu_osher([[1, 0]], [[1, 0]]), r"both must be \(s, s\)"),
        (lambda: integrators.from_additive_butcher([([[0]], [1]), ([[0, 0]] * 2, [1, 0])]), "share their stages"),
        (lambda: integrators.from_stability_function([1], [0, 1]), r"D\(0\) = 0"),
    ],
)
def test_bad_forms_are_explained(make, message):
    with pytest.raises(ValueError, match=message):
        make()
