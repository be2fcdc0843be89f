"""Drawn numbers are noise and no step size; learned numbers along channels are, and masks and weights are neither."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import stabkit
from stabkit.identification.record import Identification

H, WIDTH = 0.05, 6


class _Stochastic(nn.Module):
    """Rounds of a stochastic equation, with two fields and a gain for each channel."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.f, self.g = (nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(2))
        self.gain = nn.Parameter(torch.rand(WIDTH) / 2 + 0.2)
        self.register_buffer("fixed", torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        for i in range(4):
            drawn = torch.randn(x.shape, generator=torch.Generator().manual_seed(i), dtype=x.dtype) * math.sqrt(H)
            x = getattr(self, self.how)(x, drawn)
        return x

    def ito(self, x: Tensor, dw: Tensor) -> Tensor:
        return x + H * self.f(x) + self.g(x) * dw

    def langevin(self, x: Tensor, dw: Tensor) -> Tensor:
        return x + H * self.f(x) + 0.3 * dw

    def heun(self, x: Tensor, dw: Tensor) -> Tensor:
        k, s = self.f(x), self.g(x)
        guess = x + H * k + s * dw
        return x + H / 2 * (k + self.f(guess)) + (s + self.g(guess)) / 2 * dw

    def milstein(self, x: Tensor, dw: Tensor) -> Tensor:
        s, slope = torch.sin(self.gain * x), self.gain * torch.cos(self.gain * x)
        return x + H * self.f(x) + s * dw + s * slope / 2 * (dw**2 - H)

    def dropped(self, x: Tensor, dw: Tensor) -> Tensor:
        return x + self.f(x) * (1 + dw)

    def bent(self, x: Tensor, dw: Tensor) -> Tensor:
        return x + H * self.f(x + torch.tanh(dw))

    def buffer(self, x: Tensor, dw: Tensor) -> Tensor:
        return x + self.fixed * self.f(x)

    def channels(self, x: Tensor, dw: Tensor) -> Tensor:
        return x + self.gain * self.f(x)

    def exponents(self, x: Tensor, dw: Tensor) -> Tensor:
        return x + torch.exp(self.gain.clamp(0, 1)) * self.f(x)

    def mask(self, x: Tensor, dw: Tensor) -> Tensor:
        weights = torch.linspace(0.2, 0.9, WIDTH, dtype=x.dtype)
        return x + weights * self.f(x)


def _read(how: str) -> tuple[Identification, ...]:
    torch.manual_seed(0)
    model = _Stochastic(how).double()
    return stabkit.identify(stabkit.trace(model, torch.randn(8, WIDTH, dtype=torch.float64)), checks=False)


@pytest.mark.parametrize(("how", "evidence"), [("ito", "measured"), ("langevin", "proven")])
def test_noise_is_said_and_is_no_step_size(how: str, evidence: str) -> None:
    found = [r for r in _read(how) if r.step_size is not None]
    assert {r.name for r in found} == {"forward Euler with noise (Euler-Maruyama)"}
    assert [r.step_size for r in found] == pytest.approx([H] * len(found))
    assert {r.evidence for r in found} == {evidence}
    assert not any("LayerScale" in note for r in found for note in r.notes)


@pytest.mark.parametrize(
    ("how", "name"), [("heun", "heun2 with noise"), ("milstein", "forward Euler with noise (Milstein)")]
)
def test_more_noise_than_one_term_at_the_old_state_is_no_euler_maruyama(how: str, name: str) -> None:
    found = [r for r in _read(how) if r.step_size is not None]
    assert found
    assert {r.name for r in found} == {name}
    assert [r.step_size for r in found] == pytest.approx([H] * len(found))


@pytest.mark.parametrize("how", ["dropped", "bent", "mask"])
def test_what_is_neither_noise_nor_learned(how: str) -> None:
    """A dropout around one, noise inside of a field, and constants that are no parameters."""
    found = _read(how)
    assert all("Maruyama" not in r.name and not any("LayerScale" in note for note in r.notes) for r in found)


@pytest.mark.parametrize("how", ["channels", "exponents", "buffer"])
def test_learned_numbers_are_steps_of_channels(how: str) -> None:
    found = [r for r in _read(how) if r.step_size is not None]
    assert found
    assert all(any("LayerScale" in note for note in r.notes) for r in found)
    assert {(r.step_size, r.convention) for r in found} == {(1.0, "h = 1: only the product h f can be seen")}


class _Contracted(nn.Module):
    """Stages on an axis of their own, weighed and summed, as solvers of libraries have them."""

    def __init__(self, weigh: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.f, self.weigh = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()), weigh

    def forward(self, x: Tensor) -> Tensor:
        k = torch.stack([self.f(x), self.f(x + 0.1)], -1)
        return x + self.weigh(torch.tanh(k), torch.tensor([0.3, -0.1], dtype=x.dtype))


@pytest.mark.parametrize("weigh", [lambda k, b: (k * b).sum(-1), lambda k, b: k @ b])
def test_weights_along_an_axis_of_stages_are_no_layer_scale(weigh: Callable[[Tensor, Tensor], Tensor]) -> None:
    model = nn.Sequential(*(_Contracted(weigh) for _ in range(3))).double()
    found = stabkit.identify(stabkit.trace(model, torch.randn(3, WIDTH, dtype=torch.float64)), checks=False)
    assert not any("LayerScale" in note for r in found for note in r.notes)


class _Solved(nn.Module):
    """A library's adaptive solver, whose stages lie along an axis of a buffer.

    Its next step begins with the value of the field at the predicted state, so that its stages make no known method.
    """

    def __init__(self) -> None:
        super().__init__()
        self.field = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 2, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        import torchdiffeq

        times = torch.tensor([0.0, 1.0], dtype=x.dtype)
        return torchdiffeq.odeint(lambda t, y: self.field(y), x, times, rtol=1e-3, atol=1e-3, method="adaptive_heun")[1]


def test_stages_of_one_field_that_are_not_taken_apart_are_no_different_fields() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), _Solved(), nn.Conv2d(2, 1, 3))
    found = stabkit.identify(stabkit.trace(model, torch.randn(2, 1, 5, 5)), checks=False)
    (solve,) = [r for r in found if r.name.startswith("unnamed")]
    assert "different fields" not in solve.name
    assert "1.field is called" in solve.notes[0]
    assert not any("LayerScale" in note for note in solve.notes)


def test_drawn_numbers_that_zero_multiplies_are_no_noise():
    """Samplers with their churn, their temperature or their eta at zero."""

    class Cold(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())

        def forward(self, x: Tensor) -> Tensor:
            for h in (2.5, 1.5, 0.5):
                x = x + h * self.f(x) + torch.zeros(()).sqrt() * torch.randn_like(x)
            return x

    torch.manual_seed(0)
    found = stabkit.identify(stabkit.trace(Cold(), torch.randn(3, WIDTH)))
    assert {record.name for record in found} == {"forward Euler"}
    assert not any("noise" in note for record in found for note in record.notes)
