"""Features of very different sizes, or far from zero, keep the first layer from learning; standardised ones do not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import stabkit
from stabkit.diagnosis.finding import Finding

Z = torch.randn(64, 4, generator=torch.Generator().manual_seed(1))
TARGETS = torch.tanh(Z @ torch.randn(4, 1, generator=torch.Generator().manual_seed(2)))


def network(size: int = 4, first: tuple[nn.Module, ...] = (), act: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*first, nn.Linear(size, 32), act(), nn.Linear(32, 32), act(), nn.Linear(32, 1))


def found(model: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor] | None = None) -> list[Finding]:
    by = loss or (lambda out: functional.mse_loss(out, TARGETS))
    return [f for f in stabkit.diagnose(stabkit.trace(model, x), by) if f.kind == "input_scale"]


FAR: dict[str, tuple[Tensor, str]] = {
    "money, age and ratios": (Z * torch.tensor([1e5, 15.0, 1e-2, 1.0]) + torch.tensor([5e4, 40.0, 0.05, 0.0]), "0: "),
    "years": (torch.cat([2005 + 8 * Z[:, :1], Z[:, 1:]], 1), "0: 2.01e+03 +- 8"),
    "seconds since 1970": (torch.cat([1.7e9 + 3e5 * Z[:, :1], Z[:, 1:]], 1), "0: 1.7e+09 +- "),
    "coordinates of one town": (torch.cat([48 + 0.05 * Z[:, :1], 11 + 0.05 * Z[:, 1:2], Z[:, 2:]], 1), "0: 48 +- 0.05"),
}


@pytest.mark.parametrize("name", FAR)
def test_features_of_other_sizes_are_told_with_what_standardising_brings(name: str):
    x, feature = FAR[name]
    (told,) = found(network(), x)
    assert told.severity == "warning"
    assert feature in told.evidence
    assert told.numbers["standardised"] < 0.25 * float(TARGETS.square().mean()) * 2
    assert told.numbers["plain"] > 2 * told.numbers["standardised"]
    assert "the curvature of the first layer along each goes with the square of its size" in told.evidence
    assert not found(network(), (x - x.mean(0)) / x.std(0))


@pytest.mark.parametrize("name", FAR)
def test_where_they_saturate_the_first_activation_that_is_said_by_feature(name: str):
    x, feature = FAR[name]
    flow = stabkit.trace(network(act=nn.Tanh), x)
    said = stabkit.diagnose(flow, lambda out: functional.mse_loss(out, TARGETS))
    (told,) = [f for f in said if f.severity == "warning"]
    assert told.kind == "saturated"
    assert feature in told.evidence
    assert "every feature" in told.remedy
    assert not told.actions


NEAR: dict[str, tuple[nn.Module, Tensor]] = {
    "standard normal": (network(), Z),
    "a norm that standardises": (network(first=(nn.BatchNorm1d(4),)), FAR["years"][0]),
    "shares": (network(), Z.sigmoid()),
    "sizes that differ a little": (network(), Z * torch.tensor([3.0, 1.0, 0.5, 1.0])),
}


@pytest.mark.parametrize("name", NEAR)
def test_features_that_are_learnt_from_raise_nothing(name: str):
    model, x = NEAR[name]
    assert not found(model, x)


def test_labels_that_nothing_tells_are_no_fault_of_the_input():
    noise = torch.randn(64, 1, generator=torch.Generator().manual_seed(3))
    constant = FAR["years"][0][:, :1].round()
    assert not found(network(1), constant, lambda out: functional.mse_loss(out, noise))


class Derived(nn.Module):
    """A function of a coordinate and its derivative by that."""

    def __init__(self) -> None:
        super().__init__()
        self.f = network(1)

    def forward(self, t: Tensor) -> Tensor:
        t = t if t.requires_grad else t.requires_grad_()
        u = self.f(t)
        return torch.autograd.grad(u.sum(), t, create_graph=True)[0] + u


def test_coordinates_that_derivatives_are_taken_by_stay_as_they_are():
    t = torch.linspace(1990, 2020, 64)[:, None]
    assert not found(Derived(), t, lambda out: out.square().mean())


def test_what_goes_wrong_in_the_loss_is_not_taken_for_a_model_that_refuses(monkeypatch):
    """Only what a pass of the model on other inputs raises says that it takes no others."""
    monkeypatch.setattr("stabkit.diagnosis.inputs.feature_scales.short_training", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        found(network(), FAR["years"][0])


def test_columns_that_are_indices_or_masks_stay_as_they_are():
    class Looking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.f = nn.Embedding(3000, 4), network()

        def forward(self, x: Tensor) -> Tensor:
            return self.f(self.embed(x[:, 0].long()) + x[:, 1:])

    x = torch.cat([torch.arange(2000.0, 2064.0)[:, None], Z], 1)
    assert not found(Looking(), x)


STEP = torch.randint(0, 5000, (64,), generator=torch.Generator().manual_seed(4))


class Joined(nn.Module):
    """Features of size 1 and a number of a side input, joined before the first matrix."""

    def __init__(self, made: Callable[[Tensor], Tensor], first: tuple[nn.Module, ...] = ()) -> None:
        super().__init__()
        self.made, self.f = made, network(5, first)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.f(torch.cat([x, self.made(t).reshape(-1, 1)], 1))


def beside(made: Callable[[Tensor], Tensor], t: Tensor, targets: Tensor = TARGETS, *first: nn.Module) -> list[Finding]:
    flow = stabkit.trace(Joined(made, first), Z, t)
    said = stabkit.diagnose(flow, lambda out: functional.mse_loss(out, targets))
    return [f for f in said if f.kind == "input_scale"]


SIDE: dict[str, tuple[Callable[[Tensor], Tensor], Tensor, Callable[[Tensor], Tensor]]] = {
    "numbers of steps": (Tensor.float, STEP, lambda t: t / 5000),
    "years": (Tensor.float, 1950 + STEP // 100, lambda t: (t - 1975) / 15),
    "identities": (lambda t: t.to(torch.float32) + 1, STEP * 20, lambda t: (t + 1).log() / 8),
}


@pytest.mark.parametrize("name", SIDE)
def test_a_side_input_of_another_size_is_told_by_name(name: str):
    raw, t, small = SIDE[name]
    (told,) = beside(raw, t)
    assert told.module_path == "f.0"
    assert "feature 4 comes from '1'" in told.evidence
    assert f"divide by {float(t.float().std(correction=0)):.3g}" in told.remedy
    assert "or embed it" in told.remedy
    assert not beside(small, t)
    assert not beside(raw, t, TARGETS, nn.BatchNorm1d(5))


def test_noise_that_is_learnt_by_heart_is_no_fault_of_a_side_input():
    assert not beside(Tensor.float, STEP, torch.randn(64, 1, generator=torch.Generator().manual_seed(3)))
    assert not beside(Tensor.float, STEP, torch.randn(64, 1, generator=torch.Generator().manual_seed(6)))


def test_noise_beside_what_is_learnt_hides_no_side_input():
    noise = 0.4 * torch.randn(64, 1, generator=torch.Generator().manual_seed(3))
    assert beside(Tensor.float, STEP, TARGETS + noise)
