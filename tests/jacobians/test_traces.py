import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stabkit.jacobians import (
    Jacobian,
    log_abs_det,
    singular_value_density,
    squared_frobenius_norm,
    trace,
    trace_of_square,
)
from stabkit.jacobians.golub_kahan import Bidiagonalisation
from tests.jacobians.hard_matrices import operator

N = 200
A = np.eye(N) + 0.5 * np.random.default_rng(0).standard_normal((3, N, N)) / np.sqrt(N)
ESTIMATES = {
    trace: np.trace(A, axis1=1, axis2=2),
    squared_frobenius_norm: (A**2).sum((1, 2)),
    trace_of_square: np.einsum("bij,bji->b", A, A),
}


@pytest.mark.parametrize("estimate", ESTIMATES)
def test_intervals_cover_the_truth_as_often_as_they_say(estimate):
    covered = []
    for seed in range(60):
        result = estimate(operator(A), probes=24, confidence=0.9, seed=seed)
        truth, interval = ESTIMATES[estimate], result.interval.numpy()
        covered.append((interval[0, 0] <= truth[0]) & (truth[0] <= interval[0, 1]))
    # binomial(60, .9): fewer than 46 with probability 1e-3; always covering (60) has probability 2e-3
    assert 46 <= sum(covered) < 60
    assert result.method != "exact"


@pytest.mark.parametrize("estimate", ESTIMATES)
def test_enough_probes_give_the_exact_value(estimate):
    result = estimate(operator(A), probes=N)
    np.testing.assert_allclose(result.value, ESTIMATES[estimate], rtol=1e-12)
    assert float(result.standard_errors.max()) == 0
    assert result.n_products == N


def test_hutch_plus_plus_is_exact_on_low_rank():
    rng = np.random.default_rng(0)
    low = rng.standard_normal((N, 3)) @ rng.standard_normal((3, N))
    result = trace(operator(low), probes=15)
    np.testing.assert_allclose(result.value, np.trace(low), rtol=1e-9)
    assert result.n_products == 15


def test_log_determinant_is_exact_where_that_is_cheap():
    result = log_abs_det(operator(A))
    np.testing.assert_allclose(result.value, np.linalg.slogdet(A)[1], rtol=1e-10)
    assert result.method == "exact"


def test_log_determinant_intervals_cover_the_truth():
    d = torch.linspace(0.5, 2, 3000, dtype=torch.float64)[None, :, None]
    J = Jacobian((1, 3000, 3000), lambda V: d * V, lambda U: d * U, dtype=d.dtype, device=d.device)
    truth = float(d.log().sum())
    results = [log_abs_det(J, probes=5, steps=15, confidence=0.9, seed=100 * seed) for seed in range(30)]
    covered = sum(low <= truth <= high for low, high in (r.interval[0].tolist() for r in results))
    assert covered >= 22  # binomial(30, .9): fewer with probability 2e-3
    assert {r.n_products for r in results} == {150}
    assert np.mean([float(r.interval[0, 1] - r.interval[0, 0]) for r in results]) < 0.2 * truth


def test_full_quadrature_on_one_probe_recovers_the_singular_values():
    density = singular_value_density(operator(A), probes=2, steps=N)
    truth = np.linalg.svd(A, compute_uv=False)
    for nodes, values in zip(density.nodes.numpy(), truth, strict=True):
        np.testing.assert_allclose(nodes, np.tile(np.sort(values), (2, 1)), atol=1e-9)
    np.testing.assert_allclose(density.weights.sum(-1), 1, rtol=1e-12)


def test_density_of_a_rectangular_operator_follows_the_marchenko_pastur_law():
    B = np.random.default_rng(1).standard_normal((300, 600)) / np.sqrt(600)
    density = singular_value_density(operator(B), probes=8, steps=40)
    x = torch.linspace(0.2, 1.8, 9, dtype=torch.float64)
    truth = (np.linalg.svd(B, compute_uv=False)[None] <= x.numpy()[:, None]).mean(1)
    np.testing.assert_allclose(density.cumulative(x)[0], truth, atol=0.05)


def test_density_intervals_cover_the_truth_as_often_as_they_say():
    B = np.random.default_rng(2).standard_normal((80, 120)) / np.sqrt(120)
    truth, width = np.linalg.svd(B, compute_uv=False), 0.1
    x = torch.tensor([0.3, 0.7, 1.1, 1.5], dtype=torch.float64)
    fraction = (truth <= x.numpy()[:, None]).mean(1)
    bells = np.exp(-(((x.numpy()[:, None] - truth) / width) ** 2) / 2).mean(1) / (width * np.sqrt(2 * np.pi))
    runs = [singular_value_density(operator(B), probes=6, steps=16, seed=100 * seed) for seed in range(40)]

    def covered(intervals, value):
        return sum((band[0, :, 0] <= value) & (value <= band[0, :, 1]) for band in map(np.asarray, intervals))

    # binomial(40, .9): fewer than 29 with probability 2e-3; the bracket of the quadrature only widens the first
    fractions = [run.cumulative_interval(x, 0.9) for run in runs]
    assert (covered(fractions, fraction) >= 29).all()
    assert np.mean([float((band[..., 1] - band[..., 0]).mean()) for band in fractions]) < 0.4
    counts = covered([run.density_interval(x, width, 0.9) for run in runs], bells)
    assert (counts >= 29).all()
    assert counts.min() < 40
    np.testing.assert_allclose(np.mean([run.density(x, width)[0].numpy() for run in runs], 0), bells, rtol=0.05)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10**6), st.integers(2, 12), st.floats(0, 3))
def test_every_probe_brackets_its_own_measure(seed, steps, x):
    rng = np.random.default_rng(seed)
    values = rng.uniform(0, 3, 30)
    density = singular_value_density(np.diag(values), probes=2, steps=steps, seed=seed)
    sums = np.concatenate([np.zeros((2, 2)), density.weights[0].cumsum(-1), np.ones((2, 1))], axis=1)
    below = (density.nodes[0].numpy() <= x).sum(-1)
    starts = [Bidiagonalisation(30, 30, 1, 1, torch.device("cpu"), seed + i).next_block()[0].numpy() for i in range(2)]
    for i, start in enumerate(starts):
        seen = (start**2)[values <= x].sum()
        assert sums[i, below[i]] - 1e-9 <= seen <= sums[i, below[i] + 2] + 1e-9


def test_a_singular_matrix_has_log_determinant_minus_infinity():
    assert log_abs_det(np.diag([1.0, 0.0])).value.item() == -np.inf


def test_results_are_ready_for_json_and_bad_input_is_named():
    assert json.loads(json.dumps(trace(A).to_dict()))["method"] == "hutch++"
    assert set(singular_value_density(A, probes=2, steps=3).to_dict()) == {"nodes", "weights", "n_products"}
    with pytest.raises(ValueError, match="square"):
        trace(np.ones((2, 3)))
    density = singular_value_density(A, probes=2, steps=3)
    with pytest.raises(ValueError, match="width=0"):
        density.density(torch.ones(1), 0.0)
    with pytest.raises(ValueError, match="confidence=2"):
        density.cumulative_interval(torch.ones(1), 2.0)
    with pytest.raises(ValueError, match="probes=1"):
        squared_frobenius_norm(A, probes=1)
    with pytest.raises(ValueError, match="confidence"):
        trace_of_square(A, confidence=95)
