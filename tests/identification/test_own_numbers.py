"""Factors with a number for each channel belong to the field: no mean of them in a tableau, nor in a name."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from stabkit.identification import identify
from stabkit.tracing import trace

from .family import Step, dense

WIDTH = 6


class Scaled(nn.Module):
    """A branch times a number for each channel, in several spellings."""

    def __init__(self, how, low=0.05, high=0.35):
        super().__init__()
        numbers = low + (high - low) * torch.rand(WIDTH)
        self.how, self.f = how, dense(WIDTH)
        self.g = nn.Parameter(numbers.log() if how == "exponential" else numbers)

    def forward(self, x):
        y = self.f(x)
        if self.how == "exponential":
            return self.g.exp() * y
        if self.how == "diagonal matrix":
            return y * self.g.expand_as(y)
        return y.mul(self.g[None])


def read(function, *parts, **named):
    torch.manual_seed(0)
    model = nn.Sequential(*(Step(function, *(part() for part in parts), **named) for _ in range(3))).double()
    return identify(trace(model, torch.randn(3, WIDTH, dtype=torch.float64), depth=["0", "1", "2"]))[1]


def is_of_ones(record):
    """Whether every number of the tableau is zero or one."""
    blocks = np.concatenate([block.ravel() for block in (record.method.A, record.method.U, record.method.B)])
    return bool(np.isin(blocks, (0.0, 1.0)).all())


def in_turn(m, x):
    x = x + m.parts[0](x)
    return x + m.parts[1](x)


def side_by_side(m, x):
    return x + m.parts[0](x) + m.parts[1](x)


def at_the_moved_state(m, x):
    y = m.parts[0](x)
    return x + m.parts[1](x + y) + y


@pytest.mark.parametrize("how", ["plain", "exponential", "diagonal matrix"])
@pytest.mark.parametrize(
    ("function", "name"),
    [
        (lambda m, x: x + m.parts[0](x), "forward Euler"),
        (in_turn, "Lie splitting (2 Euler steps)"),
        (side_by_side, "forward Euler, parallel branches"),
        (at_the_moved_state, "Lie splitting (2 Euler steps)"),
    ],
)
def test_numbers_of_channels_belong_to_the_field(function, name, how):
    record = read(function, lambda: Scaled(how), lambda: Scaled(how))
    assert (record.name, record.evidence, record.step_size) == (name, "proven", 1.0)
    assert is_of_ones(record)
    ranges = [note for note in record.notes if "every channel has a step of its own" in note]
    assert len(ranges) == (1 if name == "forward Euler" else 2)


def test_the_recorded_field_has_the_numbers_in_it():
    torch.manual_seed(0)
    model = nn.Sequential(*(Step(lambda m, x: x + m.parts[0](x), Scaled("plain")) for _ in range(3))).double()
    x = torch.randn(1, WIDTH, dtype=torch.float64)
    flow = trace(model, x, depth=["0", "1", "2"])
    record = identify(flow)[0]
    (field,) = record.recorded
    found = torch.autograd.functional.jacobian(model[0].parts[0], x)[0, :, 0]
    eye = torch.eye(WIDTH, dtype=torch.float64)
    assert field.divisor == pytest.approx(1.0)
    assert torch.allclose(field.products(flow.steps[0]).forward(eye[None])[0], found)


def test_numbers_of_both_signs_whose_mean_is_zero():
    numbers = nn.Parameter(torch.tensor([0.3, -0.3, 0.2, -0.2, 0.1, -0.1]))
    record = read(lambda m, x: x + m.g * m.parts[0](x), lambda: dense(WIDTH), g=numbers)
    assert (record.name, record.step_size, record.evidence) == ("forward Euler", 1.0, "proven")
    assert record.method.B[0, 0] == 1.0


def heun(m, x):
    k = m.parts[0](x)
    return x + m.g / 2 * (k + m.parts[0](x + m.g * k))


def not_heun(m, x):
    k = m.parts[0](x)
    return x + m.g / 2 * (k + m.parts[0](x + m.g.flip(0) ** 2 * k))


def numbers():
    return nn.Parameter(torch.linspace(0.1, 0.6, WIDTH))


def test_stages_of_one_field_keep_the_ratio_of_their_numbers():
    record = read(heun, lambda: dense(WIDTH), g=numbers())
    assert (record.name, record.evidence, record.step_size) == ("heun2", "proven", 1.0)
    record = read(not_heun, lambda: dense(WIDTH), g=numbers())
    assert record.evidence == "measured"


def test_copies_of_a_batch_keep_the_sizes_of_their_steps():
    """Guidance by one call of two copies (Ho and Salimans 2022): their weights are no numbers of channels."""

    class Guided(nn.Module):
        def __init__(self):
            super().__init__()
            self.f, self.embedded = dense(WIDTH), nn.Parameter(torch.randn(2, 1, 1, WIDTH))

        def forward(self, x):
            for h in (0.1, 0.15, 0.25):
                without, with_it = self.f((x.expand(2, *x.shape) + self.embedded).flatten(0, 1)).chunk(2)
                x = x - h * (without + 4.0 * (with_it - without))
            return x

    torch.manual_seed(0)
    found = identify(trace(Guided().double(), torch.randn(3, 5, WIDTH, dtype=torch.float64)))
    sizes = [record.step_size for record in found if record.name == "forward Euler"]
    assert sizes == pytest.approx([0.1, 0.15, 0.25])


def test_copies_laid_out_as_patches_have_the_sum_of_their_weights():
    class Guided(nn.Module):
        def __init__(self):
            super().__init__()
            self.f, self.embedded = dense(4), nn.Parameter(torch.randn(2, 1, 1))

        def forward(self, x):
            n = len(x)
            for _ in range(4):
                tokens = torch.cat([x, x]).unfold(1, 2, 2).unfold(2, 2, 2).flatten(1, 2).flatten(-2)
                tokens = self.f(tokens + self.embedded.repeat_interleave(n, 0))
                both = tokens.view(2 * n, 3, 3, 2, 2).transpose(2, 3).reshape(2 * n, 6, 6)
                with_it, without = both.chunk(2)
                x = x + 0.25 * (without + 3.0 * (with_it - without))
            return x

    torch.manual_seed(0)
    found = identify(trace(Guided(), torch.randn(3, 6, 6)))
    assert [(r.name, r.step_size) for r in found] == [("forward Euler", 0.25)] * 4


def test_one_field_with_other_numbers_at_every_use_is_not_proven():
    def function(m, x):
        x = x + m.g * m.parts[0](x)
        return x + m.g.flip(0) ** 2 * m.parts[0](x)

    assert read(function, lambda: dense(WIDTH), g=numbers()).evidence == "measured"


def test_a_state_times_numbers_inside_a_field_is_of_the_field():
    """The skip D u inside of a state-space layer (Gu et al. 2022)."""

    def function(m, x):
        return x + m.parts[1](torch.nn.functional.gelu(m.parts[0](x) + m.D * x))

    D = nn.Parameter(torch.tensor([-1.45, 2.88, 0.3, -0.2, 0.5, 0.1]))
    record = read(function, lambda: dense(WIDTH), lambda: nn.Linear(WIDTH, WIDTH), D=D)
    assert record.name == "forward Euler"
    assert is_of_ones(record)
    assert any("-1.45 to 2.88" in note for note in record.notes)


def unit(x):
    return x / x.norm(dim=-1, keepdim=True)


def test_every_addition_on_the_sphere_says_its_own_numbers():
    """Normalised transformers (Loshchilov et al. 2024)."""

    def function(m, x):
        for f, a in zip(m.parts, (m.a, m.b), strict=True):
            y, x = unit(f(x)), unit(x)
            x = unit(x + a * (y - x))
        return x

    torch.manual_seed(1)
    a, b = (nn.Parameter(low + 0.2 * torch.rand(WIDTH)) for low in (0.1, 0.5))
    record = read(function, lambda: dense(WIDTH), lambda: dense(WIDTH), a=a, b=b)
    told = [note for note in record.notes if note.startswith("addition ")]
    assert len(told) == 2
    assert all(f"h from {t.min():.3g} to {t.max():.3g}" in note for note, t in zip(told, (a, b), strict=True))


def test_numbers_of_entries_are_told_by_their_range_and_no_mean_stands_for_them():
    class Damped(nn.Module):
        def __init__(self):
            super().__init__()
            self.f, self.g = dense(WIDTH), dense(WIDTH)
            self.a, self.s = nn.Parameter(torch.linspace(0.8, 0.9, WIDTH)), nn.Parameter(torch.rand(WIDTH) / 10)

        def forward(self, x):
            x = x + self.s * self.f(x)
            return self.a * x + self.g(x)

    class Momentum(nn.Module):
        def __init__(self):
            super().__init__()
            self.fields = nn.ModuleList(dense(WIDTH) for _ in range(5))
            self.beta = nn.Parameter(torch.linspace(0.6, 0.9, WIDTH))

        def forward(self, x):
            v = torch.zeros_like(x)
            for f in self.fields:
                v = self.beta * v + (1 - self.beta) * f(x)
                x = x + v
            return x

    torch.manual_seed(0)
    x = torch.randn(3, WIDTH)
    damped = identify(trace(nn.Sequential(*[Damped() for _ in range(3)]), x))
    assert {r.name for r in damped} == {"Lie splitting (Euler, damped Euler (a from 0.8 to 0.9 by entry))"}
    momenta = identify(trace(Momentum(), x))
    assert [(r.name, r.step_size) for r in momenta[1:-1]] == [("momentum (gamma from 0.6 to 0.9 by entry)", None)] * 3


def test_skips_with_numbers_on_both_sides_of_one_are_told_one_after_the_other():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.f, self.g = dense(WIDTH), dense(WIDTH)
            self.a, self.b = (
                nn.Parameter(torch.linspace(0.9, 1.1, WIDTH)),
                nn.Parameter(torch.linspace(1.1, 0.8, WIDTH)),
            )

        def forward(self, x):
            x = self.a * x + 0.1 * self.f(x)
            return self.b * x + 0.1 * self.g(x)

    torch.manual_seed(0)
    found = identify(trace(nn.Sequential(*[Scaled() for _ in range(3)]), torch.randn(3, WIDTH)))
    ranges = "diagonal skip (a from 0.9 to 1.1 by entry), diagonal skip (a from 0.8 to 1.1 by entry)"
    assert {record.name for record in found} == {f"Lie splitting ({ranges})"}
