from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from stabkit import meanfield


def test_batch_norm_rates():
    assert meanfield.batch_norm_rate("relu") == pytest.approx(math.pi / (math.pi - 1), rel=1e-12)
    assert math.sqrt(meanfield.batch_norm_rate("relu")) == pytest.approx(1.21117, abs=5e-6)
    assert meanfield.batch_norm_rate("relu", 100_000) == pytest.approx(math.pi / (math.pi - 1), rel=1e-4)
    assert meanfield.batch_norm_rate("linear", 8) == pytest.approx(6 / 5)
    assert meanfield.batch_norm_rate("linear") == pytest.approx(1)


def test_batch_norm_rate_of_a_drawn_network():
    torch.manual_seed(0)
    n, batch, depth = 300, 16, 10
    x = torch.randn(batch, n, dtype=torch.float64)
    states = [x.requires_grad_()]
    for _ in range(depth):
        h = states[-1] @ torch.randn(n, n, dtype=torch.float64)
        h = (h - h.mean(0)) / h.std(0, correction=0)
        states.append(torch.relu(h))
        states[-1].retain_grad()
    (states[-1] * torch.randn(batch, n, dtype=torch.float64)).sum().backward()
    squares = [float(state.grad.square().sum()) for state in states[2:-1]]
    measured = (math.log(squares[0]) - math.log(squares[-1])) / (len(squares) - 1)
    assert measured == pytest.approx(math.log(meanfield.batch_norm_rate("relu", batch)), abs=0.06)


@pytest.mark.parametrize("pairs", [1, 2])
def test_batch_norm_residual_gradients_are_a_power_of_depth(pairs: int):
    profile = meanfield.batch_norm_residual_profile(4000, pairs=pairs)
    assert np.diff(profile.q) == pytest.approx((math.pi - 1) / math.pi)
    depth = np.array([200, 2000])
    grown = profile.log_chi[200:2000].sum()
    exponent = grown / math.log(depth[1] / depth[0])
    assert exponent == pytest.approx(meanfield.batch_norm_rate() ** pairs, rel=0.01)


@pytest.mark.parametrize(("norm", "layer"), [("layer", nn.LayerNorm), ("rms", nn.RMSNorm)])
def test_norm_gain_is_the_mean_squared_singular_value(norm: str, layer: type[nn.Module]):
    torch.manual_seed(0)
    x = 3 * torch.randn(40, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(layer(40, eps=0.0).double(), x)
    q = float(x.var(correction=0)) if norm == "layer" else float(x.square().mean())
    assert float(jacobian.square().sum()) / 40 == pytest.approx(meanfield.norm_gain(40, q, norm), rel=1e-10)


def test_prenorm_is_critical_relative_to_its_units():
    profile = meanfield.prenorm_profile("relu", 50, sigma_in=1.3, sigma_out=0.7)
    np.testing.assert_allclose(np.diff(profile.q), np.diff(profile.q)[0])
    np.testing.assert_allclose(profile.log_chi_relative, 0, atol=1e-12)
    assert meanfield.postnorm_chi("relu", sigma_in=1.3, sigma_out=0.7) == pytest.approx(1)


def test_small_batches_and_unknown_norms_are_refused():
    with pytest.raises(ValueError, match="at least 4"):
        meanfield.batch_norm_rate("relu", 3)
    with pytest.raises(ValueError, match="'relu' and 'linear' only"):
        meanfield.batch_norm_rate("tanh", 32)
    with pytest.raises(ValueError, match="'layer' or 'rms'"):
        meanfield.norm_gain(8, 1.0, "group")
