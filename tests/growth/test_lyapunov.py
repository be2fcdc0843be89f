from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import stabkit
from stabkit.errors import TraceError
from stabkit.growth import lyapunov_spectrum
from tests.growth import systems
from tests.growth.systems import DOUBLE, normal


def assert_within_errors(spectrum, known, sigmas=5.0):
    """Means over samples against known values, by the spread over the samples."""
    errors = spectrum.exponents.std(0) / math.sqrt(len(spectrum.exponents))
    assert (errors < 0.02).all()
    assert ((spectrum.exponents.mean(0) - torch.tensor(known, dtype=DOUBLE)).abs() < sigmas * errors).all()


@pytest.mark.parametrize("direction", ["forward", "adjoint"])
def test_a_linear_map_has_the_logs_of_its_eigenvalues(direction):
    A = torch.diag(torch.tensor([2.0, 1.2, 0.5, 0.1], dtype=DOUBLE)) + 0.1 * normal(4, 4)
    exact = torch.linalg.eigvals(A).abs().log().sort(descending=True).values
    found = lyapunov_spectrum(systems.linear(A, 400), direction=direction, discard=150)
    torch.testing.assert_close(found.exponents[0], exact, rtol=0, atol=1e-10)
    assert found.converged.all()


def interrupting(flow, after: int):
    """The same flow, whose ``after``-th piece of derivatives is interrupted by the keyboard."""
    pieces = flow.tangents

    def tangents(k, *, adjoint=False):
        for index, piece in enumerate(pieces(k, adjoint=adjoint)):
            if index == after:
                raise KeyboardInterrupt
            yield piece

    object.__setattr__(flow, "tangents", tangents)
    return flow


@pytest.mark.parametrize("direction", ["forward", "adjoint"])
def test_an_interrupt_returns_the_exponents_of_the_steps_so_far(direction):
    A = torch.diag(torch.tensor([0.9, 0.5], dtype=DOUBLE)) + 0.1 * normal(2, 2)
    whole = lyapunov_spectrum(systems.linear(A, 6000), direction=direction)
    found = lyapunov_spectrum(interrupting(systems.linear(A, 6000), 2), direction=direction)
    assert (whole.stopped, found.stopped) == ("done", "interrupted")
    assert 1000 < int(found.steps) < int(whole.steps)
    torch.testing.assert_close(found.exponents, whole.exponents, rtol=0, atol=1e-10)
    taken = found.local_growth.isfinite().all(2).all(1)
    assert torch.equal(found.local_growth[taken], whole.local_growth[taken])
    assert "(interrupted)" in str(found)
    with pytest.raises(KeyboardInterrupt):
        lyapunov_spectrum(interrupting(systems.linear(A, 6000), 0), direction=direction)


@pytest.mark.parametrize("direction", ["forward", "adjoint"])
def test_the_numbers_of_a_sample_do_not_depend_on_its_place_in_the_batch(direction):
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Sequential(nn.Linear(12, 12), nn.Tanh()) for _ in range(6)]).double()
    x, order = normal(5, 12, seed=3), torch.tensor([3, 0, 4, 1, 2])
    found = lyapunov_spectrum(stabkit.trace(model, x), 3, direction=direction).exponents
    shuffled = lyapunov_spectrum(stabkit.trace(model, x[order]), 3, direction=direction).exponents
    torch.testing.assert_close(shuffled, found[order], rtol=0, atol=1e-12)
    alone = lyapunov_spectrum(stabkit.trace(model, x[2:3]), 3, direction=direction).exponents
    torch.testing.assert_close(alone, found[2:3], rtol=0, atol=1e-12)


def test_a_tolerance_is_a_pair():
    with pytest.raises(TraceError, match=r"tolerance=0.001; expected two numbers"):
        lyapunov_spectrum(systems.jordan(20), tolerance=1e-3)


def test_a_jordan_block_has_one_eigenvalue_twice():
    found = lyapunov_spectrum(systems.jordan(200))
    torch.testing.assert_close(found.exponents[0], torch.full((2,), -0.10536052, dtype=DOUBLE), rtol=0, atol=1e-8)


