"""What vanishes over depth in a model that learns all the same is a fact, and so says the verdict."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import stabkit
from stabkit.diagnosis import examine
from stabkit.diagnosis.finding import serious


def plain(act: type[nn.Module], depth: int, width: int, given: int, made: int) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Linear(given, width), act()]
    for _ in range(depth - 1):
        layers += [nn.Linear(width, width), act()]
    return nn.Sequential(*layers, nn.Linear(width, made))


def drawn(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


POINTS = 2 * torch.rand(128, 2, generator=torch.Generator().manual_seed(1)) - 1


class Solution(nn.Module):
    """A field over time and place, with its first and second derivatives: of Burgers' equation."""

    def __init__(self, depth: int, width: int) -> None:
        super().__init__()
        self.net = plain(nn.Tanh, depth, width, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x if x.requires_grad else x.requires_grad_()
        u = self.net(x)
        (first,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first[:, 0].sum(), x, create_graph=True)
        return torch.cat([u, first, second], 1)


def burgers(out: Tensor) -> Tensor:
    u, ux, ut, uxx = out.unbind(1)[:4]
    begins = (u + torch.sin(math.pi * POINTS[:, 0])).pow(2).mean()
    return (ut + u * ux - 0.01 / math.pi * uxx).pow(2).mean() + begins


def test_a_deep_field_that_learns_its_equation_is_no_fault():
    found = examine(stabkit.trace(Solution(8, 20), POINTS.clone()), burgers)
    assert [finding for finding in found.findings if serious(finding)] == []
    (fact,) = [finding for finding in found.findings if finding.kind == "vanishing"]
    assert "of what the best constant output leaves" in fact.evidence
    assert fact.remedy.startswith("none is needed for these samples")
    assert fact.actions == ()
    assert found.verdict.name == "drift"
    assert "the model learns all the same" in found.verdict.summary
    assert found.verdict.growth < -math.log(1e3)


@pytest.mark.parametrize(("act", "depth"), [(nn.Sigmoid, 20), (nn.Tanh, 20), (nn.ReLU, 25), (nn.Sigmoid, 8)])
def test_plain_layers_that_do_not_learn_stay_a_fault(act: type[nn.Module], depth: int):
    x = drawn(64, 16)
    labels = (x @ drawn(16, 4, seed=4)).argmax(1)
    loss: Callable[[Tensor], Tensor] = lambda out: functional.cross_entropy(out, labels)  # noqa: E731
    found = examine(stabkit.trace(plain(act, depth, 32, 16, 4), x), loss)
    assert [(f.kind, f.severity) for f in found.findings if serious(f)] == [("vanishing", "critical")]
    assert found.verdict.name == "vanishing"


def test_without_a_loss_nothing_is_known_of_harm():
    found = examine(stabkit.trace(plain(nn.Sigmoid, 12, 32, 16, 4), drawn(16, 16)))
    assert "vanishing" in [f.kind for f in found.findings if serious(f)]


class Sine(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(30 * x)


def test_what_has_been_learnt_is_no_fault_whatever_more_steps_do_to_it():
    wave = torch.sin(6 * POINTS[:, :1])
    model = plain(Sine, 3, 32, 2, 1)  # in the units of sines that turn fast, weights are small
    with torch.no_grad():
        model[0].weight.uniform_(-0.5, 0.5)
        for layer in (model[2], model[4], model[6]):
            layer.weight.uniform_(-math.sqrt(6 / 32) / 30, math.sqrt(6 / 32) / 30)
    optimizer = torch.optim.Adam(model.parameters(), 3e-4)

    def loss(out: Tensor) -> Tensor:
        return functional.mse_loss(out, wave)

    for _ in range(200):
        optimizer.zero_grad()
        loss(model(POINTS)).backward()
        optimizer.step()
    found = examine(stabkit.trace(model, POINTS, check=False), loss)
    assert [finding for finding in found.findings if serious(finding)] == []
