from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from stabkit.identification import identify
from stabkit.tracing import trace

WIDTH = 8


class PrimalDual(nn.Module):
    """Rounds of Chambolle and Pock; the data are the first iterate."""

    def __init__(self, prox, tied=True, rounds=5):
        super().__init__()
        self.maps = nn.ModuleList([nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(1 if tied else rounds)])
        self.prox, self.rounds = prox, rounds

    def forward(self, b):
        x = ahead = b
        y = torch.zeros_like(b)
        for i in range(self.rounds):
            K = self.maps[i % len(self.maps)]
            y = torch.tanh(y + 0.3 * K(ahead))
            new = self.prox(x - 0.2 * y @ K.weight - 0.2 * (x - b))
            x, ahead = new, 2 * new - x
        return x


class AttentionOverLayers(nn.Module):
    """Each layer reads a softmax over what the earlier ones gave out; the mean of all is the result."""

    def __init__(self, depth=3):
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(WIDTH, 16), nn.GELU(), nn.Linear(16, WIDTH))] * depth)
        self.queries = nn.ParameterList([nn.Parameter(torch.randn(WIDTH)) for _ in range(depth)])

    def forward(self, x):
        values = [x]
        for layer, query in zip(self.layers, self.queries, strict=True):
            held = torch.stack(values)
            weights = (functional.rms_norm(held, (WIDTH,)) * query).sum(-1).softmax(0).unsqueeze(-1)
            values.append(layer((weights * held).sum(0)))
        return sum(values) / len(values)


class Hierarchical(nn.Module):
    """Two maps in turn, all rounds but the last without a gradient; few rounds, which do not settle."""

    def __init__(self):
        super().__init__()
        self.high, self.low = (nn.Sequential(nn.Linear(WIDTH, 16), nn.SiLU(), nn.Linear(16, WIDTH)) for _ in "HL")

    def forward(self, x):
        high = low = x
        with torch.no_grad():
            for k in range(3):
                low = self.low(low + high + x)
                high = self.high(high + low) if k % 2 else high
        return self.high(high + self.low(low + high + x))


class CrateLayer(nn.Module):
    """A residual map, and then a step of ISTA at the normalised state."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)])
        self.mix, self.D = nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.randn(WIDTH, WIDTH) / WIDTH**0.5)

    def forward(self, x):
        z = self.norms[1](x + torch.tanh(self.mix(self.norms[0](x))))
        gradient = functional.linear(z - functional.linear(z, self.D), self.D.t())
        return functional.relu(z + 0.1 * gradient - 0.01)


def records(model):
    torch.manual_seed(0)
    return identify(trace(model, torch.randn(3, WIDTH)))


def shrink(x):
    return functional.softshrink(x, 0.05)


# the proximal map, and what is said of it; one that is a number is a part of the step
PROXIMAL = [(torch.tanh, "Tanh"), (shrink, "Tanh, soft threshold"), (lambda x: x / 1.2, "Tanh")]


@pytest.mark.parametrize(("prox", "maps"), PROXIMAL)
def test_rounds_with_the_same_weights_are_steps_of_two_states(prox, maps):
    found = [r for r in records(PrimalDual(prox)) if r.name not in ("fork", "join")]
    *rounds, joined, last = found
    name = f"primal-dual hybrid gradient (Chambolle-Pock, theta = 1), then {maps} (proximal)"
    assert [r.name for r in rounds] == [name] * 3
    assert {(r.method.states, r.skip, r.evidence) for r in rounds} == {(2, None, "measured")}
    assert joined.name.startswith("primal-dual hybrid gradient (Chambolle-Pock, theta = 1), then Tanh")
    assert joined.notes[0].endswith("a join")
    assert last.name in ("plain", "linear recurrence (a = 0.833)")


@pytest.mark.parametrize("prox", [prox for prox, *_ in PROXIMAL])
def test_rounds_that_were_taken_together_are_named_by_none_of_them(prox):
    whole, last = records(PrimalDual(prox, tied=False))
    assert whole.steps == (0, 1, 2, 3, 4)
    assert whole.name.startswith("unnamed composition")
    assert whole.evidence == "measured"
    assert last.name in ("plain", "linear recurrence (a = 0.833)")


def test_the_mean_of_all_layers_proves_no_damping():
    (whole,) = records(nn.Sequential(AttentionOverLayers()))
    assert (whole.name, whole.evidence) == ("unnamed composition of 4 stages, a = 0.25", "measured")
    assert whole.skip == pytest.approx(0.25)


def test_a_few_rounds_off_the_graph_are_no_fixed_point():
    rounds, *rest = records(Hierarchical())
    assert (rounds.name, rounds.evidence, rounds.method) == ("unknown", "unknown", None)
    assert "no fixed point was found in them" in rounds.notes[0]
    assert [record.name for record in rest] == ["plain", "transition", "transition", "plain", "transition"]


def test_a_norm_and_a_rectifier_after_different_additions_prove_no_projection():
    found = records(nn.Sequential(*[CrateLayer() for _ in range(3)]))
    assert [(r.name, r.evidence, r.skip) for r in found] == [("projected Euler (post-norm)", "measured", None)] * 3
    for record in found:
        assert "the skip passes 1 norm(s) after 2 addition(s), so no single a describes it" in record.notes
        assert "after the addition: NativeLayerNorm, Relu" in record.notes


@pytest.mark.parametrize("cut_inside", [False, True])
def test_a_momentum_with_two_fields_at_one_point(cut_inside: bool):
    """Variational networks with inertia: the gradient of the data and a regulariser, each with a number of its own."""

    class Inertial(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            net = lambda: nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 6))  # noqa: E731
            self.f, self.g = (nn.ModuleList(net() for _ in range(5)) for _ in range(2))
            self.register_buffer("A", torch.randn(6, 6))

        def forward(self, x):
            old = 0.9 * x
            for f, g in zip(self.f, self.g, strict=True):
                data = ((x @ self.A.T) @ self.A) if cut_inside else g(x)
                x, old = x + 0.5 * (x - old) - 0.3 * data - f(x), x
            return x

    torch.manual_seed(0)
    found = [r for r in identify(trace(Inertial(), torch.randn(3, 6))) if r.method is not None and r.method.states == 2]
    assert len(found) >= 3
    assert {r.name for r in found} == {"momentum (gamma = 0.5) of two fields at one point"}
    assert all(r.evidence == "proven" and r.convention.startswith("h: the largest of the numbers") for r in found)