def test_the_cat_map():
    golden = math.log((3 + math.sqrt(5)) / 2)
    found = lyapunov_spectrum(systems.cat_map(300))
    expected = torch.tensor([golden, -golden], dtype=DOUBLE).expand(2, 2)
    torch.testing.assert_close(found.exponents, expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(found.kaplan_yorke_dimension, torch.full((2,), 2.0, dtype=DOUBLE))
    torch.testing.assert_close(found.entropy, torch.full((2,), golden, dtype=DOUBLE))


def test_the_logistic_map_and_the_variance_of_its_growth():
    found = lyapunov_spectrum(systems.logistic(2000, 50))
    assert ((found.exponents - math.log(2)).abs() < 5 * found.standard_errors).all()
    growth = lyapunov_spectrum(systems.logistic(5, 20_000), discard=0).local_growth[..., 0].cumsum(0)
    for t in (1, 5):
        squares = (growth[t - 1] - t * math.log(2)).square()
        error = float(squares.std() / math.sqrt(len(squares)))
        assert abs(float(squares.mean()) - math.pi**2 / 6 * (1 - 2.0**-t)) < 5 * error


def test_the_henon_map_with_its_sum_and_dimension():
    found = lyapunov_spectrum(systems.henon(3000, 32))
    assert_within_errors(found, [0.4191, -1.6231])
    torch.testing.assert_close(found.sum, torch.full((32,), math.log(0.3), dtype=DOUBLE), rtol=0, atol=1e-12)
    assert found.volume_errors is not None
    assert found.volume_errors.abs().max() < 1e-12
    assert abs(float(found.kaplan_yorke_dimension.mean()) - 1.258) < 5e-3
    assert ((found.exponents - found.exponents.mean(0)).abs() < 6 * found.standard_errors).all()


def test_lorenz_through_runge_kutta_in_torch():
    found = lyapunov_spectrum(systems.lorenz(4000, 64))
    per_time, errors = found.exponents_per_time, found.exponents_per_time.std(0) / 8
    known = torch.tensor([0.9056, 0.0, -14.5723], dtype=DOUBLE)
    assert ((per_time.mean(0) - known).abs() < 5 * errors + 2e-3).all()
    assert (errors < 0.02).all()
    torch.testing.assert_close(per_time.sum(1), torch.full((64,), -41 / 3, dtype=DOUBLE), rtol=0, atol=5e-4)
    assert "per unit of time" in str(found)
    assert "NOT converged" in str(found)


def test_gaussian_layers_at_finite_width():
    found = lyapunov_spectrum(systems.gaussian_layers(600, batch=16))
    assert_within_errors(found, systems.gaussian_exponents().tolist())
    assert abs(systems.gaussian_exponents()[0] + 0.065088) < 1e-6


def test_orthogonal_layers_have_one_exponent_without_error():
    found = lyapunov_spectrum(systems.orthogonal_layers(60, 8, 1.5))
    torch.testing.assert_close(found.exponents, torch.full((1, 8), math.log(1.5), dtype=DOUBLE), rtol=0, atol=1e-12)
    assert found.standard_errors.max() < 1e-12


def test_deep_relu_networks_lose_what_their_width_says():
    assert abs(systems.relu_exponent() + 0.0412701040) < 1e-10
    assert_within_errors(lyapunov_spectrum(systems.relu_layers(300, batch=16), 1), [systems.relu_exponent()])


def test_untied_and_tied_residual_layers():
    assert_within_errors(lyapunov_spectrum(systems.untied_residual(300, batch=16), 1), [0.1058913889])
    flow, exact = systems.tied_residual(3000)
    found = lyapunov_spectrum(flow, discard=500).exponents[0]
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-3)  # complex pairs turn: their mean is never quite full


def test_a_random_recurrent_network_is_as_chaotic_as_mean_field_says():
    found = lyapunov_spectrum(systems.random_network(600, 4), 1)
    assert abs(float(found.exponents.mean()) - 0.150) < 0.01


def test_depth_and_time_agree_on_the_same_layers():
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(6, 6, bias=False) for _ in range(40)]).double()
    weights = torch.stack([layer.weight.detach() for layer in model]).unsqueeze(1)
    over_time = stabkit.iterate(lambda x, w: systems.apply(w, x), torch.zeros(1, 6, dtype=DOUBLE), 40, inputs=weights)
    flow = stabkit.trace(model, torch.ones(1, 6, dtype=DOUBLE))
    for direction in ("forward", "adjoint"):
        a, b = (lyapunov_spectrum(f, direction=direction, discard=0) for f in (flow, over_time))
        torch.testing.assert_close(a.local_growth, b.local_growth, rtol=0, atol=1e-9)


@pytest.mark.parametrize("direction", ["forward", "adjoint"])
def test_growth_is_that_of_a_qr_decomposition_after_every_step(direction):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, 5)).double()
    x = normal(2, 5)
    found = lyapunov_spectrum(stabkit.trace(model, x), 5, direction=direction)
    adjoint = direction == "adjoint"
    for sample in range(2):
        point, frame, expected = x[sample], torch.eye(5, dtype=DOUBLE), []
        jacobians = []
        for layer in model:
            jacobians.append(torch.autograd.functional.jacobian(layer, point))
            point = layer(point).detach()
        for J in reversed(jacobians) if adjoint else jacobians:
            frame, R = torch.linalg.qr((J.T if adjoint else J) @ frame)
            expected.append(R.diagonal().abs().log())
        growth = torch.stack(expected[::-1] if adjoint else expected)
        order = growth.mean(0).argsort(descending=True)
        torch.testing.assert_close(found.local_growth[:, sample], growth[:, order], rtol=0, atol=1e-9)
    assert found.direction == direction


