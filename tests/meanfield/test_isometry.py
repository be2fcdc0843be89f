from __future__ import annotations

import numpy as np
import pytest

from stabkit import meanfield


@pytest.mark.parametrize("depth", [1, 2, 5, 10])
def test_edges_in_closed_form(depth: int):
    gaussian = meanfield.jacobian_spectrum("linear", depth, sigma_w=1.0)
    assert gaussian.largest == pytest.approx((depth + 1) ** (depth + 1) / depth**depth, rel=1e-8)
    assert gaussian.variance == pytest.approx(depth)
    orthogonal = meanfield.jacobian_spectrum("linear", depth, sigma_w=1.0, weights="orthogonal")
    assert (orthogonal.largest, orthogonal.smallest) == pytest.approx((1, 1), rel=1e-9)
    relu = meanfield.jacobian_spectrum("relu", depth, sigma_w=2**0.5, weights="orthogonal")
    edge = 2 if depth == 1 else depth**depth / (depth - 1) ** (depth - 1)
    assert relu.largest == pytest.approx(edge, rel=1e-8)
    assert relu.smallest == 0
    assert relu.variance == pytest.approx(depth)


@pytest.mark.parametrize(("depth", "edge"), [(2, 11.09), (5, 27.3)])
def test_relu_gaussian_edge_is_the_minimum_of_its_formula(depth: int, edge: float):
    found = meanfield.jacobian_spectrum("relu", depth, sigma_w=2**0.5)
    z = np.geomspace(1e-3, 10, 200_001)
    assert found.largest == pytest.approx(float(((1 + z) * (1 + 2 * z) ** depth / z).min()), rel=1e-8)
    assert found.largest == pytest.approx(edge, abs=0.05)
    assert found.variance == pytest.approx(2 * depth)


def test_tanh_near_isometry():
    kinds = {w: meanfield.jacobian_spectrum("tanh", 20, sigma_w=1.03056**0.5, q=1 / 64, weights=w) for w in WEIGHTS}
    assert kinds["orthogonal"].variance == pytest.approx(0.0338, abs=5e-5)
    assert kinds["gaussian"].variance == pytest.approx(20.03, abs=0.01)


WEIGHTS = ("gaussian", "orthogonal")


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("phi", ["leaky_relu", "hardtanh"])
def test_spectrum_of_a_drawn_network(phi: str, weights: str):
    rng = np.random.default_rng(3)
    n, depth, q = 400, 3, 0.8
    function = meanfield.leaky_relu(0.4) if phi == "leaky_relu" else meanfield.activation(phi)
    product = np.eye(n)
    for _ in range(depth):
        drawn = rng.standard_normal((n, n)) / n**0.5
        matrix = np.linalg.qr(drawn)[0] if weights == "orthogonal" else drawn
        product = function.derivative(q**0.5 * rng.standard_normal(n))[:, None] * (matrix @ product)
    values = np.linalg.svd(product, compute_uv=False) ** 2
    found = meanfield.jacobian_spectrum(function, depth, sigma_w=1.0, q=q, weights=weights)
    assert values.mean() == pytest.approx(found.mean, rel=0.1)
    # at this width the edge itself is off by some n^(-2/3)
    assert values.max() / values.mean() == pytest.approx(found.largest / found.mean, rel=0.12)
    assert values.min() == pytest.approx(found.smallest, rel=0.25, abs=1e-3)


def test_unknown_weights_are_refused():
    with pytest.raises(ValueError, match="'gaussian' or 'orthogonal'"):
        meanfield.jacobian_spectrum("tanh", 3, sigma_w=1.0, weights="uniform")
    with pytest.raises(ValueError, match="depth=0"):
        meanfield.jacobian_spectrum("tanh", 0, sigma_w=1.0)
