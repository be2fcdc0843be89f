"""Two-step methods whose older state begins and ends within one module, and fields that are taken in turn."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import stabkit

WIDTH, STEPS = 6, 4
VERLET = f"{STEPS} steps of second_order_leapfrog ("


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 9), nn.Tanh(), nn.Linear(9, WIDTH))


class _Unit(nn.Module):
    """Several steps with an older state of their own; ``how`` says which."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.f = nn.ModuleList(_mlp() for _ in range(1 if "shared" in how else STEPS))

    def forward(self, y: Tensor) -> Tensor:
        old = torch.zeros_like(y) if "zero" in self.how else y
        for i in range(STEPS):
            force = self.f[i % len(self.f)](y)
            if "momentum" in self.how:
                y, old = y + 0.7 * (y - old) + 0.3 * force, y
            elif "other" in self.how:
                y, old = 1.5 * y - 0.4 * old + 0.3 * force, y
            else:
                y, old = 2 * y - old + 0.16 * force, y
        return y


def _found(how: str) -> list[stabkit.identification.Identification]:
    torch.manual_seed(0)
    flow = stabkit.trace(nn.Sequential(*(_Unit(how) for _ in range(2))), torch.randn(2, WIDTH), depth=["0", "1"])
    return list(stabkit.identify(flow, checks=False))


@pytest.mark.parametrize("how", ["own", "own zero", "shared", "shared zero"])
def test_stormer_and_verlet_inside_one_module(how: str) -> None:
    for record in _found(how):
        begins = "zero" if "zero" in how else "the state"
        assert record.name.startswith(VERLET)
        assert record.name.endswith(f"the older state begins at {begins})")
        assert record.evidence == "proven"
        assert record.step_size == pytest.approx(0.4)


@pytest.mark.parametrize("how", ["momentum", "momentum zero", "momentum shared"])
def test_momentum_inside_one_module(how: str) -> None:
    for record in _found(how):
        assert record.name.startswith(f"{STEPS} steps of momentum (gamma = 0.7")
        assert record.step_size == pytest.approx(0.3)


def test_two_step_methods_of_other_numbers_have_no_such_name() -> None:
    assert not any("leapfrog" in r.name or "momentum" in r.name for r in _found("other"))


class _InTurn(nn.Module):
    """Two states that move by fields of each other in turn, all fields in one list, or one field for all."""

    def __init__(self, fields: int) -> None:
        super().__init__()
        self.stem, self.other, self.head = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.f = nn.ModuleList(_mlp() for _ in range(fields))

    def forward(self, i: Tensor) -> Tensor:
        x, v = self.stem(i), self.other(i)
        for k in range(8):
            x, v = v, x + self.f[k % len(self.f)](v)
        return self.head(x + v)


@pytest.mark.parametrize(("fields", "name"), [(8, "leapfrog, or additive couplings in turn"), (1, "leapfrog")])
def test_fields_of_their_own_in_turn_are_no_proof_of_a_leapfrog(fields: int, name: str) -> None:
    torch.manual_seed(0)
    found = stabkit.identify(stabkit.trace(_InTurn(fields), torch.randn(2, WIDTH)), checks=False)
    names = [r.name for r in found if "leapfrog" in r.name]
    assert len(names) > 2
    assert set(names) == {name}


class _Midpoint(nn.Module):
    """The two-step midpoint rule with weights of its own at each step, begun by some multiple of Euler's step."""

    def __init__(self, start: float) -> None:
        super().__init__()
        self.stem, self.head, self.start = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), start
        self.f = nn.ModuleList(_mlp() for _ in range(7))

    def forward(self, i: Tensor) -> Tensor:
        before = self.stem(i)
        x = before + self.start * self.f[0](before)
        for f in self.f[1:]:
            before, x = x, before + 0.2 * f(x)
        return self.head(x)


@pytest.mark.parametrize(("start", "name"), [(0.1, "leapfrog"), (0.2, "leapfrog, or additive couplings in turn")])
def test_a_start_by_half_a_field_tells_the_midpoint_rule_from_couplings(start: float, name: str) -> None:
    torch.manual_seed(0)
    found = stabkit.identify(stabkit.trace(_Midpoint(start), torch.randn(2, WIDTH)), checks=False)[1:-1]
    assert {r.name for r in found[1:]} == {name}
    assert {round(r.step_size, 6) for r in found if r.step_size} == {0.1}
    assert found[0].name == ("forward Euler" if start == 0.1 else name)


class _Kept(nn.Module):
    """A whole solve by a method that keeps something, in one module."""

    def __init__(self, how: str, eta: float, n: int) -> None:
        super().__init__()
        self.f, self.how, self.eta, self.n = _mlp(), how, eta, n

    def forward(self, x: Tensor) -> Tensor:
        h, z, v, older = 1 / self.n, x, self.f(x), x
        if self.how == "leapfrog":
            z = x + h * v
        for _ in range(self.n - (self.how == "leapfrog")):
            if self.how == "asynchronous leapfrog":
                half = z + v * h / 2
                v = 2 * self.eta * (self.f(half) - v) + v
                z = half + v * h / 2
            elif self.how == "reversible Heun":
                older = 2 * z - older + h * v
                new = self.f(older)
                z, v = z + h / 2 * (v + new), new
            else:
                older, z = z, older + 2 * h * self.f(z)
        return z


@pytest.mark.parametrize(
    ("how", "eta"), [("asynchronous leapfrog", 1.0), ("asynchronous leapfrog", 0.8), ("reversible Heun", 1.0),
                     ("leapfrog", 1.0)],
)  # fmt: skip
def test_a_whole_solve_by_a_method_that_keeps_something_is_its_steps(how: str, eta: float):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, WIDTH), _Kept(how, eta, 5), nn.Linear(WIDTH, 4))
    found = stabkit.identify(stabkit.trace(model, torch.randn(3, 3)))[1]
    assert found.name.startswith(f"5 steps of {how}")
    assert (f"eta = {eta:.3g}" in found.name) == how.startswith("async")
    assert found.step_size == pytest.approx(0.2)
    assert found.evidence == "proven"