@settings(deadline=None, max_examples=15)
@given(st.integers(1, 6), st.integers(2, 40), st.integers(0, 1000), st.sampled_from([1e-3, 1.0, 1e3]))
def test_the_sum_of_all_exponents_is_the_growth_of_volume(width, steps, seed, scale):
    W = normal(steps, 1, width, width, seed=seed) * scale
    flow = stabkit.iterate(lambda x, w: systems.apply(w, x), torch.zeros(1, width, dtype=DOUBLE), steps, inputs=W)
    found = lyapunov_spectrum(flow, discard=0)
    volume = torch.linalg.slogdet(W[:, 0]).logabsdet.mean()
    torch.testing.assert_close(found.sum[0], volume, rtol=1e-9, atol=1e-9)


def test_exponents_do_not_depend_on_how_many_are_asked_for():
    flow = systems.gaussian_layers(300, batch=2)
    whole, few = lyapunov_spectrum(flow, discard=30), lyapunov_spectrum(flow, 3, discard=30)
    torch.testing.assert_close(whole.exponents[:, :2], few.exponents[:, :2], rtol=0, atol=0.02)


def test_a_saturated_unit_is_said_and_not_minus_infinity():
    flow = stabkit.iterate(lambda x: torch.tanh(x) + 30, torch.full((1, 2), 30.0, dtype=DOUBLE), 5)
    found = lyapunov_spectrum(flow)
    assert found.saturated.all()
    assert found.exponents.isnan().all()
    assert not found.converged.any()
    assert "saturated" in str(found)


def test_a_step_of_lower_rank_keeps_the_directions_that_are_left():
    torch.manual_seed(0)
    narrow = nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 4))
    model = nn.Sequential(narrow, nn.Linear(4, 4), nn.Linear(4, 4)).double()
    found = lyapunov_spectrum(stabkit.trace(model, normal(1, 4), depth=["0", "1", "2"]))
    assert found.saturated[0].tolist() == [False, False, True, True]
    assert found.exponents[0, :2].isfinite().all()


def test_float32_survives_a_dynamic_range_that_dense_products_do_not():
    scales = torch.tensor([10.0, 0.1]).log()
    model = nn.Sequential(*[nn.Linear(2, 2, bias=False) for _ in range(60)])
    for layer in model:
        layer.weight.data = torch.diag(scales.exp())
    found = lyapunov_spectrum(stabkit.trace(model, torch.ones(1, 2)))
    torch.testing.assert_close(found.exponents[0].float(), scales, rtol=0, atol=1e-5)


def test_a_complex_state_has_every_exponent_twice():
    A = torch.tensor([[1.2j, 0.1], [0.0, 0.5]], dtype=torch.complex128)
    flow = stabkit.iterate(lambda z: z @ A.T, torch.zeros(1, 2, dtype=torch.complex128), 200)
    expected = torch.tensor([1.2, 1.2, 0.5, 0.5], dtype=DOUBLE).log()
    torch.testing.assert_close(lyapunov_spectrum(flow).exponents[0], expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_agrees_with_float64_within_its_rounding(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(8)])
    x = torch.randn(2, 8)
    exact = lyapunov_spectrum(stabkit.trace(model.double(), x.double()), 2, seed=1)
    found = lyapunov_spectrum(stabkit.trace(model.to(dtype), x.to(dtype)), 2, seed=1)
    assert not found.saturated.any()
    # frames of different dtypes are drawn differently: compare what does not depend on them much
    assert float((found.sum - exact.sum).abs().max()) < 0.4


def test_results_are_plain_data():
    data = lyapunov_spectrum(systems.henon(50, 2)).to_dict()
    assert set(data) >= {"exponents", "standard_errors", "converged", "kaplan_yorke_dimension", "interval"}
    assert isinstance(data["exponents"][0][0], float)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 3}, "k=3"),
        ({"k": 0}, "k=0"),
        ({"direction": "sideways"}, "direction='sideways'"),
        ({"discard": 60}, "discard=60"),
        ({"step_size": -1.0}, "step_size=-1.0"),
    ],
)
def test_arguments_that_make_no_sense(arguments, message):
    with pytest.raises(TraceError, match=message):
        lyapunov_spectrum(systems.henon(50, 2), **arguments)


def test_what_is_no_flow_is_a_type_error():
    with pytest.raises(TypeError, match="flow is a Linear"):
        lyapunov_spectrum(nn.Linear(2, 2))
