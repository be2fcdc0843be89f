from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import stabkit
from stabkit import integrators
from stabkit.attribution.mechanism import (
    _crossings,
    _first_crossing,
    disc,
    is_inverted,
    largest_step_factor,
    region_margin,
    shares,
    z_of_one_stage,
)
from tests.attribution.networks import Activated, LinearStep, linear_steps, normal_input

EULER = integrators.named("forward_euler")


def mechanism(A: torch.Tensor, a: float = 1.0, **options) -> stabkit.attribution.Mechanism:
    flow = stabkit.trace(linear_steps(A, A, a=a), normal_input(2, len(A)))
    return stabkit.attribution.mechanisms(flow, **options)[0]


def test_each_mode_goes_to_its_mechanism():
    found = mechanism(torch.diag(torch.tensor([0.1, -2.5, -1.0, -0.05])))
    assert vars(found.modes) == {"continuous": 0.25, "discretisation": 0.25, "overdamped": 0.25, "neutral": 0.25}
    squares = np.array([1.1, 1.5, 0.0, 0.95]) ** 2
    expected = squares / squares.sum()
    assert list(vars(found.energy).values()) == pytest.approx(expected, abs=1e-7)
    assert found.dominant == "discretisation"
    assert found.margin == pytest.approx(-0.5, abs=1e-7)


def test_energies_add_up_and_excess_is_the_spectral_growth():
    W = 0.4 * normal_input(12, 12)
    flow = stabkit.trace(linear_steps(W, W), normal_input(3, 12))
    found = stabkit.attribute(flow)
    for step in found.mechanisms:
        assert sum(vars(step.energy).values()) == pytest.approx(1, abs=1e-12)
        assert sum(vars(step.modes).values()) == pytest.approx(1, abs=1e-12)
        growth = math.exp(2 * float(found.spectral[step.step, 0])) - 1
        assert sum(vars(step.excess).values()) == pytest.approx(growth, rel=1e-9)


def test_oscillation_is_an_instability_of_the_discretisation():
    found = mechanism(torch.tensor([[0.0, 0.8], [-0.8, 0.0]]))
    assert found.energy.discretisation == 1
    assert found.margin == pytest.approx(1 - math.hypot(1, 0.8), abs=1e-7)


@pytest.mark.parametrize(("a", "eigenvalue", "kind"), [(0.0, 1.2, "continuous"), (0.0, -1.2, "discretisation")])
def test_a_plain_layer_is_judged_in_the_gauge_of_its_map(a, eigenvalue, kind):
    found = mechanism(eigenvalue * torch.eye(3), a=a)
    assert found.dominant == kind
    assert found.margin == pytest.approx(-0.2, abs=1e-6)
    assert found.largest_step_factor == pytest.approx(1 / 1.2, rel=1e-6)


@pytest.mark.parametrize("lam", [0.25, 0.5])
def test_damping_moves_the_disc_over_the_spectrum(lam):
    A = torch.diag(torch.tensor([0.2, -0.4], dtype=torch.float64))
    plain, damped = mechanism(A), mechanism(A, a=1 - lam)
    assert plain.margin == pytest.approx(-0.2, abs=1e-12)
    assert damped.margin == pytest.approx(lam - 0.2, abs=1e-12)
    assert damped.largest_step_factor == pytest.approx(lam / 0.2, rel=1e-12)


def test_the_branch_may_grow_by_the_factor_that_is_reported():
    A = -torch.diag(torch.tensor([0.3, 1.0, 1.25], dtype=torch.float64))
    factor = mechanism(A).largest_step_factor
    assert factor == pytest.approx(1.6, rel=1e-12)
    assert mechanism(0.999 * factor * A).margin > 0
    assert mechanism(1.001 * factor * A).margin < 0


@pytest.mark.parametrize("name", ["rk4", "ssp33", "heun"])
def test_step_factors_on_the_axes_are_the_stability_intervals(name):
    method = integrators.named(name)
    real = largest_step_factor(method, np.array([-1.0 + 0j]))
    assert real == pytest.approx(float(method.real_interval()), rel=1e-9)
    imaginary = largest_step_factor(method, np.array([1j]))
    assert imaginary == pytest.approx(float(method.imaginary_interval()), rel=1e-4, abs=0.01)


def test_an_a_stable_method_takes_any_step_on_the_left():
    assert largest_step_factor(integrators.named("backward_euler"), np.array([-1 + 5j, -3.0])) == math.inf


@settings(deadline=None, max_examples=40)
@given(
    a=st.floats(-1, 1), b=st.floats(0.1, 3), real=st.floats(-3, 3), imaginary=st.floats(-3, 3), seed=st.integers(0, 99)
)
def test_the_disc_in_closed_form_agrees_with_the_region(a, b, real, imaginary, seed):
    method = integrators.GeneralLinearMethod([[0]], [[1]], [[b]], [[a]])
    z = np.array([complex(real, imaginary)]) + np.random.default_rng(seed).normal(size=3)
    assert region_margin(method, z) == pytest.approx(-float(method.region().signed_distance(z).max()), abs=1e-6)
    factor = largest_step_factor(method, z, tolerance=0.0)
    for s in (0.0, 0.5 * factor, 0.999 * factor):
        assert (method.amplification(s * z) <= 1 + 1e-9).all()
    if factor > 0:
        assert not (method.amplification(1.01 * factor * z) <= 1).all()


