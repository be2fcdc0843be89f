from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from stabkit.identification import identify
from stabkit.tracing import trace


class Step(nn.Module):
    """A block of width 6 whose forward is given."""

    def __init__(self, function) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
        self.g = nn.Sequential(nn.Linear(6, 6), nn.GELU())
        self.norm = nn.LayerNorm(6)
        self.project = nn.Linear(6, 6)
        self.damping = nn.Parameter(torch.tensor(0.225, dtype=torch.float64))
        self.scales = nn.Parameter(torch.linspace(0.1, 0.6, 6, dtype=torch.float64))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def read(function):
    torch.manual_seed(0)
    model = nn.Sequential(*[Step(function) for _ in range(3)]).double()
    found = identify(trace(model, torch.randn(2, 6, dtype=torch.float64)))
    assert len(found) == 3
    assert len({(f.name, f.evidence) for f in found}) == 1
    return found[1]


@pytest.mark.parametrize(
    ("function", "name", "skip", "evidence"),
    [
        (lambda m, x: x + m.f(x), "forward Euler", 1.0, "proven"),
        (lambda m, x: m.f(m.norm(x)) + x, "forward Euler", 1.0, "proven"),
        (lambda m, x: x - 0.1 * m.f(x), "forward Euler", 1.0, "proven"),
        (lambda m, x: x.clone().add_(m.f(x)), "forward Euler", 1.0, "proven"),
        (lambda m, x: torch.add(x, m.f(x), alpha=0.5), "forward Euler", 1.0, "proven"),
        (lambda m, x: x + m.scales * m.f(x), "forward Euler", 1.0, "proven"),
        (lambda m, x: m.f(x) + (1 - m.damping) * x, "damped Euler (a = 0.775)", 0.775, "proven"),
        (lambda m, x: (1 + m.damping) * m.f(x) + (1 - m.damping) * x, "damped Euler (a = 0.775)", 0.775, "proven"),
        (lambda m, x: torch.lerp(x, m.f(x), 0.25), "damped Euler (a = 0.75)", 0.75, "proven"),
        (lambda m, x: m.f(x), "plain", 0.0, "proven"),
        (lambda m, x: m.f(x) + m.project.bias, "plain", 0.0, "proven"),
        (lambda m, x: m.f(x) + m.g(x), "plain", 0.0, "proven"),
        (lambda m, x: m.project(x) + m.f(x), "plain", 0.0, "proven"),
        (lambda m, x: 1.5 * x + m.f(x), "scaled skip (a = 1.5)", 1.5, "proven"),
        (lambda m, x: x + m.f(x) + x, "scaled skip (a = 2)", 2.0, "proven"),
        (lambda m, x: m.scales * x + m.f(x), "damped Euler (a = 0.35)", 0.35, "measured"),
        (lambda m, x: x.flip(1) + m.f(x), "not a step", None, "measured"),
    ],
)
def test_the_skip_is_read_off_the_code(function, name, skip, evidence):
    found = read(function)
    assert (found.name, found.evidence) == (name, evidence)
    assert found.skip == (skip if skip is None else pytest.approx(skip, abs=1e-12))
    assert evidence != "proven" or found.residual < 1e-14


def test_the_method_has_the_region_of_the_skip():
    damped = read(lambda m, x: m.f(x) + (1 - m.damping) * x)
    z = torch.randn(50, dtype=torch.complex128).numpy()
    assert damped.method.amplification(z) == pytest.approx(abs(0.775 + z), abs=1e-12)
    assert read(lambda m, x: m.f(x)).method.amplification(z) == pytest.approx(abs(z), abs=1e-12)


@pytest.mark.parametrize(
    ("function", "after"),
    [
        (lambda m, x: torch.relu(x + m.f(x)), ("Relu",)),
        (lambda m, x: m.norm(x + m.f(x)), ("NativeLayerNorm",)),
    ],
)
def test_what_follows_the_addition_is_named(function, after):
    found = read(function)
    assert (found.name, found.after) == ("forward Euler", after)


def test_two_branches_in_a_row_are_a_splitting():
    def pre_norm(m, x):
        x = x + m.f(m.norm(x))
        return x + m.g(m.norm(x))

    found = read(pre_norm)
    assert found.name == "forward Euler"
    assert "2 additions" in found.notes[0]


def test_a_post_norm_transformer_is_projected_after_each_half():
    def post_norm(m, x):
        x = m.norm(x + m.f(x))
        return m.norm(x + m.g(x))

    found = read(post_norm)
    assert (found.name, found.evidence, found.skip) == ("projected Euler (post-norm)", "proven", None)
    assert found.after == ("NativeLayerNorm",) * 2
    assert "2 norm(s) after 2 addition(s)" in found.notes[0]


def test_a_norm_without_a_skip_is_plain():
    assert read(lambda m, x: m.norm(m.f(x) + m.g(x))).name == "plain"
    assert read(lambda m, x: m.norm(m.f(m.norm(x)))).name == "plain"


def test_a_change_of_space_is_a_transition():
    found = identify(trace(nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 5)), torch.randn(2, 3)))
    assert [f.name for f in found] == ["transition", "plain"]
    assert found[0].method is None


def test_an_opaque_step_is_unknown_rather_than_plain():
    class Residual(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x + x.tanh()

        @staticmethod
        def backward(ctx, g):
            return g

    found = read(lambda m, x: Residual.apply(m.project(x)))
    assert (found.name, found.method, found.evidence) == ("unknown", None, "unknown")


def test_a_shift_is_no_step_of_euler():
    found = identify(trace(lambda x: x + 0.1, torch.randn(2, 6)))
    assert [f.name for f in found] == ["no branch"]


def test_dropout_in_eval_mode_is_seen_through():
    torch.manual_seed(0)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f, self.drop = nn.Linear(6, 6), nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            return self.drop(x) + self.drop(torch.relu(self.f(x)))

    model = nn.Sequential(Block(), Block()).double().eval()
    assert [f.name for f in identify(trace(model, torch.randn(2, 6, dtype=torch.float64)))] == ["forward Euler"] * 2
