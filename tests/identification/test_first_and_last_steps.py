"""Methods of several states from their first step to their last: each counts, also where states are missing."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from stabkit import identify, trace
from stabkit.identification import Identification

WIDTH, LAYERS = 6, 5
Step = Callable[[nn.Module, Tensor, Tensor, int], tuple[Tensor, Tensor]]


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 9), nn.Tanh(), nn.Linear(9, WIDTH))


class Stack(nn.Module):
    """A stem, layers that take two states each, and a head on what is left of them."""

    def __init__(self, step: Step, begin: Callable[[Tensor], Tensor], end: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head = nn.Linear(3, WIDTH), nn.Linear(WIDTH, 2)
        self.f = nn.ModuleList(mlp() for _ in range(LAYERS))
        self.g = nn.ModuleList(mlp() for _ in range(LAYERS))
        self.k = nn.Parameter(torch.linspace(0.1, 0.4, LAYERS))
        self.step, self.begin, self.end = step, begin, end

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.begin(x)
        for i in range(LAYERS):
            x, y = self.step(self, x, y, i)
        return self.head(self.end(x, y))


def momentum(m: nn.Module, x: Tensor, v: Tensor, i: int) -> tuple[Tensor, Tensor]:
    v = 0.9 * v + 0.1 * m.f[i](x)
    return x + v, v


def nesterov(m: nn.Module, x: Tensor, v: Tensor, i: int) -> tuple[Tensor, Tensor]:
    v = 0.8 * v + m.f[i](x + 0.8 * v)
    return x + v, v


def look_ahead(m: nn.Module, x: Tensor, v: Tensor, i: int) -> tuple[Tensor, Tensor]:
    """Nesterov's momentum with a look-ahead that is another number than what the velocity is kept with."""
    v = 0.8 * v + 0.6 * m.f[i](x + 0.5 * v)
    return x + v, v


def looked_ahead(m: nn.Module, x: Tensor, v: Tensor, i: int) -> tuple[Tensor, Tensor]:
    x = x + v
    return x, 0.8 * v + 0.6 * m.f[i](x + 0.4 * v)


def leapfrog(m: nn.Module, x: Tensor, old: Tensor, i: int) -> tuple[Tensor, Tensor]:
    return 2 * x - old + 0.09 * m.f[i](x), x


def two_step(m: nn.Module, x: Tensor, old: Tensor, i: int) -> tuple[Tensor, Tensor]:
    return (1 - m.k[i]) * x + m.k[i] * old + m.f[i](x), x


def reversible(m: nn.Module, x: Tensor, y: Tensor, i: int) -> tuple[Tensor, Tensor]:
    x = x + m.f[i](y)
    return x, y + m.g[i](x)


def oscillator(m: nn.Module, x: Tensor, v: Tensor, i: int) -> tuple[Tensor, Tensor]:
    v = v + 0.5 * (m.f[i](x) - 0.8 * v - 0.9 * x)
    return x + 0.5 * v, v


def same(x: Tensor) -> Tensor:
    return x


def position(x: Tensor, y: Tensor) -> Tensor:
    return x


def mean(x: Tensor, y: Tensor) -> Tensor:
    return (x + y) / 2


def read(model: nn.Module, *inputs: Tensor) -> list[Identification]:
    torch.manual_seed(0)
    found = identify(trace(model.double(), *(x.double() for x in inputs)), checks=False)
    return [r for r in found if r.name not in ("transition", "plain", "join")]


@pytest.mark.parametrize(
    ("step", "begin", "end", "name"),
    [
        (momentum, torch.zeros_like, position, "momentum (gamma = 0.9)"),
        (momentum, same, position, "momentum (gamma = 0.9)"),
        (momentum, torch.clone, mean, "momentum (gamma = 0.9)"),
        (nesterov, torch.zeros_like, position, "Nesterov momentum (gamma = 0.8)"),
        (look_ahead, torch.zeros_like, position, "Nesterov momentum (gamma = 0.8, look-ahead 0.5)"),
        (look_ahead, torch.tanh, position, "Nesterov momentum (gamma = 0.8, look-ahead 0.5)"),
        (leapfrog, same, position, "second_order_leapfrog"),
        (two_step, same, position, "two-step (LM-ResNet"),
        (reversible, same, mean, "reversible (two-stream symplectic Euler)"),
        (oscillator, same, position, "damped oscillator, symplectic Euler (coRNN)"),
    ],
)
def test_every_step_of_a_method_of_two_states_is_named(step, begin, end, name):
    found = read(Stack(step, begin, end), torch.randn(4, 3))
    assert [r.name.startswith(name) for r in found] == [True] * LAYERS, [r.name for r in found]
    assert {r.evidence for r in found} == {"proven"}
    assert "the first step of its kind" in found[0].notes[0]
    assert found[0].method is None  # it leads from one state to two


def test_a_velocity_that_moves_first_looks_ahead_as_well():
    found = read(Stack(looked_ahead, torch.tanh, mean), torch.randn(4, 3))
    names = [r.name for r in found]
    assert names.count("Nesterov momentum (gamma = 0.8, look-ahead 0.4)") >= LAYERS - 1, names
    assert not any("oscillator" in name for name in names)


def test_a_number_that_every_layer_has_of_its_own_is_not_told_of_the_first():
    first, second, *_ = read(Stack(two_step, same, position), torch.randn(4, 3))
    assert first.name == "two-step (LM-ResNet)"
    assert re.fullmatch(r"two-step \(LM-ResNet, k = 0\.\d+\)", second.name)