@pytest.mark.parametrize("name", ["forward_euler", "leapfrog"])
def test_an_eigenvalue_tells_z_where_it_has_one_root(name):
    method = integrators.named(name)
    assert is_inverted(method)
    z = 0.3 * (np.random.default_rng(0).normal(size=(2, 5)) + 1j * np.random.default_rng(1).normal(size=(2, 5)))
    for branch in range(method.states):
        values = np.linalg.eigvals(method.stability_matrix(z))[..., branch]
        np.testing.assert_allclose(z_of_one_stage(method, values), z, atol=1e-9)


@pytest.mark.parametrize("name", ["rk4", "heun", "backward_euler", "lie"])
def test_no_eigenvalue_tells_z_of_several_stages(name):
    assert not is_inverted(integrators.named(name))


def test_shares_of_nothing_count_modes():
    energy, modes, _ = shares(np.zeros((1, 4), dtype=complex), np.zeros((1, 4), dtype=bool), 1e-4, 0.5, 4)
    assert energy.overdamped == modes.overdamped == 1


def test_methods_without_a_disc_say_so():
    assert disc(integrators.named("rk4")) is None
    assert disc(integrators.named("backward_euler")) is None
    assert disc(EULER) == (1, 1)


def test_a_relu_behind_the_addition_leaves_the_modes_of_the_active_coordinates():
    A = torch.diag(torch.tensor([-0.5, 0.3, -1.0, -2.2], dtype=torch.float64))
    block = Activated(LinearStep(A), nn.ReLU())
    x = torch.tensor([[1.0, 1.0, -1.0, -1.0]], dtype=torch.float64)
    # 1 - 2.2 turns the sign of the last coordinate: it is active, the third is not
    found = stabkit.attribution.mechanisms(stabkit.trace(nn.Sequential(block, block), x))[0]
    assert found.masked == 0.25
    assert sorted(found.z[0][np.isfinite(found.z[0])].real) == pytest.approx([-2.2, -0.5, 0.3])


def test_a_norm_behind_the_addition_is_taken_off_before_z_is_read():
    A = 0.3 * normal_input(5, 5)
    block = Activated(LinearStep(A), nn.LayerNorm(5, dtype=torch.float64))
    flow = stabkit.trace(nn.Sequential(block, block), normal_input(2, 5))
    found = stabkit.attribute(flow)
    expected = np.sort_complex(np.linalg.eigvals(A.numpy()))
    np.testing.assert_allclose(np.sort_complex(found.mechanisms[0].z[0]), expected, atol=1e-10)
    assert bool((found.norm[0] != 0).all())


def test_a_transition_has_no_mechanism():
    flow = stabkit.trace(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)), torch.ones(1, 4))
    first = stabkit.attribution.mechanisms(flow)[0]
    assert first.energy is None
    assert first.margin is None
    assert first.largest_step_factor is None
    assert first.to_dict()["z"] is None


def test_deeper_networks_allow_less_damping():
    def modes(depth: int) -> stabkit.attribution.Shares:
        A = -0.1 * torch.eye(2)
        return stabkit.attribution.mechanisms(stabkit.trace(linear_steps(*[A] * depth), normal_input(1, 2)))[0].modes

    assert modes(4).neutral == 1
    assert modes(40).overdamped == 1


def test_the_step_size_of_a_scaled_branch_moves_z():
    found = mechanism(torch.diag(torch.tensor([-0.5, -1.0], dtype=torch.float64)))
    assert sorted(found.z[0].real) == pytest.approx([-1.0, -0.5])
    assert json_ready(found.to_dict())


def json_ready(plain: dict) -> bool:
    import json

    return json.loads(json.dumps(plain))["z"][0] == plain["z"][0]


def test_many_modes_of_several_fields_are_scanned_at_a_time(monkeypatch):
    method = integrators.GeneralLinearMethod([[0, 0], [1, 0]], [[1], [1]], [[1, 1]], [[1]], fields=(0, 1))
    rng = np.random.default_rng(0)
    z = [rng.normal(-0.5, 1.0, 150) + 1j * rng.normal(0.0, 1.0, 150) for _ in range(2)]
    points = np.stack(z)
    one_by_one = [_first_crossing(method, mode[:, None]) for mode in points.T]
    assert any(s < 1e-9 for s in one_by_one)
    assert any(0.0 < s < math.inf for s in one_by_one)
    calls = []
    amplification = type(method).amplification
    monkeypatch.setattr(type(method), "amplification", lambda *args: (calls.append(1), amplification(*args))[1])
    np.testing.assert_allclose(_crossings(method, points), one_by_one, rtol=1e-12)
    assert len(calls) <= 3 * 61
    reach = np.minimum(one_by_one, 1e6)
    assert region_margin(method, *z) == pytest.approx(((reach - 1) * np.linalg.norm(points, axis=0)).min())
