"""Exponential integrators: the linear part carried on exactly, with one rate or with a rate for every channel."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from stabkit.identification import Identification, identify
from stabkit.tracing import trace

H, WIDTH = 0.1, 6


def phi(k: int, z: Tensor) -> Tensor:
    return sum(z**j / float(math.factorial(j + k)) for j in range(25))


class Exponential(nn.Module):
    """Steps of x' = f(x) - lambda x."""

    def __init__(self, method: str, rate: Tensor) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(WIDTH, 12), nn.Tanh(), nn.Linear(12, WIDTH))
        self.method, self.rate = method, nn.Parameter(rate)

    def forward(self, x: Tensor) -> Tensor:
        z = -self.rate * H
        for _ in range(3):
            x = getattr(self, self.method)(x, z, z.exp(), (z / 2).exp())
        return x

    def euler(self, x: Tensor, z: Tensor, E: Tensor, e: Tensor) -> Tensor:
        return E * x + H * phi(1, z) * self.net(x)

    def etdrk2(self, x: Tensor, z: Tensor, E: Tensor, e: Tensor) -> Tensor:
        k = self.net(x)
        ahead = E * x + H * phi(1, z) * k
        return ahead + H * phi(2, z) * (self.net(ahead) - k)

    def etdrk4(self, x: Tensor, z: Tensor, E: Tensor, e: Tensor) -> Tensor:
        f, half = self.net, H / 2 * phi(1, z / 2)
        k1 = f(x)
        a = e * x + half * k1
        k2 = f(a)
        k3 = f(e * x + half * k2)
        k4 = f(e * a + half * (2 * k3 - k1))
        middle, last = 2 * phi(2, z) - 4 * phi(3, z), 4 * phi(3, z) - phi(2, z)
        return E * x + H * ((phi(1, z) - middle * 2 - last) * k1 + middle * (k2 + k3) + last * k4)

    def lawson4(self, x: Tensor, z: Tensor, E: Tensor, e: Tensor) -> Tensor:
        f = self.net
        k1 = f(x)
        k2 = f(e * (x + H / 2 * k1))
        k3 = f(e * x + H / 2 * k2)
        k4 = f(E * x + H * e * k3)
        return E * x + H / 6 * (E * k1 + 2 * e * (k2 + k3) + k4)

    def scaled(self, x: Tensor, z: Tensor, E: Tensor, e: Tensor) -> Tensor:
        k = self.net(x)
        return E * x + H / 2 * (k + self.net(E * x + H * k))

    def leaky(self, x: Tensor, z: Tensor, E: Tensor, e: Tensor) -> Tensor:
        return E * x + (1 - E) * self.net(x)


def read(model: nn.Module) -> tuple[Identification, ...]:
    torch.manual_seed(0)
    return identify(trace(model.double(), torch.randn(2, WIDTH, dtype=torch.float64)), checks=False)


ONE, OWN = torch.tensor(0.5, dtype=torch.float64), torch.linspace(0.3, 1.2, WIDTH, dtype=torch.float64)


@pytest.mark.parametrize(("rate", "evidence"), [(ONE, "proven"), (OWN, "measured")])
@pytest.mark.parametrize(
    ("method", "name"),
    [("etdrk2", "ETDRK2 (expo"), ("etdrk4", "ETDRK4 (expo"), ("lawson4", "rk4 with integrating factor (Lawson")],
)
def test_stages_tell_by_which_functions_the_linear_part_is_carried_on(method, name, rate, evidence):
    found = read(Exponential(method, rate.clone()))
    assert all(r.name.startswith(name) for r in found)
    assert [r.evidence for r in found] == [evidence] * 3
    assert [r.step_size for r in found] == pytest.approx([H] * 3)


def test_one_step_size_for_many_rates_is_exponential_euler():
    found = read(Exponential("euler", OWN.clone()))
    a = (-OWN * H).exp()
    assert {(r.name, r.evidence) for r in found} == {
        (f"exponential Euler (a = {a.min():.3g} to {a.max():.3g})", "measured")
    }
    assert [r.step_size for r in found] == pytest.approx([H] * 3)


@pytest.mark.parametrize(("method", "rate"), [("euler", ONE), ("leaky", OWN)])
def test_one_stage_alone_tells_no_exponential(method, rate):
    assert all(r.name.startswith("damped Euler") for r in read(Exponential(method, rate.clone())))


@pytest.mark.parametrize("rate", [ONE, OWN])
def test_a_scaled_skip_before_both_stages_is_no_exponential_method(rate):
    assert {r.name for r in read(Exponential("scaled", rate.clone()))} == {"unnamed"}


class SubSteps(nn.Module):
    """One field, a step of Heun and a shorter one, and maybe one of Euler."""

    def __init__(self, sizes: tuple[float, ...], euler: float = 0.0) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(WIDTH, 12), nn.Tanh(), nn.Linear(12, WIDTH))
        self.sizes, self.euler = sizes, euler

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.euler * self.net(x) if self.euler else x
        for h in self.sizes:
            k = self.net(x)
            x = x + h / 2 * (k + self.net(x + h * k))
        return x


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (SubSteps((0.1, 0.05)), "2 steps of heun2 (h = 0.1, 0.05)"),
        (SubSteps((0.1, 0.1)), "2 steps of heun2"),
        (SubSteps((0.05,), 0.1), "forward Euler and then heun2 (h = 0.1, 0.05)"),
    ],
)
def test_steps_of_several_sizes_in_one_block(model, name):
    torch.manual_seed(0)
    (found,) = identify(trace(model, torch.randn(2, WIDTH), depth=[""]), checks=False)
    assert (found.name, found.evidence) == (name, "proven")


class NearlyDefective(nn.Module):
    """A skip by a matrix whose eigenvectors are nearly one, and a branch by a matrix that has nothing to do with it."""

    def __init__(self) -> None:
        super().__init__()
        self.skip, self.f, self.out = nn.Linear(6, 6, bias=False), nn.Linear(6, 6), nn.Linear(6, 6, bias=False)
        with torch.no_grad():
            self.skip.weight.copy_(torch.diag(torch.linspace(0.85, 0.95, 6)) + torch.diag(torch.full((5,), 0.3), 1))

    def forward(self, x):
        return self.skip(x) + self.out(torch.tanh(self.f(x)))


def test_matrices_that_no_basis_tells_apart_are_no_exponential():
    torch.manual_seed(0)
    model = nn.Sequential(*[NearlyDefective() for _ in range(3)])
    found = identify(trace(model, torch.randn(3, 6)))
    assert not [r.name for r in found if "exponential" in r.name]
