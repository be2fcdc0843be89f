import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stabkit import integrators
from stabkit.integrators.characteristic import Characteristic
from stabkit.integrators.stability_intervals import is_inside_disc

COEFFICIENTS = st.lists(st.fractions(-3, 3, max_denominator=6), min_size=1, max_size=5)


@settings(deadline=None, max_examples=60)
@given(COEFFICIENTS, st.sampled_from(["real", "imaginary"]))
def test_interval_agrees_with_dense_sampling(tail, axis):
    method = integrators.from_stability_function([1, 1, *tail])
    limit = float(getattr(method, f"{axis}_interval")())
    direction = -1 if axis == "real" else 1j
    R = np.polynomial.Polynomial([1, 1, *map(float, tail)])
    inside = np.linspace(0, 1, 4001)[1:-1] * min(limit, 50)
    assert np.all(np.abs(R(direction * inside)) <= 1 + 1e-9)
    if math.isfinite(limit):  # unstable points exist immediately beyond
        beyond = limit + np.geomspace(1e-7, 1e-2, 60)
        assert np.any(np.abs(R(direction * beyond)) > 1)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.floats(-1.3, 1.3), st.floats(-1.3, 1.3)), min_size=1, max_size=5))
def test_schur_cohn_decides_like_the_roots(pairs):
    roots = np.array([complex(x, y) for x, y in pairs])
    conjugate_closed = np.concatenate([roots, roots.conj()])
    p = np.real(np.poly(conjugate_closed))[::-1]
    rows = tuple((Fraction(float(c)),) for c in p)
    largest = np.abs(np.roots(p[::-1])).max()
    if abs(largest - 1) > 1e-4:
        assert is_inside_disc(Characteristic(rows), Fraction(0)) == (largest < 1)


@pytest.mark.parametrize("s", [1, 2, 3, 7, 12, 30])
def test_tangent_curves_do_not_end_the_interval(s):
    assert integrators.rkc1(s).real_interval() == 2 * s * s
    assert integrators.rkc1(s).real_interval().strict == 2 * s * s


def test_damped_chebyshev_ends_where_the_polynomial_leaves_one():
    method = integrators.rkc1(8, damping=Fraction(1, 20))
    w0 = 1 + 0.05 / 64
    T = np.polynomial.chebyshev.Chebyshev.basis(8)
    expected = 2 * w0 * T.deriv()(w0) / T(w0)  # T_s(w0 + w1 z) = T_s(w0) at w0 + w1 z = -w0
    assert method.real_interval() == pytest.approx(expected, rel=1e-12)


def test_conservative_method_is_stable_up_to_the_collision_of_its_roots():
    for name, limit in [
        ("leapfrog", 1),
        ("symplectic_euler", 2),
        ("stormer_verlet", 2),
        ("milne_simpson", math.sqrt(3)),
    ]:
        method = integrators.named(name)
        assert method.imaginary_interval() == pytest.approx(limit, rel=1e-15)
        assert method.real_interval() == 0


def test_strictness_at_the_end_of_the_leapfrog_interval():
    leapfrog = integrators.named("leapfrog")
    assert leapfrog.is_stable(0.999j)
    assert not leapfrog.is_stable(1j)  # a double root on the circle
    assert leapfrog.is_stable(1j, strict=False)
    assert not leapfrog.is_stable(1.001j, strict=False)


@pytest.mark.parametrize(
    "name",
    ["gauss2", "gauss3", "gauss5", "sdirk2", "sdirk3", "tr_bdf2", "radau_iia3", "lobatto_iiia4", "lobatto_iiic4"],
)
def test_rounded_tableau_of_an_A_stable_method_is_still_A_stable(name):
    exact = integrators.named(name)
    rounded = integrators.GeneralLinearMethod(exact.A, exact.U, exact.B, exact.V)
    assert rounded.imaginary_interval() == math.inf
    assert rounded.is_A_stable
    assert rounded.alpha() == 90
    assert rounded.damping_at_infinity() == pytest.approx(exact.damping_at_infinity(), abs=1e-8)


def test_interval_carries_its_tolerance():
    heun = integrators.named("heun2").imaginary_interval()
    assert heun == heun.strict == 0
    assert heun.within == pytest.approx((8e-12) ** 0.25, rel=1e-6)  # |R(iy)|^2 = 1 + y^4 / 4
    assert heun.tolerance == 1e-12
    assert integrators.named("heun2").imaginary_interval(tolerance=1e-4) == pytest.approx((8e-4) ** 0.25, rel=1e-4)


def test_wedge_angles_of_bdf_5_and_6():
    # Hairer and Wanner II, V.2, table 2.1: 51.84 and 17.84 degrees
    assert integrators.named("bdf5").alpha() == pytest.approx(51.84, abs=0.005)
    assert integrators.named("bdf6").alpha() == pytest.approx(17.84, abs=0.005)
    assert integrators.named("rk4").alpha() == 0
    assert integrators.named("bdf7").alpha() == 0


@pytest.mark.parametrize(("name", "A", "L"), [("trapezoid", True, False), ("backward_euler", True, True),
                                              ("radau_iia3", True, True), ("gauss4", True, False),
                                              ("bdf2", True, True), ("bdf3", False, False), ("sdirk4", True, True),
                                              ("lobatto_iiia3", True, False), ("am2", False, False)])  # fmt: skip
def test_A_and_L_stability(name, A, L):
    method = integrators.named(name)
    assert (method.is_A_stable, method.is_L_stable) == (A, L)


def test_pole_in_the_left_half_plane_forbids_A_stability():
    method = integrators.from_stability_function([1, "-1/2"], [1, "1/2"])  # the trapezoid run backwards
    assert method.imaginary_interval() == math.inf
    assert not method.is_A_stable
