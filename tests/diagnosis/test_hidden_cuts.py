"""A cut that another way to the loss hides is found; what is taken off the graph on purpose is none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Independent, Laplace, LogNormal, Normal
from torch.nn import functional

import stabkit
from stabkit.diagnosis import Finding, examine, treat
from stabkit.diagnosis.finding import serious


def inputs(*shape: int) -> Tensor:
    return torch.randn(*(shape or (32, 6)), generator=torch.Generator().manual_seed(1))


X = inputs()


class Latent(nn.Module):
    """An encoder, a code that is drawn, a decoder."""

    def __init__(self, draw: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enc, self.mu, self.width = nn.Sequential(nn.Linear(6, 16), nn.Tanh()), nn.Linear(16, 3), nn.Linear(16, 3)
        self.dec, self.draw = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 6)), draw

    def forward(self, x: Tensor) -> Any:
        h = self.enc(x)
        mu, width = self.mu(h), functional.softplus(self.width(h))
        z = self.draw(mu, width)
        return self.dec(z), mu, width, z


def evidence_bound(out: Any) -> Tensor:
    made, mu, width, _ = out
    return (made - X).square().sum(1).mean() + 0.01 * (mu.square() + width.square() - width.log()).sum(1).mean()


def by_score(out: Any) -> Tensor:
    """REINFORCE: the draw has no other gradient, and needs none."""
    made, mu, width, z = out
    each = (made - X).square().sum(1)
    return each.mean() + (each.detach() * Normal(mu, width).log_prob(z).sum(1)).mean() + 0.01 * mu.square().mean()


def said(model: nn.Module, x: Tensor, loss: Any) -> list[Finding]:
    return [f for f in examine(stabkit.trace(model, x), loss).findings if f.kind == "no_gradient"]


DRAWS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "Laplace.sample()": lambda mu, width: Laplace(mu, width).sample(),
    "Normal.sample()": lambda mu, width: Independent(Normal(mu, width), 1).sample(),
    "LogNormal.sample()": lambda mu, width: LogNormal(mu, width).sample().clamp(max=5.0),
}


@pytest.mark.parametrize("name", DRAWS)
def test_a_draw_that_could_pass_a_gradient_and_does_not_is_told_although_the_encoder_gets_another(name: str):
    (found,) = said(Latent(DRAWS[name]), X, evidence_bound)
    assert (found.severity, found.numbers["parameters"]) == ("warning", 6)
    assert f"the gradient stops at {name}" in found.evidence
    assert "enc.0.weight" in found.evidence
    assert "dec" not in found.evidence.split("(enc")[1].split(")")[0]
    assert "rsample()" in found.remedy
    assert Normal.sample.__qualname__ == "Normal.sample"


@pytest.mark.parametrize(
    ("draw", "loss"),
    [
        (lambda mu, width: Normal(mu, width).rsample(), evidence_bound),
        (lambda mu, width: Normal(mu, width).sample(), by_score),
        (lambda mu, width: mu + (Bernoulli(logits=mu).sample() - mu).detach(), evidence_bound),
        (lambda mu, width: Bernoulli(logits=mu).sample(), evidence_bound),  # has no rsample
        (lambda mu, width: mu.detach(), evidence_bound),  # as one asked for
        (lambda mu, width: mu + 0.1 * Normal(torch.zeros(3), torch.ones(3)).sample(), evidence_bound),
    ],
)
def test_draws_and_cuts_that_are_meant_raise_nothing(draw, loss):
    assert said(Latent(draw), X, loss) == []


def test_a_draw_that_is_the_only_way_is_told_with_its_own_name():
    model = Latent(DRAWS["Normal.sample()"])
    report = stabkit.analyze(model, X, loss=lambda out: (out[0] - X).square().mean(), spectrum="none")
    (found,) = (f for f in report.findings if f.kind == "no_gradient")
    assert (found.severity, found.numbers["parameters"]) == ("warning", 6)
    assert "Normal.sample()" in found.evidence
    assert "rsample()" in found.remedy


@pytest.mark.parametrize("alone", [False, True])
def test_torch_normal_passes_back_zeros_and_no_layer_is_blamed_for_it(alone: bool):
    def loss(out: Any) -> Tensor:
        return (out[0] - X).square().mean() if alone else evidence_bound(out)

    model = Latent(torch.normal)
    found = [f for f in stabkit.analyze(model, X, loss=loss, spectrum="none").findings if serious(f)]
    assert [(f.kind, f.module_path, f.numbers["parameters"]) for f in found] == [("no_gradient", "mu", 6)]
    assert ("get none" if alone else "learn from the rest of the loss alone") in found[0].evidence
    assert "randn_like" in found[0].remedy
    right = Latent(lambda mu, width: mu + width * torch.randn_like(width))
    assert not [f for f in stabkit.analyze(right, X, loss=loss, spectrum="none").findings if f.kind == "no_gradient"]


class Physics(nn.Module):
    """A field with derivatives of itself, on points of its own or on those that it is given."""

    def __init__(self, kept: bool, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.kept, self.how = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1)), kept, how

    def forward(self, x: Tensor) -> Any:
        if self.how == "detached":
            x = x.detach().requires_grad_(True)
        u = self.net(x)
        (slope,) = torch.autograd.grad(u.sum(), x, create_graph=self.kept, retain_graph=True)
        if self.how == "energy and force":
            return {"energy": u.sum(), "force": -slope}
        return u, slope


POINTS = torch.linspace(0, 1, 32).unsqueeze(1)
EQUATIONS: dict[str, Callable[[Any], Tensor]] = {
    "detached": lambda out: (out[1] - 1).square().mean() + out[0][0].square().sum(),
    "given": lambda out: (out[1] + out[0]).square().mean(),
    "energy and force": lambda out: (out["energy"] - 3).square() / 32 + 10 * (out["force"] - 2).square().mean(),
}


@pytest.mark.parametrize("how", EQUATIONS)
def test_a_derivative_without_a_graph_is_named_where_it_is_taken_and_treat_says_so_too(how: str):
    model = Physics(False, how)
    report = stabkit.analyze(model, POINTS, loss=EQUATIONS[how], spectrum="none")
    (found,) = (f for f in report.findings if f.kind == "no_gradient")
    assert (found.severity, "create_graph=True" in found.remedy) == ("warning", True)
    assert "the gradient stops at autograd.grad without create_graph (test_hidden_cuts.py:" in found.evidence
    assert found.evidence in str(treat(model, POINTS, loss=EQUATIONS[how]))
    assert not stabkit.analyze(Physics(True, how), POINTS, loss=EQUATIONS[how]).findings


def test_derivatives_that_the_loss_does_not_ask_for_or_that_are_steps_of_a_first_order_method_raise_nothing():
    assert said(Physics(False, "energy and force"), POINTS, lambda out: (out["energy"] - 3).square()) == []

    class FirstOrder(nn.Module):
        """A step of an inner problem, without second derivatives."""

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.body, self.head = nn.Sequential(nn.Linear(6, 8), nn.Tanh()), nn.Linear(8, 1)

        def forward(self, x: Tensor) -> Tensor:
            h = self.body(x)
            (slope,) = torch.autograd.grad(self.head(h).square().sum(), h, retain_graph=True)
            return self.head(h - 0.1 * slope)

    assert said(FirstOrder(), X, lambda out: (out - X[:, :1]).square().mean()) == []
