from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import stabkit
from stabkit.diagnosis import measure
from stabkit.diagnosis.measurement import Measurement


class Block(nn.Module):
    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.f = nn.Linear(*matrix.shape, bias=False, dtype=matrix.dtype)
        self.f.weight.data.copy_(matrix)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)


def orthogonal(gain: float, depth: int = 6, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(10, 10, bias=False) for _ in range(depth)]
    for layer in layers:
        nn.init.orthogonal_(layer.weight, gain=gain)
    return nn.Sequential(*layers).to(dtype)


def measured(model: nn.Module, x: Tensor, **options: object) -> Measurement:
    return measure(stabkit.trace(model, x), **options)


def test_growth_gain_and_change_of_orthogonal_layers_are_their_gain():
    found = measured(orthogonal(0.3), torch.ones(3, 10).double())
    assert found.growth.shape == (6, 12)
    assert found.growth == pytest.approx(math.log(0.3), abs=1e-6)
    for step in found.steps:
        assert step.mean_gain == pytest.approx(math.log(0.3), abs=1e-6)
        assert step.log_change == pytest.approx(math.log(0.3), abs=1e-6)


def test_growth_is_exact_where_the_gradient_leaves_the_range_of_float32():
    model = orthogonal(1e-9, depth=12, dtype=torch.float32)
    found = measured(model, torch.ones(2, 10), loss=lambda out: 1e-6 * out.sum())
    assert found.growth == pytest.approx(math.log(1e-9), rel=1e-5)
    assert found.log_gradients[0] - found.log_gradients[-1] == pytest.approx(12 * math.log(1e-9), rel=1e-5)


def test_gradients_are_in_the_units_of_the_loss():
    model, x = orthogonal(1.0), torch.ones(2, 10).double()
    found = measured(model, x, loss=lambda out: 1e-30 * out.sum())
    x.requires_grad_()
    (grad,) = torch.autograd.grad(1e-30 * model(x).sum(), x)
    assert found.log_gradients[0] == pytest.approx(grad.norm(dim=1).log().tolist(), rel=1e-12)


def test_a_head_of_zeros_does_not_hide_what_lies_before():
    model = nn.Sequential(*orthogonal(0.5), nn.Linear(10, 3, dtype=torch.float64))
    nn.init.zeros_(model[6].weight)
    found = measured(model, torch.ones(2, 10).double(), loss=lambda out: (out - 1).square().sum())
    assert found.restarts == (6,)
    assert (found.growth[6] == -math.inf).all()
    assert found.growth[:6] == pytest.approx(math.log(0.5), abs=1e-6)


@pytest.mark.parametrize("scale", [0.0, 0.1, 3.0])
def test_the_gain_of_a_branch_is_that_of_its_matrix(scale):
    torch.manual_seed(1)
    matrix = scale * torch.linalg.qr(torch.randn(16, 16).double()).Q
    found = measured(nn.Sequential(Block(matrix), Block(matrix)), torch.randn(4, 16).double())
    (merge,) = found.steps[0].merges
    assert merge.module_path == "0.f"
    assert merge.gain == (pytest.approx(math.log(scale), abs=1e-9) if scale else -math.inf)
    assert found.steps[0].unchanged == float(scale == 0.0)


def test_dead_and_saturated_units_are_counted():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Tanh())
    with torch.no_grad():
        model[0].bias.copy_(torch.tensor([-100.0] * 6 + [100.0] * 2))
        model[2].weight.zero_()
        model[2].bias.copy_(torch.tensor([9.0] * 2 + [0.0] * 6))
    found = measured(model, torch.randn(5, 8))
    ((relu,), (tanh,)) = found.steps[1].activities, found.steps[3].activities
    assert (relu.operation, relu.units, relu.observations, relu.dead) == ("Relu", 8, 5, 0.75)
    assert (tanh.operation, tanh.saturated, tanh.dead) == ("Tanh", 0.25, 0.0)


def test_units_of_images_are_channels_and_gates_are_told_from_activations():
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 5, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return torch.relu(y) + y * torch.sigmoid(y)

    found = measured(Gated(), torch.randn(2, 3, 4, 4))
    acts = {a.operation: a for step in found.steps for a in step.activities}
    assert (acts["Relu"].units, acts["Relu"].observations, acts["Relu"].gate) == (5, 32, False)
    assert acts["Sigmoid"].gate


def test_parameters_belong_to_the_step_that_uses_them():
    found = measured(orthogonal(2.0, dtype=torch.float32), torch.ones(2, 10))
    assert [[w.path for w in step.weights] for step in found.steps] == [[f"{i}.weight"] for i in range(6)]
    (weight,) = found.steps[0].weights
    assert weight.gains == pytest.approx((math.log(2.0),) * 3, abs=1e-6)
    assert weight.role == "*.weight"


def test_an_iterated_map_is_measured_too():
    W = 0.7 * torch.linalg.qr(torch.randn(6, 6).double()).Q
    flow = stabkit.iterate(lambda x: x @ W.T, torch.ones(3, 6).double(), 9)
    found = measure(flow)
    assert found.growth.shape == (9, 12)
    assert found.growth == pytest.approx(math.log(0.7), abs=1e-9)


class Squared(nn.Module):
    """ReLU squared (So et al., Primer, 2021), whose slope has no bound."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x).square()


@pytest.mark.parametrize(("bias", "dead"), [(0.0, 0.0), (-1.0, 1.0)])
def test_units_of_an_activation_without_a_steepest_slope_are_not_all_dead(bias: float, dead: float):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), Squared(), nn.Linear(32, 16))
    nn.init.normal_(model[0].weight, std=0.02)  # small pre-activations, as models of transformers start with
    nn.init.constant_(model[0].bias, bias)
    found = [a for step in measure(stabkit.trace(model, torch.randn(24, 16))).steps for a in step.activities]
    assert [a.dead for a in found] == [dead]
