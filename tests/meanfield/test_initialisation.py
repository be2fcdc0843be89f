from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor, nn

from stabkit import meanfield


def linear(fan_in: int, fan_out: int, sigma_w: float, sigma_b: float | None = None) -> nn.Linear:
    layer = nn.Linear(fan_in, fan_out, bias=sigma_b is not None)
    nn.init.normal_(layer.weight, 0, sigma_w / fan_in**0.5)
    if sigma_b is not None:
        nn.init.normal_(layer.bias, 0, sigma_b)
    return layer


def mlp(phi: type[nn.Module], width: int, depth: int, sigma_w: float, sigma_b: float | None = None) -> nn.Sequential:
    return nn.Sequential(*[nn.Sequential(linear(width, width, sigma_w, sigma_b), phi()) for _ in range(depth)])


class Residual(nn.Module):
    def __init__(self, width: int, norm: nn.Module, scale: float):
        super().__init__()
        self.norm, self.scale = norm, scale
        self.inner, self.outer = linear(width, width, 1.2, 0.1), linear(width, width, 1.0)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.outer(nn.functional.gelu(self.inner(self.norm(x))))


@pytest.mark.parametrize("sigma_w_squared", [1.3, 4.0])
def test_tanh_network_grows_gradients_as_expected(sigma_w_squared: float):
    torch.manual_seed(0)
    model = mlp(nn.Tanh, 400, 10, sigma_w_squared**0.5, 0.05**0.5)
    found = meanfield.at_initialisation(model, torch.randn(6, 400))
    for step in found.steps:
        assert step.q_expected == pytest.approx(step.q, rel=0.1)
        assert step.c_expected == pytest.approx(step.c, abs=0.15)
        assert step.log_chi_expected == pytest.approx(step.log_chi, abs=0.12)
        assert step.layers[0].sigma_w_squared == pytest.approx(sigma_w_squared, rel=0.03)
        assert step.layers[0].sigma_b_squared == pytest.approx(0.05, rel=0.3)
        assert step.layers[0].spread == pytest.approx(1, abs=0.05)
    assert found.log_growth == pytest.approx(found.log_growth_expected, abs=4 * found.deviation)
    chi = meanfield.fixed_point("tanh", sigma_w=sigma_w_squared**0.5, sigma_b=0.05**0.5).chi_1
    assert found.steps[-1].log_chi_expected == pytest.approx(math.log(chi), abs=0.05)
    assert "tanh" in str(found)


def test_rate_of_a_wide_tanh_network_is_chi():
    torch.manual_seed(1)
    found = meanfield.at_initialisation(mlp(nn.Tanh, 300, 24, 2.0, 0.05**0.5), torch.randn(2, 300), probes=4)
    assert found.rate is not None
    assert found.rate.law == "exponential"
    assert math.log(found.rate.chi) == pytest.approx(math.log(1.3424), abs=2 * found.deviation / 24)
    assert found.deviation < 1.2
    assert found.rate.interval[0] < found.rate.chi < found.rate.interval[1]
    assert found.rate.depth_scale == pytest.approx(1 / math.log(found.rate.chi))


def test_orthogonal_weights_are_told_from_independent_ones():
    model = nn.Sequential(*[nn.Linear(50, 50, bias=False) for _ in range(5)])
    for layer in model:
        nn.init.orthogonal_(layer.weight, 1.1)
    found = meanfield.at_initialisation(model, torch.randn(4, 50))
    assert [step.layers[0].spread for step in found.steps] == pytest.approx([0] * 5, abs=1e-5)
    assert found.log_growth == pytest.approx(10 * math.log(1.1), rel=1e-5)
    assert found.log_growth_expected == pytest.approx(10 * math.log(1.1), rel=1e-5)
    assert found.deviation == pytest.approx(0, abs=1e-3)


def test_gap_over_networks_is_that_of_their_width():
    torch.manual_seed(0)
    networks = [mlp(nn.ReLU, 30, 8, 2**0.5) for _ in range(30)]
    found = meanfield.at_initialisation(networks[0], torch.randn(2, 30), others=networks[1:], probes=2)
    assert found.networks == 30
    assert found.gap_expected == pytest.approx(5 * 8 / (2 * 30), rel=0.01)
    assert found.gap == pytest.approx(found.gap_expected, rel=0.5)
    assert found.log_growth == pytest.approx(0, abs=0.6)
    assert "30 networks" in found.rate.covers


@pytest.mark.parametrize("norm", [nn.Identity, nn.LayerNorm, nn.RMSNorm])
def test_residual_networks_with_and_without_norm(norm: type[nn.Module]):
    torch.manual_seed(0)
    blocks = [Residual(200, nn.Identity() if norm is nn.Identity else norm(200), 0.7) for _ in range(6)]
    found = meanfield.at_initialisation(nn.Sequential(linear(32, 200, 1.0), *blocks), torch.randn(4, 32))
    assert all(not step.reason for step in found.steps)
    for step in found.steps[1:]:
        assert step.q_expected == pytest.approx(step.q, rel=0.12)
        assert step.log_chi_expected == pytest.approx(step.log_chi, abs=0.08)
    assert found.log_growth_expected == pytest.approx(found.log_growth, abs=0.3)


