"""Methods that remember, as samplers and solvers write them: lists and queues of values, reflected states, delays."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import stabkit

from . import samplers as s

ROUNDS = 10
Forward = Callable[[nn.Module, Tensor], Tensor]


class Written(nn.Module):
    """A forward pass as a function of a network and the input."""

    def __init__(self, forward: Forward) -> None:
        super().__init__()
        self.net, self.written = s.Net(), forward

    def forward(self, x: Tensor) -> Tensor:
        return self.written(self.net, x)


def read(forward: Forward) -> list[stabkit.identification.Identification]:
    """The readings of the rounds, but for where the method begins and ends."""
    torch.manual_seed(0)
    flow = stabkit.trace(Written(forward).double(), torch.randn(3, s.WIDTH, dtype=torch.float64))
    return list(stabkit.identify(flow, checks=False))[1:-2]


def pndm(net: nn.Module, x: Tensor) -> Tensor:
    alpha, ets = torch.linspace(0.3, 0.95, ROUNDS + 2, dtype=x.dtype), list[Tensor]()
    for i in range(ROUNDS + 1):
        ets = [*ets[-3:], net(x, i / ROUNDS)]
        e = ets[-1]
        if len(ets) == 2:
            e = (3 * ets[-1] - ets[-2]) / 2
        elif len(ets) == 3:
            e = (23 * ets[-1] - 16 * ets[-2] + 5 * ets[-3]) / 12
        elif len(ets) == 4:
            e = (1 / 24) * (55 * ets[-1] - 59 * ets[-2] + 37 * ets[-3] - 9 * ets[-4])
        a, b = alpha[i], alpha[i + 1]
        x = (b / a) ** 0.5 * x - (b - a) * e / (a * (1 - b) ** 0.5 + (a * (1 - a) * b) ** 0.5)
    return x


def data_prediction(net: nn.Module, x: Tensor) -> Tensor:
    """DPM-Solver++ with lists of predictions, each linear in the state."""
    lam = torch.linspace(-2, 2, ROUNDS + 1, dtype=x.dtype)
    a, sigma = torch.sigmoid(2 * lam).sqrt(), torch.sigmoid(-2 * lam).sqrt()

    def data(x: Tensor, i: int) -> Tensor:
        return (x - sigma[i] * net(x, i / ROUNDS)) / a[i]

    kept = [data(x, 0)]
    x = sigma[1] / sigma[0] * x - a[1] * torch.expm1(lam[0] - lam[1]) * kept[0]
    kept.append(data(x, 1))
    for i in range(2, ROUNDS + 1):
        phi = torch.expm1(lam[i - 1] - lam[i])
        x = sigma[i] / sigma[i - 1] * x - a[i] * phi * kept[1] - 0.5 * a[i] * phi * (kept[1] - kept[0])
        kept[0] = kept[1]
        if i < ROUNDS:
            kept[1] = data(x, i)
    return x


def etd(order: int) -> Forward:
    z = -0.5 * s.H
    phi = [math.exp(z)]
    for k in range(3):
        phi.append((phi[-1] - 1 / math.factorial(k)) / z)
    weights = {
        1: (phi[1],),
        2: (phi[1] + phi[2], -phi[2]),
        3: (phi[1] + 1.5 * phi[2] + phi[3], -2 * phi[2] - 2 * phi[3], 0.5 * phi[2] + phi[3]),
    }

    def forward(net: nn.Module, x: Tensor) -> Tensor:
        before: deque[Tensor] = deque(maxlen=order)
        for _ in range(ROUNDS):
            before.appendleft(net(x, 0.0))
            x = phi[0] * x + s.H * sum(w * f for w, f in zip(weights[len(before)], before, strict=True))
        return x

    return forward


def reversible_heun(net: nn.Module, x: Tensor) -> Tensor:
    y, z, f = x, x, net(x, 0.0)
    for _ in range(ROUNDS):
        new = 2 * y - z + f * s.H
        f_new = net(new, 0.0)
        y, z, f = y + (f + f_new) * (0.5 * s.H), new, f_new
    return y


def reversible_heun_again(net: nn.Module, x: Tensor) -> Tensor:
    y = z = x
    for _ in range(ROUNDS):
        f = net(z, 0.0)
        z = 2 * y - z + s.H * f
        y = y + s.H / 2 * (f + net(z, 0.0))
    return y


def asynchronous_leapfrog(eta: float) -> Forward:
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        v = net(x, 0.0)
        for _ in range(ROUNDS):
            middle = x + v * s.H / 2
            v = v + 2 * eta * (net(middle, 0.0) - v)
            x = middle + v * s.H / 2
        return x

    return forward


def two_step_midpoint(net: nn.Module, x: Tensor) -> Tensor:
    old, x = x, x + s.H * net(x, 0.0)
    for _ in range(ROUNDS):
        old, x = x, old + 2 * s.H * net(x, 0.0)
    return x


def delayed(net: nn.Module, x: Tensor) -> Tensor:
    waiting: deque[Tensor] = deque([net(x, 0.0)] * 2)
    for _ in range(ROUNDS):
        waiting.append(net(x, 0.0))
        x = x + s.H * waiting.popleft()
    return x


class Delayed(nn.Module):
    """Blocks that read the state of some blocks before."""

    def __init__(self, delay: int, depth: int = 12) -> None:
        super().__init__()
        self.blocks, self.delay = nn.ModuleList(s.Net() for _ in range(depth)), delay

    def forward(self, x: Tensor) -> Tensor:
        states = [x]
        for i, block in enumerate(self.blocks):
            states.append(states[-1] + block(states[max(0, i - self.delay)], 0.0))
        return states[-1]


@pytest.mark.parametrize("delay", [1, 2])
def test_states_that_wait_in_a_queue_are_states_of_the_method(delay: int):
    torch.manual_seed(0)
    flow = stabkit.trace(Delayed(delay), torch.randn(3, s.WIDTH))
    found = stabkit.identify(flow, checks=False)
    shown = [r for r in found if r.name == f"delayed Euler (k = {delay})"]
    assert len(shown) >= 12 - 3 * delay
    assert {r.evidence for r in shown} == {"proven"}
    assert [r.step_size for r in shown] == pytest.approx([1.0] * len(shown))


READ = [
    (etd(2), f"exponential Adams-Bashforth, two steps (ETD2, a = {math.exp(-0.5 * s.H):.3g})", None),
    (etd(3), f"exponential Adams-Bashforth, three steps (ETD3, a = {math.exp(-0.5 * s.H):.3g})", None),
    (reversible_heun, "reversible Heun", s.H),
    (reversible_heun_again, "reversible Heun", s.H),
    (asynchronous_leapfrog(1.0), "asynchronous leapfrog (ALF)", s.H),
    (asynchronous_leapfrog(0.9), "asynchronous leapfrog (ALF, eta = 0.9)", s.H),
    (two_step_midpoint, "leapfrog", s.H),
    (delayed, "delayed Euler (k = 2)", s.H),
]


@pytest.mark.parametrize(("forward", "name", "h"), READ)
def test_what_remembers_is_named_by_what_it_keeps(forward: Forward, name: str, h: float | None):
    found = read(forward)
    shown = [r for r in found if r.name != "fork"]
    assert len(shown) >= 5
    assert {(r.name, r.evidence) for r in shown} == {(name, "proven")}
    assert h is None or [r.step_size for r in shown] == pytest.approx([h] * len(shown))


def test_pndm_carries_the_weights_of_adams_beside_a_skip_of_its_own():
    found = [r for r in read(pndm) if r.name.startswith("Adams")]
    assert len(found) >= 4
    assert all(r.name.startswith("Adams-Bashforth type, four steps (a = 1.") for r in found)
    assert all(r.name.endswith("weights of ab4)") and r.evidence == "proven" for r in found)


def test_what_is_kept_may_be_linear_in_the_state():
    found = read(data_prediction)[:4]
    assert all(r.name.startswith("Adams-Bashforth type, two steps (a = 0.") for r in found)
    assert all(r.name.endswith("weights of ab2)") and r.evidence == "proven" for r in found)


@pytest.mark.parametrize(("a", "new", "old"), [(1.0, 0.5, 0.5), (0.9, 0.7, 0.3)])
def test_a_mean_with_an_older_value_is_no_method_of_adams(a: float, new: float, old: float):
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        before = net(x, 0.0)
        for _ in range(ROUNDS):
            now = net(x, 0.0)
            x, before = a * x + s.H * (new * now + old * before), now
        return x

    assert not any("Adams" in r.name for r in read(forward))


@pytest.mark.parametrize("tied", [True, False])
def test_two_delayed_steps_that_are_cut_as_one_are_no_splitting(tied):
    class Delayed(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first = nn.Linear(3, 6)
            self.f = nn.ModuleList(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6)) for _ in range(8))

        def forward(self, x):
            states = [self.first(x)] * 3
            for f in self.f:
                states = [*states[1:], states[-1] + (self.f[0] if tied else f)(states[0])]
            return states[-1]

    found = [record.name for record in stabkit.identify(stabkit.trace(Delayed().double(), torch.randn(4, 3).double()))]
    assert any("delayed Euler (k = 2)" in name for name in found)
    assert not any("splitting" in name for name in found)