def other(m: nn.Module, x: Tensor, v: Tensor, i: int) -> tuple[Tensor, Tensor]:
    """Momentum behind a layer of another kind."""
    return (x + 0.1 * m.f[i](x), 0.3 * m.g[i](x)) if i == 0 else momentum(m, x, v, i)


def larger(m: nn.Module, x: Tensor, v: Tensor, i: int) -> tuple[Tensor, Tensor]:
    """Momentum of one field, which begins with a step of another size."""
    v = (0.9 * v if i else 0.0) + (0.1 if i else 0.7) * m.f[0](x)
    return x + v, v


@pytest.mark.parametrize("step", [other, larger])
def test_what_does_something_else_is_no_first_step(step):
    found = read(Stack(step, torch.zeros_like, position), torch.randn(4, 3))
    assert not found[0].name.startswith("momentum")
    assert sum(r.name.startswith("momentum") for r in found) == LAYERS - 1


class Oscillators(nn.Module):
    """A recurrent network whose position and velocity begin at zeros."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.read, self.out = nn.Linear(3 + 2 * WIDTH, WIDTH), nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = v = torch.zeros(x.size(1), WIDTH, dtype=x.dtype)
        for now in x:
            v = v + 0.1 * (torch.tanh(self.read(torch.cat([now, v, y], 1))) - y - 1.2 * v)
            y = y + 0.1 * v
        return self.out(y)


def test_the_first_time_step_from_zeros_is_counted():
    found = read(Oscillators(), torch.randn(5, 4, 3))
    assert [r.name for r in found] == ["damped oscillator, symplectic Euler (coRNN)"] * 5


class Streams(nn.Module):
    """Hyper-connections: one stream becomes three, and their sum is read at the end."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head = nn.Linear(3, WIDTH), nn.Linear(WIDTH, 2)
        self.f = nn.ModuleList(mlp() for _ in range(LAYERS))
        self.mix = nn.Parameter(torch.eye(3) + 0.1 * torch.randn(LAYERS, 3, 3))
        self.give = nn.Parameter(torch.rand(LAYERS, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)[:, :, None].repeat(1, 1, 3, 1)
        for f, mix, give in zip(self.f, self.mix, self.give, strict=True):
            x = torch.einsum("ij,btjd->btid", mix, x) + give[:, None] * f(x.mean(2))[:, :, None]
        return self.head(x.sum(2))


def test_the_last_step_of_streams_is_read_before_their_sum():
    found = [r for r in read(Streams(), torch.randn(2, 4, 3)) if r.name != "not a step"]
    assert [r.name for r in found] == ["general linear method of 3 streams"] * LAYERS


class Verlet(nn.Module):
    """Kick, drift, kick from rest; the last kick moves what nobody reads."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.force = mlp()

    def forward(self, q: Tensor) -> Tensor:
        p = torch.zeros_like(q)
        for _ in range(LAYERS):
            p = p + 0.05 * self.force(q)
            q = q + 0.1 * p
            p = p + 0.05 * self.force(q)
        return q


def test_half_a_kick_at_the_beginning_is_a_part_of_a_step():
    first, *steps = read(Verlet(), torch.randn(4, WIDTH))
    assert (first.name, first.step_size) == ("additive coupling (half of a reversible step)", pytest.approx(0.05))
    assert len(steps) == LAYERS - 1
    assert all("verlet" in r.name for r in steps)


def summed(m: nn.Module, x: Tensor, total: Tensor, i: int) -> tuple[Tensor, Tensor]:
    x = x + m.f[i](x)
    return x, total + m.g[i](x)


def test_a_sum_beside_a_state_is_no_half_of_a_system():
    found = read(Stack(summed, torch.zeros_like, lambda x, total: total), torch.randn(4, 3))
    assert not any("coupling" in r.name or "reversible" in r.name for r in found)


class Shrunk(nn.Module):
    """Unrolled proximal gradient steps from zero, each with a threshold of its own, or all with one."""

    def __init__(self, how: str, thresholds: list[float]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how, self.numbers = how, thresholds
        self.A = nn.Parameter(torch.randn(8, 12) / 3, requires_grad=False)
        self.W = nn.ParameterList([0.1 * self.A.T + 0.02 * torch.randn(12, 8) for _ in thresholds])
        self.theta = nn.ParameterList([torch.full((1,), t) for t in thresholds])

    def forward(self, b: Tensor) -> Tensor:
        x = b.new_zeros(len(b), 12)
        for W, theta, number in zip(self.W, self.theta, self.numbers, strict=True):
            x = x + (b - x @ self.A.T) @ W.T
            x = x.sign() * torch.relu(x.abs() - theta) if self.how == "learned" else nn.functional.softshrink(x, number)
        return x


@pytest.mark.parametrize("thresholds", [[0.08, 0.088, 0.096, 0.104, 0.112], [0.02, 0.05, 0.05, 0.05, 0.05], [0.05] * 5])
@pytest.mark.parametrize("how", ["learned", "function"])
def test_a_threshold_that_is_told_of_a_step_is_that_of_the_step(how: str, thresholds: list[float]):
    found = identify(trace(Shrunk(how, thresholds), 2 * torch.randn(4, 8)), checks=False)
    told = {r.steps[0]: re.findall(r"t = ([\d.]+)", " ".join(r.notes)) for r in found}
    assert sum(map(len, told.values())) >= len(thresholds) - 2
    assert all(float(t) == pytest.approx(thresholds[step]) for step, ts in told.items() for t in ts)
