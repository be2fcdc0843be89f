"""Numbers that a record tells are those of its own matrices, or are not told."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import stabkit
from stabkit.identification import identify
from stabkit.identification.evidence.told_numbers import consistent

WIDTH = 6


def field(width: int = WIDTH) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 16), nn.Tanh(), nn.Linear(16, width))


class Multistep(nn.Module):
    """Adams and Bashforth's method of order 2 on a grid of times that falls, as samplers have."""

    def __init__(self) -> None:
        super().__init__()
        self.f = field()
        self.times = torch.linspace(1, 0, 8).tolist()

    def forward(self, x: Tensor) -> Tensor:
        kept = None
        for a, b in zip(self.times[:-1], self.times[1:], strict=True):
            d = self.f(x)
            x = x + (b - a) * (d if kept is None else 1.5 * d - 0.5 * kept)
            kept = d
        return x


class Accelerated(nn.Module):
    """FISTA: the first extrapolation has a number of zero."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(field() for _ in range(6))
        self.rho = torch.tensor([0.0, 0.28, 0.47, 0.59, 0.67, 0.73])

    def forward(self, x: Tensor) -> Tensor:
        old = y = x
        for layer, rho in zip(self.layers, self.rho, strict=True):
            new = torch.relu(y - 0.1 * layer(y))
            y, old = new + rho * (new - old), new
        return old


def records(model: nn.Module, *inputs: Tensor) -> list[stabkit.identification.Identification]:
    torch.manual_seed(0)
    return list(identify(stabkit.trace(model, *inputs)))


def test_the_step_size_of_a_method_that_remembers_has_its_sign():
    found = [r for r in records(Multistep(), torch.randn(3, WIDTH)) if r.name == "ab2"]
    assert len(found) >= 4
    assert all(r.step_size == pytest.approx(-1 / 7, rel=1e-4) for r in found if r.method is not None)
    turned = replace(found[0], method=replace_sign(found[0].method))
    told = consistent(turned)
    assert (told.step_size, told.evidence) == (None, "measured")
    assert "sum to -1 h" in told.notes[0]
    assert consistent(found[0]) is found[0]


def replace_sign(method: object) -> stabkit.integrators.GeneralLinearMethod:
    """The same method with a step size of the other sign."""
    assert isinstance(method, stabkit.integrators.GeneralLinearMethod)
    return stabkit.integrators.GeneralLinearMethod(-method.A, method.U, -method.B, method.V, fields=method.fields)


def test_a_momentum_that_is_none_of_the_step_is_not_told():
    (found, *_) = [r for r in records(Accelerated(), torch.randn(3, WIDTH)) if r.name.startswith("Nesterov")]
    assert consistent(found) is found
    told = consistent(replace(found, name=found.name.replace("0.28", "0.59")))
    assert told.step_size is None
    assert "no eigenvalue 0.59" in told.notes[0]


def test_the_first_step_of_an_accelerated_method_has_no_momentum():
    names = [r.name for r in records(Accelerated(), torch.randn(3, WIDTH))]
    told = [name.partition("gamma = ")[2].partition(")")[0] for name in names if "gamma" in name]
    assert told == ["0", "0.28", "0.47", "0.59"]


def test_a_system_without_a_name_has_no_step_size():
    """The step size stands in its matrices, and which number it is was not read."""

    class Unnamed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f, self.g = field(), field()

        def forward(self, x: Tensor) -> Tensor:
            z = y = x
            for _ in range(6):
                z, y = 0.3 * y + 0.7 * z + 0.25 * self.f(z) + 0.2 * self.g(y), y + 0.5 * z + 0.25 * self.f(y + z)
            return y + z

    found = [r for r in records(Unnamed(), torch.randn(3, WIDTH)) if r.name.startswith("unnamed")]
    assert found
    assert all(r.step_size is None and "was not read" in r.convention for r in found)


class LearnedFlow(nn.Module):
    """A symplectic network with the step size as a column beside the state; its trajectory is kept."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(field(3) for _ in range(4))

    def flow(self, given: Tensor) -> Tensor:
        state, h = given[..., :-1], given[..., -1:]
        p, q = state[..., :3], state[..., 3:]
        for i, layer in enumerate(self.layers):
            p, q = (p + layer(q) * h, q) if i % 2 == 0 else (p, q + layer(p) * h)
        return torch.cat([p, q], -1)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        kept = [x]
        for _ in range(4):
            kept.append(self.flow(torch.cat([kept[-1], h], -1)))
        return torch.stack(kept, 1)


def test_a_trajectory_that_is_kept_and_a_step_size_beside_the_state_leave_the_flow_as_it_is():
    found = records(LearnedFlow(), torch.randn(3, WIDTH), torch.full((3, 1), 0.1))
    assert [r.name for r in found] == ["reversible (4 couplings in turn)"] * 4
    assert all(r.step_size == pytest.approx(0.1) for r in found)


class OneState(nn.Module):
    """Euler steps of a state beside which the step size is joined; the trajectory is kept."""

    def __init__(self) -> None:
        super().__init__()
        self.f = field()

    def forward(self, x: Tensor) -> Tensor:
        kept = [x]
        for _ in range(5):
            given = torch.cat([kept[-1], torch.full((len(x), 1), 0.3)], -1)
            y = given[:, :-1]
            kept.append(y + given[:, -1:] * self.f(y))
        return torch.stack(kept, 1)


def test_a_state_beside_a_constant_that_is_cut_off_again_is_that_state():
    found = records(OneState(), torch.randn(3, WIDTH))
    assert [r.name for r in found] == ["forward Euler"] * 5
    assert all(r.step_size == pytest.approx(0.3) and r.evidence == "proven" for r in found)
