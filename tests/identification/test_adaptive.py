"""Adaptive solvers: their accepted steps with the sizes that they had, and the interpolation at the end."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import stabkit

torchdiffeq = pytest.importorskip("torchdiffeq")


class Field(nn.Module):
    """A field that counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 4))
        self.accepted: list[float] = []

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.net(y)

    def callback_accept_step(self, t0: Tensor, y0: Tensor, dt: Tensor) -> None:
        self.accepted.append(float(dt.detach()))


class Solve(nn.Module):
    """A block of an ODE-net between two layers."""

    def __init__(self, method: str, times: int = 2, tol: float = 1e-3, **options: float) -> None:
        super().__init__()
        self.first, self.field, self.last = nn.Linear(3, 4), Field(), nn.Linear(4, 2)
        self.method, self.times, self.tol, self.options = method, times, tol, options

    def forward(self, x: Tensor) -> Tensor:
        times = torch.linspace(0, 1, self.times)
        options = self.options or None
        states = torchdiffeq.odeint(
            self.field, self.first(x), times, rtol=self.tol, atol=self.tol / 10, method=self.method, options=options
        )
        return self.last(states[-1] if self.times == 2 else states.transpose(0, 1))


def sizes_in(name: str) -> list[float]:
    """The step sizes that a name tells."""
    told = name.partition("(h = ")[2]
    return [float(part) for part in told.replace(")", ",").split(", ") if part.strip(",")[:1].isdigit()]


@pytest.mark.parametrize("name", ["dopri5", "bosh3"])
@pytest.mark.parametrize("options", [{}, {"first_step": 0.3}])
@pytest.mark.parametrize("times", [2, 4])
def test_accepted_steps_are_told_with_their_sizes(name: str, options: dict[str, float], times: int):
    torch.manual_seed(0)
    model = Solve(name, times, **options)
    x = torch.randn(5, 3)
    records = stabkit.identify(stabkit.trace(model, x), checks=False)
    found = next(r for r in records if r.shared_weights)
    model.field.accepted.clear()
    model(x)
    assert f"steps of {name} (h = " in found.name
    assert found.name.endswith("of it by interpolation)")
    assert sizes_in(found.name) == pytest.approx(model.field.accepted, rel=6e-3)
    assert found.step_size == pytest.approx(1.0, rel=1e-4)
    assert found.evidence == "measured"


def test_a_solve_that_is_cut_into_its_steps_ends_inside_the_last():
    torch.manual_seed(0)
    model = Solve("dopri5", tol=1e-6)
    block = nn.Sequential(model.first, Sliced(model.field))
    records = [r for r in stabkit.identify(stabkit.trace(block, torch.randn(5, 3)), checks=False) if r.steps != (0,)]
    assert all("dopri5" in r.name for r in records)
    assert "interpolation" in records[-1].name
    assert all(r.evidence == "measured" for r in records)


class Sliced(nn.Module):
    """A solve of one interval."""

    def __init__(self, field: Field) -> None:
        super().__init__()
        self.field = field

    def forward(self, x: Tensor) -> Tensor:
        return torchdiffeq.odeint(self.field, x, torch.tensor([0.0, 1.0]), rtol=1e-6, atol=1e-7)[1]


def test_states_side_by_side_are_no_shortcut_that_pads():
    torch.manual_seed(0)
    records = stabkit.identify(stabkit.trace(Solve("dopri5", 5), torch.randn(5, 3)), checks=False)
    assert not any("option A" in note for r in records for note in r.notes)


class Controlled(nn.Module):
    """Heun's method with control of its error, whose step sizes are tensors.

    The first stage is evaluated at each accepted state, or is the last one of the step before as torchdiffeq has it.
    """

    def __init__(self, *, anew: bool) -> None:
        super().__init__()
        self.first, self.field, self.last, self.anew = nn.Linear(3, 4), Field(), nn.Linear(4, 2), anew

    def forward(self, x: Tensor) -> Tensor:
        y, t, h = self.first(x), torch.tensor(0.0), torch.tensor(0.1)
        k = self.field(t, y)
        while t < 1:
            h = torch.minimum(h, 1 - t)
            later = self.field(t + h, y + h * k)
            new, error = y + h * (k + later) / 2, h * (later - k) / 2
            ratio = (error / (1e-4 + 1e-3 * torch.maximum(y.abs(), new.abs()))).square().mean().sqrt()
            if ratio <= 1:
                t, y = t + h, new
                k = self.field(t, y) if self.anew else later
            h = h * torch.clamp(0.9 * ratio**-0.5, 0.2, 5.0)
        return self.last(y)


@pytest.mark.parametrize("anew", [True, False])
def test_steps_of_heuns_method_under_control_are_told(anew: bool):
    torch.manual_seed(0)
    records = stabkit.identify(stabkit.trace(Controlled(anew=anew), torch.randn(5, 3)), checks=False)[2:-2]
    assert len(records) > 3
    kept = ", its first stage the last one of the step before (M(z) of ab2)"
    assert {(r.name, r.evidence) for r in records} == {(f"heun2{'' if anew else kept}", "measured")}
