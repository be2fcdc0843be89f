"""Recurrences over time whose state and input have factors that are made of one another, and some that only seem to."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import stabkit
from stabkit.identification.record import Recurrence

D, TIMES = 6, 10
Parts = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # what a time step takes: key, value, step, gate, decay rates


class Memory(nn.Module):
    """A state of rows like values and columns like keys, or of one number a channel."""

    def __init__(self, step: Callable[[Tensor, Parts], Tensor], *, rows: bool) -> None:
        super().__init__()
        self.step, self.rows = step, rows
        self.into, self.out = nn.Linear(D, 4 * D + 1), nn.Linear(D, D)
        self.rates = nn.Parameter(0.5 + torch.rand(D, generator=torch.Generator().manual_seed(3)))

    def forward(self, x: Tensor) -> Tensor:
        k, v, g, q, b = self.into(x).split([D, D, D, D, 1], -1)
        k, g, b = functional.normalize(k, dim=-1), functional.softplus(g), torch.sigmoid(b)
        S, outs = x.new_zeros(len(x), D, *([D] if self.rows else [])), []
        for t in range(TIMES):
            S = self.step(S, (k[:, t], v[:, t], b[:, t], g[:, t], self.rates))
            outs.append(torch.einsum("bij,bj->bi", S, q[:, t]) if self.rows else S * q[:, t])
        return x + self.out(torch.stack(outs, 1))


def read(step: Callable[[Tensor, Parts], Tensor], *, rows: bool) -> Recurrence:
    torch.manual_seed(0)
    model = nn.Sequential(Memory(step, rows=rows), Memory(step, rows=rows))
    records = stabkit.identify(stabkit.trace(model, torch.randn(3, TIMES, D)), checks=False)
    (found,) = records[0].over_time
    return found


def longhorn(S: Tensor, p: Parts) -> Tensor:
    """Liu et al. 2024: the decay 1 - e k^2 and the input e v k."""
    k, v, b, *_ = p
    e = (b / (1 + b * k.square().sum(-1, keepdim=True)))[..., None]
    return (1 - e * k[:, None] ** 2) * S + e * v[..., None] * k[:, None]


def oja(S: Tensor, p: Parts) -> Tensor:
    """Oja's rule (Irie et al. 2022): what is learnt is forgotten at the rate of the values' squares."""
    k, v, b, *_ = p
    return S + b[..., None] * (v[..., None] * k[:, None] - v[..., None] ** 2 * S)


def relaxed(S: Tensor, p: Parts) -> Tensor:
    _, v, _, g, _ = p
    return S + torch.sigmoid(g) * (v - S)


def fading(S: Tensor, p: Parts) -> Tensor:
    """A gate that is an exponential multiplies a difference: no exponential of the state."""
    _, v, _, g, rates = p
    return S + torch.exp(-g * rates) * (v - S)


def trained_at_test(S: Tensor, p: Parts) -> Tensor:
    """Sun et al. 2024: gradient descent with a constant rate."""
    k, v, *_ = p
    return S - 0.1 * torch.einsum("bi,bj->bij", torch.einsum("bij,bj->bi", S, k) - v, k)


def discretised(S: Tensor, p: Parts) -> Tensor:
    _, v, _, g, rates = p
    return (1 - g * 0.1 * rates) * S + g * v


def decayed_delta(S: Tensor, p: Parts) -> Tensor:
    k, v, b, g, _ = p
    S = torch.exp(-g)[..., None] * S
    return S + b[..., None] * torch.einsum("bi,bj->bij", v - torch.einsum("bij,bj->bi", S, k), k)


def other_step(S: Tensor, p: Parts) -> Tensor:
    """The input has a step of its own."""
    _, v, b, g, rates = p
    return (1 - g * 0.1 * rates) * S + b * v


def other_number(S: Tensor, p: Parts) -> Tensor:
    """What is left without a step is no identity."""
    _, v, _, g, rates = p
    return (0.9 - g * 0.1 * rates) * S + g * v


def squared(S: Tensor, p: Parts) -> Tensor:
    _, v, _, g, rates = p
    return (1 - (g * 0.1) ** 2 * rates) * S + g * v


def gated_outer(S: Tensor, p: Parts) -> Tensor:
    """Gated linear attention (Yang et al. 2023): a decay, and the input beside it."""
    k, v, _, g, _ = p
    return torch.sigmoid(g)[:, None] * S + v[..., None] * k[:, None]


@pytest.mark.parametrize(
    ("step", "rows", "name", "fed"),
    [
        (longhorn, True, "forward Euler (linear, |a|", True),
        (oja, True, "forward Euler (linear, |a|", True),
        (relaxed, False, "forward Euler (linear, |a|", True),
        (fading, False, "forward Euler (linear, |a|", True),
        (discretised, False, "forward Euler (linear, |a|", True),
        (trained_at_test, True, "forward Euler (linear, a matrix", False),
        (decayed_delta, True, "decay and then forward Euler (linear, a matrix", True),
    ],
)
def test_a_factor_that_state_and_input_have_in_common_is_the_step_of_explicit_euler(step, rows, name, fed):
    found = read(step, rows=rows)
    assert found.name.startswith(name)
    assert any("which the input makes" in note for note in found.notes) == fed


@pytest.mark.parametrize(
    ("step", "rows"), [(other_step, False), (other_number, False), (squared, False), (gated_outer, True)]
)
def test_what_has_no_step_in_common_is_a_linear_recurrence(step, rows):
    assert read(step, rows=rows).name.startswith("linear recurrence")


def weighed(weight: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[Tensor, Parts], Tensor]:
    def step(S: Tensor, p: Parts) -> Tensor:
        _, v, _, g, rates = p
        a = torch.exp(-g * rates)
        return a * S + weight(a, g, rates) * v

    return step


@pytest.mark.parametrize(
    ("weight", "said", "other"),
    [
        (lambda a, _, __: torch.sqrt(1 - a**2), "keeps the variance", "has the factor a - 1"),  # RG-LRU
        (lambda a, _, rates: (a - 1) / -rates, "has the factor a - 1", "keeps the variance"),  # S4D, S5
        (lambda _, g, rates: torch.expm1(-g * rates) / (-g * rates) * g, "has the factor a - 1", "variance"),
        (lambda _, g, __: g, "made of other numbers", "a - 1"),  # Mamba
        (lambda a, _, __: torch.sqrt(1 - a), "made of the same h A", "keeps the variance"),
    ],
)
def test_the_weight_of_the_input_of_an_exponential_step_is_told_by_its_kind(weight, said, other):
    found = read(weighed(weight), rows=False)
    assert found.name.startswith("exponential step")
    assert said in " ".join(found.notes)
    assert other not in " ".join(found.notes)


def test_a_step_that_tokens_make_is_one_that_the_input_makes():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, D), Memory(longhorn, rows=True), Memory(longhorn, rows=True))
    records = stabkit.identify(stabkit.trace(model, torch.randint(0, 7, (3, TIMES))), checks=False)
    found = [time for record in records for time in record.over_time]
    assert len(found) == 2
    assert all("which the input makes" in " ".join(time.notes) for time in found)


def test_the_weight_of_white_noise_is_told_of_complex_factors_as_well():
    class Rotating(nn.Module):
        """Linear recurrent units whose normalisation follows their eigenvalues (Orvieto et al. 2023)."""

        def __init__(self) -> None:
            super().__init__()
            self.nu, self.theta, self.out = (
                nn.Parameter(torch.rand(8) - 1.5),
                nn.Parameter(torch.rand(8)),
                nn.Linear(8, D),
            )
            self.into = nn.Parameter(torch.randn(8, D, dtype=torch.cfloat) / 3)

        def forward(self, x: Tensor) -> Tensor:
            a = torch.exp(torch.complex(-torch.exp(self.nu), self.theta))
            u = (x.to(torch.cfloat) @ self.into.T) * torch.sqrt(1 - a.abs() ** 2)
            h, outs = torch.zeros_like(u[:, 0]), []
            for t in range(TIMES):
                h = a * h + u[:, t]
                outs.append(h.real)
            return x + torch.tanh(self.out(torch.stack(outs, 1)))

    torch.manual_seed(0)
    records = stabkit.identify(stabkit.trace(nn.Sequential(Rotating(), Rotating()), torch.randn(3, TIMES, D)))
    (found,) = records[0].over_time
    assert found.name.startswith("exponential step")
    assert "keeps the variance" in " ".join(found.notes)
