"""Activations that code writes out belong to a field or a plain layer; what is carried on is a step of an equation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from stabkit.identification import identify
from stabkit.tracing import trace

C = 4


def snake(x: Tensor, alpha: Tensor) -> Tensor:
    """As the descript audio codec has it."""
    shape = x.shape
    x = x.reshape(shape[0], shape[1], -1)
    x = x + (alpha + 1e-9).reciprocal() * torch.sin(alpha * x).pow(2)
    return x.reshape(shape)


class Snake(nn.Module):
    """Sine activation with a rate of its own for every channel."""

    def __init__(self):
        super().__init__()
        self.alpha = nn.Parameter(torch.rand(1, C, 1) + 0.5)

    def forward(self, x):
        return snake(x, self.alpha)


class SnakeBeta(nn.Module):
    """As BigVGAN has it."""

    def __init__(self):
        super().__init__()
        self.alpha, self.beta = nn.Parameter(torch.zeros(C)), nn.Parameter(torch.zeros(C))

    def forward(self, x):
        alpha, beta = (torch.exp(p)[None, :, None] for p in (self.alpha, self.beta))
        return x + (1.0 / (beta + 1e-9)) * torch.sin(x * alpha) ** 2


class Cosine(nn.Module):
    """The same function by the double angle."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.rand(1, C, 1) + 0.5)

    def forward(self, x):
        return x + (1 - torch.cos(2 * self.a * x)) / (2 * self.a)


class Swish(nn.Module):
    """x sigmoid(b x)."""

    def __init__(self):
        super().__init__()
        self.b = nn.Parameter(torch.tensor(1.2))

    def forward(self, x):
        return x * torch.sigmoid(self.b * x)


class Gelu(nn.Module):
    """By the hyperbolic tangent, with a learned number."""

    def __init__(self):
        super().__init__()
        self.k = nn.Parameter(torch.tensor(0.044715))

    def forward(self, x):
        return 0.5 * x * (1 + torch.tanh(0.79788 * (x + self.k * torch.pow(x, 3))))


class Leaning(nn.Module):
    """x + relu(x)."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.tensor(0.5))

    def forward(self, x):
        return x + self.a * torch.relu(x)


ACTIVATIONS = (Snake, SnakeBeta, Cosine, Swish, Gelu, Leaning)


class Unit(nn.Module):
    """A residual unit with two such activations."""

    def __init__(self, act):
        super().__init__()
        self.block = nn.Sequential(act(), nn.Conv1d(C, C, 3, padding=1), act(), nn.Conv1d(C, C, 1))

    def forward(self, x):
        return x + self.block(x)


def readings(model, x, **how):
    torch.manual_seed(0)
    return [(r.name, r.evidence) for r in identify(trace(model.double(), x.double(), **how), checks=False)]


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_inside_of_a_residual_unit_it_belongs_to_the_field(act):
    model = nn.Sequential(nn.Conv1d(2, C, 1), Unit(act), Unit(act), Unit(act), act(), nn.Conv1d(C, 1, 1))
    found = readings(model, torch.randn(2, 2, 5))
    assert found[1:4] == [("forward Euler", "proven")] * 3
    assert {name for name, _ in found[4:]} <= {"plain", "transition"}


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("depth", ["auto", "modules"])
def test_between_layers_it_belongs_to_a_plain_layer(act, depth):
    layers = [layer for _ in range(3) for layer in (nn.Conv1d(C, C, 3, padding=1), act())]
    found = readings(nn.Sequential(*layers, nn.Conv1d(C, C, 1)), torch.randn(2, C, 5), depth=depth)
    assert set(found) == {("plain", "proven")}


def test_as_a_function_it_makes_no_residual_of_a_layer():
    class Layers(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(C, C) for _ in range(4))

        def forward(self, x):
            for layer in self.layers[:-1]:
                x = layer(x)
                x = x + torch.sin(3 * x) ** 2 / 3
            return self.layers[-1](x)

    flow = trace(Layers().double(), torch.randn(2, C).double())
    assert {(r.name, r.evidence, r.notes) for r in identify(flow)} == {("plain", "proven", ())}


class Reaction(nn.Module):
    """Diffusion and reaction, one after the other."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(C, C)

    def forward(self, x):
        x = x + 0.1 * torch.tanh(self.mix(x))
        return x - 0.1 * torch.sin(x)


@pytest.mark.parametrize("head", [True, False])
def test_a_reaction_that_is_carried_on_is_a_step_of_a_splitting(head):
    layers = [Reaction() for _ in range(3)] + [nn.Linear(C, 2)] * head
    found = readings(nn.Sequential(*layers), torch.randn(2, C))
    assert {name for name, _ in found[:3]} == {"Lie splitting (2 Euler steps)"}


class Pendulum(nn.Module):
    """One equation for each entry, several steps of it."""

    def __init__(self):
        super().__init__()
        self.first, self.last, self.h = nn.Linear(C, C), nn.Linear(C, 2), nn.Parameter(torch.tensor(0.1))

    def forward(self, x):
        x = self.first(x)
        for _ in range(4):
            x = x + self.h * torch.sin(x)
        return self.last(x)


def test_steps_of_an_equation_for_each_entry_are_no_activation():
    flow = trace(Pendulum().double(), torch.randn(2, C).double())
    assert not flow.recorded.graph.bends
