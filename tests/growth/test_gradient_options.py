from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import stabkit
from stabkit.errors import StabkitError, TraceError
from stabkit.growth import gradient_profile, gradient_profiles, parameter_gradients
from tests.growth.systems import DOUBLE, normal


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 2)).double()


def energy(output: Tensor) -> Tensor:
    return output.square().sum()


X = normal(5, 4, seed=1)


def test_parameter_gradients_are_those_of_backward():
    model = network()
    profile = gradient_profile(stabkit.trace(model, X), energy)
    assert all(p.grad is None for p in model.parameters())
    energy(model(X)).backward()
    assert profile.parameters is not None
    for name, parameter in model.named_parameters():
        assert math.isclose(profile.parameters.by_name[name], float(parameter.grad.norm()), rel_tol=1e-12)
    per_layer = [math.hypot(*[float(p.grad.norm()) for p in layer.parameters()]) for layer in model]
    torch.testing.assert_close(profile.parameters.norms, torch.tensor(per_layer, dtype=DOUBLE))
    assert profile.parameters.names[0] == ("0.weight", "0.bias")


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.mix = nn.Embedding(7, 4), nn.Linear(4, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.table(tokens)
        for _ in range(5):
            h = h + torch.tanh(self.mix(h))
        return h @ self.table.weight.T


def test_shared_parameters_have_a_gradient_at_each_use():
    torch.manual_seed(0)
    model, tokens = Tied().double(), torch.randint(0, 7, (2, 3))
    found = parameter_gradients(stabkit.trace(model, tokens), energy)
    assert found.names == (("mix.weight", "mix.bias"),) * 5 + (("table.weight",),)
    # the oracle: five copies of the layer, and a table of its own for the way out
    copies = [nn.Linear(4, 4).double() for _ in range(5)]
    for copy in copies:
        copy.load_state_dict(model.mix.state_dict())
    table = model.table.weight.detach().clone().requires_grad_()
    h = model.table(tokens).detach()
    for copy in copies:
        h = h + torch.tanh(copy(h))
    energy(h @ table.T).backward()
    expected = [math.hypot(*[float(p.grad.norm()) for p in copy.parameters()]) for copy in copies]
    expected.append(float(table.grad.norm()))
    torch.testing.assert_close(found.norms, torch.tensor(expected, dtype=DOUBLE), rtol=1e-10, atol=0)


def test_a_loss_may_have_any_name_but_must_be_one_function():
    flow = stabkit.trace(network(), X)

    def cotangent_energy(output: Tensor) -> Tensor:
        return energy(output)

    assert gradient_profile(flow, cotangent_energy).below is not None
    assert gradient_profile(flow).below is None
    with pytest.raises(TraceError, match=r"loss is a list; expected a callable.*gradient_profiles"):
        gradient_profile(flow, [energy])
    with pytest.raises(TraceError, match="loss is a str; expected a callable"):
        gradient_profile(flow, "mse")
    with pytest.raises(TypeError, match="flow is a Sequential; expected what stabkit"):
        gradient_profile(network(), energy)


@pytest.mark.parametrize("tied", [False, True])
def test_parameter_gradients_of_single_samples(tied):
    torch.manual_seed(0)
    model, x = (Tied().double(), torch.randint(0, 7, (3, 2))) if tied else (network(), X)
    found = parameter_gradients(stabkit.trace(model, x), energy, per_sample=True)
    for sample in range(len(x)):
        alone = parameter_gradients(stabkit.trace(model, x[sample : sample + 1]), energy)
        torch.testing.assert_close(found.sample_norms[:, sample], alone.norms, rtol=1e-10, atol=1e-14)
    assert parameter_gradients(stabkit.trace(model, x), energy).sample_norms is None
    with pytest.raises(TraceError, match="not a function"):
        parameter_gradients(stabkit.trace(model, x, target=lambda out: out), energy, per_sample=True)


def test_random_masks_are_drawn_again():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 2)).double()
    found = parameter_gradients(stabkit.trace(model, X, seed=3), energy)
    torch.manual_seed(3)
    energy(model(X)).backward()
    assert math.isclose(found.by_name["0.weight"], float(model[0].weight.grad.norm()), rel_tol=1e-12)


