from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from stabkit import meanfield
from stabkit.meanfield import maps
from stabkit.meanfield.closed_forms import UNKNOWN

TORCH = {
    "relu": nn.ReLU(),
    "leaky_relu": nn.LeakyReLU(),
    "tanh": nn.Tanh(),
    "erf": torch.erf,
    "gelu": nn.GELU(),
    "silu": nn.SiLU(),
    "sigmoid": nn.Sigmoid(),
    "softplus": nn.Softplus(threshold=100),
    "elu": nn.ELU(),
    "selu": nn.SELU(),
    "hardtanh": nn.Hardtanh(),
    "relu6": nn.ReLU6(),
    "sin": torch.sin,
}


@pytest.mark.parametrize("name", TORCH)
def test_named_activations_compute_what_torch_does(name: str):
    h = torch.linspace(-7, 7, 60, dtype=torch.float64, requires_grad=True)
    values = TORCH[name](h)
    slopes = torch.autograd.grad(values.sum(), h)[0]
    found = meanfield.activation(name)
    np.testing.assert_allclose(found.function(h.detach().numpy()), values.detach().numpy(), atol=1e-14)
    np.testing.assert_allclose(found.derivative(h.detach().numpy()), slopes.numpy(), atol=1e-14)


@pytest.mark.parametrize("name", ["relu", "leaky_relu", "linear", "erf", "gelu", "sin"])
@pytest.mark.parametrize("q", [0.05, 1.0, 6.0])
def test_closed_forms_agree_with_quadrature(name: str, q: float):
    known = meanfield.activation(name)
    bare = dataclasses.replace(known, closed=UNKNOWN)
    for moment in (
        lambda phi: maps.second_moment(phi, q),
        lambda phi: maps.slope_moment(phi, q),
        lambda phi: maps.slope_moment(phi, q, 4),
        lambda phi: maps.product_moment(phi, (q, 2 * q), 0.6),
        lambda phi: maps.slope_product_moment(phi, (q, 2 * q), -0.3),
        lambda phi: maps.chi_parallel(phi, q, sigma_w=1.0),
    ):
        closed, computed = moment(known), moment(bare)
        assert computed.method == "quadrature"
        assert abs(closed.value - computed.value) <= max(20 * computed.error, 1e-12)


def test_modules_are_recognised_with_their_parameters():
    names = [nn.LeakyReLU(0.3), nn.ELU(0.5), nn.Hardtanh(-2, 2), nn.GELU(approximate="tanh"), nn.PReLU(init=0.1)]
    found = [meanfield.activation(module).name for module in names]
    assert found == ["leaky_relu(0.3)", "elu(0.5, 1)", "hardtanh(-2, 2)", "gelu_tanh", "leaky_relu(0.1)"]


def test_any_scalar_function_is_differentiated_by_autograd():
    cube = meanfield.activation(lambda h: h**3)
    assert float(meanfield.variance_map(cube, 2.0, sigma_w=1.0)) == pytest.approx(15 * 8)
    assert float(meanfield.chi_1(cube, 2.0, sigma_w=1.0)) == pytest.approx(9 * 3 * 4)


def test_log_slope_of_tanh_survives_where_the_slope_is_not_seen():
    assert meanfield.activation("tanh").log_slope(np.array([400.0]))[0] == pytest.approx(2 * np.log(2) - 800)


def test_what_is_not_a_scalar_function_is_refused():
    with pytest.raises(ValueError, match="element by element"):
        meanfield.activation(lambda h: torch.cumsum(h, 0))
    with pytest.raises(ValueError, match="expected one of linear, relu"):
        meanfield.activation("reluu")
    with pytest.raises(ValueError, match=r"torch\.tanh"):
        meanfield.activation(lambda h: None)