class BatchNormBlock(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(torch.relu(self.norm(self.first(x))))


@pytest.mark.parametrize("training", [False, True])
def test_convolutions_count_the_taps_within_the_image(training: bool):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1, stride=2),
        *[BatchNormBlock(32) for _ in range(3)],
        nn.Flatten(),
        nn.Linear(2048, 200),
    )
    found = meanfield.at_initialisation(model.train(training), torch.randn(4, 3, 16, 16))
    assert found.steps[0].layers[0].taps == pytest.approx((23 / 8) ** 2)  # of 9; the first row and column miss one
    for step in found.steps:
        assert step.q_expected == pytest.approx(step.q, rel=0.25)
        assert step.log_chi_expected == pytest.approx(step.log_chi, abs=0.2)


def test_what_has_no_rule_gets_no_expectation_and_the_recursion_starts_anew():
    torch.manual_seed(0)

    class Attention(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.softmax(x @ x.transpose(1, 2), -1) @ x

    model = nn.Sequential(linear(32, 32, 1.0), Attention(), linear(32, 32, 1.5), nn.Tanh())
    found = meanfield.at_initialisation(model, torch.randn(4, 6, 32), depth=["0", "1", "2", "3"])
    unknown = found.steps[1]
    assert unknown.q_expected is None
    assert unknown.log_chi_expected is None
    assert "no mean field rule" in unknown.reason or "both depend" in unknown.reason
    assert found.steps[2].restarted
    assert found.steps[2].q_expected == pytest.approx(found.steps[2].q, rel=0.3)
    assert found.log_growth_expected is None
    assert "no expectation" in str(found)


def test_an_activation_of_what_is_not_gaussian_is_not_guessed():
    torch.manual_seed(0)
    model = nn.Sequential(linear(40, 40, 1.4), nn.ReLU(), nn.Tanh(), linear(40, 40, 1.4))
    found = meanfield.at_initialisation(model, torch.randn(3, 40), depth=["0", "1", "2", "3"])
    assert found.steps[1].q_expected is not None
    assert "not Gaussian" in found.steps[2].reason
    assert found.steps[3].q_expected is not None


def test_a_relu_after_the_addition_has_no_expectation_in_either_direction():
    class PostActivation(Residual):
        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(super().forward(x))

    torch.manual_seed(0)
    blocks = [PostActivation(60, nn.Identity(), 0.5) for _ in range(3)]
    found = meanfield.at_initialisation(nn.Sequential(linear(20, 60, 1.0), nn.ReLU(), *blocks), torch.randn(3, 20))
    for step in found.steps[-3:]:
        assert "Relu" in step.reason
        assert (step.q_expected, step.log_chi_expected, step.width_variance) == (None, None, None)


def test_dropout_in_training_is_not_guessed():
    torch.manual_seed(0)
    model = nn.Sequential(linear(30, 30, 1.0), nn.Tanh(), nn.Dropout(0.2), linear(30, 30, 1.0))
    found = meanfield.at_initialisation(model, torch.randn(3, 30))
    assert any(step.reason for step in found.steps)
    assert not any(step.reason for step in meanfield.at_initialisation(model.eval(), torch.randn(3, 30)).steps)


def test_a_head_at_zero_does_not_hide_what_lies_before_it():
    torch.manual_seed(0)
    model = nn.Sequential(*mlp(nn.Tanh, 200, 5, 1.2), linear(200, 3, 0.0))
    found = meanfield.at_initialisation(model, torch.randn(3, 200))
    assert found.steps[-1].log_chi == -math.inf
    assert found.log_growth == pytest.approx(sum(step.log_chi for step in found.steps[:-1]))
    for step in found.steps[:-1]:
        assert step.log_chi_expected == pytest.approx(step.log_chi, abs=0.25)
    assert any("zero" in note for note in found.notes)


def test_weights_with_a_mean_are_not_guessed():
    torch.manual_seed(0)
    model = mlp(nn.Tanh, 30, 3, 1.0)
    with torch.no_grad():
        model[1][0].weight += 0.2
    found = meanfield.at_initialisation(model, torch.randn(3, 30))
    assert "weights with a mean of 0.2" in found.steps[1].reason
    assert found.steps[0].q_expected is not None


def test_values_that_share_weights_are_not_added_as_if_independent():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = linear(30, 30, 1.0)

        def forward(self, x: Tensor) -> Tensor:
            h = self.layer(x)
            return h + torch.tanh(h)

    torch.manual_seed(0)
    found = meanfield.at_initialisation(Twice(), torch.randn(3, 30), depth="cuts")
    assert any("same weights" in step.reason for step in found.steps)


def test_result_is_plain_json_and_repeats():
    torch.manual_seed(0)
    model, x = mlp(nn.SiLU, 20, 4, 1.5), torch.randn(3, 20)
    first, second = (meanfield.at_initialisation(model, x, seed=3) for _ in range(2))
    assert json.loads(json.dumps(first.to_dict()))["steps"][2]["activations"] == ["silu"]
    assert first == second


def test_float64_and_a_single_sample():
    torch.manual_seed(0)
    found = meanfield.at_initialisation(mlp(nn.Tanh, 200, 4, 1.2).double(), torch.randn(1, 200).double())
    assert found.steps[0].c is None
    assert found.steps[-1].log_chi_expected == pytest.approx(found.steps[-1].log_chi, abs=0.25)


def test_bad_arguments_are_named():
    model = mlp(nn.Tanh, 10, 2, 1.0)
    with pytest.raises(ValueError, match="probes=0"):
        meanfield.at_initialisation(model, torch.randn(2, 10), probes=0)
    with pytest.raises(ValueError, match="others has a network of 3 steps"):
        meanfield.at_initialisation(model, torch.randn(2, 10), others=[mlp(nn.Tanh, 10, 3, 1.0)])