def test_shares_of_small_entries_are_counted_on_the_gradient_itself():
    model, loss = network(), lambda out: 1e-7 * energy(out)
    profile = gradient_profile(stabkit.trace(model, X), loss)
    x = X.clone().requires_grad_()
    grad = torch.autograd.grad(loss(model(x)), x)[0]
    assert profile.below is not None
    torch.testing.assert_close(profile.below["fp16"][0], (grad.abs() < 2.0**-24).double().mean(1))
    torch.testing.assert_close(profile.below["adam_eps"][0], (grad.abs() < 1e-8).double().mean(1))
    assert 0 < float(profile.below["fp16"][0].mean()) < 1
    assert profile.below["bf16"].max() == 0
    assert gradient_profile(stabkit.trace(model, X)).below is None


def test_growth_over_more_than_the_range_of_float32():
    model = nn.Sequential(*[nn.Linear(3, 3, bias=False) for _ in range(60)])
    for layer in model:
        layer.weight.data = 0.01 * torch.eye(3)
    profile = gradient_profile(stabkit.trace(model, torch.ones(1, 3)), torch.sum)
    torch.testing.assert_close(profile.log_growth, torch.full((60, 1), math.log(0.01), dtype=DOUBLE), rtol=0, atol=1e-6)
    assert profile.below is not None
    assert profile.below["bf16"][0].min() == 1


def test_relative_growth_ignores_the_units_of_the_states():
    class Rescaled(nn.Module):
        def __init__(self, units: float) -> None:
            super().__init__()
            self.units = units

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(x) * self.units
            return torch.tanh(h / self.units)

    plain, rescaled = (gradient_profile(stabkit.trace(Rescaled(u), X, depth="cuts")) for u in (1.0, 1e3))
    torch.testing.assert_close(plain.relative_growth.sum(0), rescaled.relative_growth.sum(0))
    ends = plain.state_norms[-1].log() - plain.state_norms[0].log()
    torch.testing.assert_close(plain.relative_growth.sum(0), plain.log_growth.sum(0) - ends)


def test_several_cotangents_are_those_of_single_calls_with_an_interval():
    flow = stabkit.trace(network(), X)
    together = gradient_profile(flow, probes=3, seed=5)
    single = [gradient_profile(flow, seed=5 + 1_000_003 * i) for i in range(3)]
    for i in range(3):
        torch.testing.assert_close(together.all_log_growth[i], single[i].log_growth, rtol=0, atol=1e-12)
    ends = together.gradient_norms[0].log() - together.gradient_norms[-1].log()
    torch.testing.assert_close(together.log_growth.sum(0), ends, rtol=0, atol=1e-12)
    low, high = together.interval()
    assert ((low < together.log_growth) & (together.log_growth < high)).all()
    with pytest.raises(ValueError, match="several random cotangents"):
        single[0].interval()


def test_several_losses_are_those_of_single_calls():
    flow = stabkit.trace(network(), X)
    losses = [energy, torch.sum]
    for together, loss in zip(gradient_profiles(flow, losses), losses, strict=True):
        alone = gradient_profile(flow, loss)
        torch.testing.assert_close(together.gradient_norms, alone.gradient_norms)
        assert together.loss == alone.loss


def test_the_whole_batch_has_one_norm():
    flow = stabkit.trace(network(), X)
    profile = gradient_profile(flow, energy, per_sample=False)
    samples = gradient_profile(flow, energy)
    torch.testing.assert_close(profile.gradient_norms[:, 0], samples.gradient_norms.norm(dim=1))
    ends = profile.gradient_norms[0].log() - profile.gradient_norms[-1].log()
    torch.testing.assert_close(profile.log_growth.sum(0), ends, rtol=0, atol=1e-12)
    assert profile.batch == 1


def test_gradients_over_time_are_those_of_backpropagation_through_it():
    W = normal(3, 3)
    flow = stabkit.iterate(lambda x: torch.tanh(x @ W), normal(2, 3, seed=2), 20)
    profile = gradient_profile(flow, energy)
    x = normal(2, 3, seed=2).requires_grad_()
    out = x
    for _ in range(20):
        out = torch.tanh(out @ W)
    torch.testing.assert_close(profile.gradient_norms[0], torch.autograd.grad(energy(out), x)[0].norm(dim=1))
    torch.testing.assert_close(profile.state_norms[-1], out.detach().norm(dim=1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"probes": 0}, "probes=0"),
        ({"loss": energy, "probes": 2}, "one gradient"),
        ({"parameters": True}, "which need a loss"),
    ],
)
def test_options_that_make_no_sense(arguments, message):
    with pytest.raises(StabkitError, match=message):
        gradient_profile(stabkit.trace(network(), X), **arguments)
