"""Numbers that follow from where a step is cut, and from what a cotangent of ones can see, are not the method's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from stabkit import analyze, identify, trace
from tests.identification.family import Step

FROM = torch.tensor([0, 1, 2, 3, 4, 5, 0, 2])
TO = torch.tensor([1, 2, 3, 4, 5, 0, 3, 5])
NUMBERS = (0.5, -0.5, 0.3, 0.7, -0.2, 0.4)


class TwoSteps(nn.Module):
    """Numbers of their own for every block, of which the code forms some terms before it calls the block."""

    def __init__(self, rule):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.rule = nn.Linear(3, 5), rule
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5)) for _ in NUMBERS])

    def forward(self, x):
        old = self.first(x)
        x = old + self.blocks[0](old)
        for number, block in zip(NUMBERS[1:], self.blocks[1:], strict=True):
            x, old = self.rule(x, old, number, block)
        return x


RULES = {
    "before": lambda x, old, k, f: (k * old + (1 - k) * x + (1 + k) * f(x), x),
    "after": lambda x, old, k, f: ((1 + k) * f(x) + k * old + (1 - k) * x, x),
    "apart": lambda x, old, k, f: (k * old + ((1 + k) * f(x) + (1 - k) * x), x),
}


@pytest.mark.parametrize("rule", RULES)
def test_two_steps_have_the_numbers_of_their_own_block(rule):
    found = identify(trace(TwoSteps(RULES[rule]).double(), torch.randn(4, 3).double()))
    read = [r for r in found if r.name.startswith("two-step")]
    expected = [(f"two-step (LM-ResNet, k = {k:.3g})", pytest.approx(1 + k)) for k in NUMBERS[1:]]
    assert [(r.name, r.step_size) for r in read] == expected
    assert {r.evidence for r in read} == {"proven"}


def test_momentum_has_the_number_of_its_own_block():
    def rule(x, v, k, f):
        v = abs(k) * v + 0.5 * f(x)
        return x + v, v

    found = identify(trace(TwoSteps(rule).double(), torch.randn(4, 3).double()))
    names = [r.name for r in found if r.name.startswith("momentum")]
    assert names == [f"momentum (gamma = {abs(k):.3g})" for k in NUMBERS[1:]]


def test_a_method_whose_states_lie_before_the_step_is_analysed():
    report = analyze(TwoSteps(RULES["before"]).double(), torch.randn(4, 3).double(), spectrum="full")
    assert any("LM-ResNet" in step.method for step in report.steps)


def middle(step, shape=(6, 4), **more):
    torch.manual_seed(0)
    flow = trace(nn.Sequential(*[step() for _ in range(3)]).double(), torch.randn(shape).double(), **more)
    return identify(flow)[1]


def divergence(x, flux):
    return torch.zeros_like(x).index_add(0, FROM, flux).index_add(0, TO, -flux)


def scattered(x, g):
    out = torch.zeros_like(x)
    out = out.scatter_add(0, FROM[:, None].expand(-1, 4), g[TO])
    return out.scatter_add(0, TO[:, None].expand(-1, 4), g[FROM])


@pytest.mark.parametrize(
    "field",
    [
        lambda m, x: divergence(x, torch.tanh(m.parts[0](x[FROM] - x[TO]))),
        lambda m, x: scattered(x, torch.relu(m.parts[0](x))),
    ],
    ids=["divergence", "both ways"],
)
def test_one_force_that_enters_at_both_ends_of_an_edge_counts_once(field):
    found = middle(lambda: Step(lambda m, x: x - 0.2 * field(m, x), nn.Linear(4, 4)), batch_dim=None)
    assert found.name.startswith("forward Euler")
    assert found.step_size == pytest.approx(0.2)


def test_a_force_along_edges_makes_verlet_with_its_step():
    def rule(x, old, k, f):
        return 2 * x - old - 0.09 * divergence(x, f(x[FROM] - x[TO])), x

    found = identify(trace(TwoSteps(rule).double(), torch.randn(6, 3).double(), batch_dim=None))
    read = [r for r in found if "leapfrog" in r.name or "verlet" in r.name]
    assert len(read) >= 3
    assert all(r.step_size == pytest.approx(0.3) for r in read)


class Kick(nn.Module):
    def __init__(self):
        super().__init__()
        self.f, self.g = nn.Linear(5, 5), nn.Linear(5, 5)

    def forward(self, x, v):
        v = v + 0.3 * (torch.tanh(self.f(x)) + torch.tanh(self.g(x)))
        return x + 0.3 * v, v


class Chain(nn.Module):
    def __init__(self, block):
        super().__init__()
        torch.manual_seed(0)
        self.blocks, self.last = nn.ModuleList([block() for _ in range(5)]), nn.Linear(5, 2)

    def forward(self, x):
        v = torch.tanh(x)
        for block in self.blocks:
            x, v = block(x, v)
        return self.last(x + v)


def test_two_fields_that_kick_a_velocity_together_are_no_two_half_kicks():
    found = identify(trace(Chain(Kick).double(), torch.randn(4, 5).double()))[2]
    assert (found.name, found.step_size) == ("symplectic Euler (position, velocity)", pytest.approx(0.3))


def test_the_same_call_twice_is_one_field():
    found = middle(lambda: Step(lambda m, x: x + 0.25 * (m.parts[0](x).tanh() + m.parts[0](x).tanh()), nn.Linear(4, 4)))
    assert (found.name, found.step_size) == ("forward Euler", pytest.approx(0.5))


@pytest.mark.parametrize(
    ("stencil", "h"),
    [
        (lambda g: g.roll(1, 0) + g.roll(-1, 0) - 2 * g, 1.0),
        (lambda g: torch.cat([g[1:] - g[:-1], 0 * g[:1]]), 0.25),  # what is put together is the value of the field
        (lambda g: g - g.flip(0), 1.0),
    ],
    ids=["laplacian", "difference", "odd part"],
)
def test_a_stencil_on_a_field_is_no_factor_of_zero(stencil, h):
    def step(m, x):
        return x + 0.25 * stencil(torch.tanh(m.parts[0](x)))

    found = middle(lambda: Step(step, nn.Linear(4, 4)), batch_dim=None)
    assert (found.name, found.step_size, found.system) == ("forward Euler", h, "x' = f(x)")


def test_rezero_behind_a_move_is_still_zero():
    gain = nn.Parameter(torch.zeros(1))
    found = middle(lambda: Step(lambda m, x: x + m.scale * m.parts[0](x).roll(1, 0), nn.Linear(4, 4), scale=gain))
    assert "zero now" in found.system


@pytest.mark.parametrize("training", [True, False])
def test_a_table_entry_of_zero_drops_nothing_at_random(training):
    class Sampler(nn.Module):
        def __init__(self):
            super().__init__()
            self.field = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4))

        def forward(self, x):
            for a, b in ((0.9, 0.1), (0.7, 0.3), (0.0, 1.0)):
                table = torch.tensor([a, b])
                kept, taken = (table[torch.full((len(x),), i)][:, None].expand(x.shape) for i in (0, 1))
                x = taken * self.field(x) + kept * x
            return x

    torch.manual_seed(0)
    found = identify(trace(Sampler().train(training), torch.randn(5, 4)))
    assert not any("stochastic" in r.name for r in found)
    assert found[-1].name == "plain"


def test_a_layout_that_changes_once_is_no_change_of_space():
    class Attention(nn.Module):
        def __init__(self, first, last):
            super().__init__()
            self.norm, self.part, self.ends = nn.LayerNorm(8), nn.MultiheadAttention(8, 2), (first, last)

        def forward(self, x):
            x = x.transpose(0, 1) if self.ends[0] else x
            q = self.norm(x)
            x = x + self.part(q, q, q, need_weights=False)[0]
            return x.permute(1, 0, 2) if self.ends[1] else x

    torch.manual_seed(0)
    model = nn.Sequential(*[Attention(i == 0, i == 3) for i in range(4)])
    found = identify(trace(model, torch.randn(3, 5, 8)))
    assert [(r.name, r.evidence) for r in found] == [("forward Euler", "proven")] * 4


def test_a_shape_that_is_only_viewed_anew_is_called_so():
    block = lambda: Step(lambda m, x: x + torch.tanh(m.parts[0](x)), nn.Linear(12, 12))  # noqa: E731
    torch.manual_seed(0)
    found = identify(trace(nn.Sequential(block(), block(), nn.Unflatten(1, (3, 4))), torch.randn(5, 12)))
    assert "laid out" in found[-1].notes[0]
    found = identify(trace(nn.Sequential(block(), block(), nn.Linear(12, 7)), torch.randn(5, 2, 12)))
    assert "laid out" not in found[-1].notes[0]


@pytest.mark.parametrize("new", [True, False], ids=["Gauss-Seidel", "Jacobi"])
def test_gated_pairs_say_their_order_and_their_means(new):
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Linear(5, 5) for _ in range(4))

        def forward(self, x):
            y, z = x, torch.tanh(x)
            for _ in range(5):
                dz, dy = 0.4 * torch.sigmoid(self.a(y)), 0.4 * torch.sigmoid(self.b(y))
                after = (1 - dz) * z + dz * torch.tanh(self.c(y))
                y = (1 - dy) * y + dy * torch.tanh(self.d(after if new else z))
                z = after
            return y + z

    torch.manual_seed(0)
    found = identify(trace(Pair().double(), torch.randn(4, 5).double()))[2]
    assert ("Gauss-Seidel" in found.name) == new
    kept = [float(word) for word in found.convention.split() if word.startswith("0.")]
    assert len(kept) == 2
    assert all(0.7 < a < 0.9 for a in kept)
