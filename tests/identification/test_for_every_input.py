"""What is proven holds for every input: numbers that an input of the model makes, on the graph, off it or in Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stabkit.identification import Identification, identify
from stabkit.tracing import trace

D = 6


class Block(nn.Module):
    """A block whose forward is a function of it, the state, and what else the model is given."""

    def __init__(self, step: Callable[..., Tensor]) -> None:
        super().__init__()
        self.step = step
        self.f = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D))
        self.alpha = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor, *given: Any) -> Tensor:
        return self.step(self, x, *given)


class Network(nn.Module):
    """Three blocks that are given the same."""

    def __init__(self, step: Callable[..., Tensor]) -> None:
        super().__init__()
        self.first = nn.Linear(4, D)
        self.blocks = nn.ModuleList(Block(step) for _ in range(3))

    def forward(self, x: Tensor, *given: Any) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x, *given)
        return x


def read(step: Callable[..., Tensor], *given: Any) -> Identification:
    """What is read off the middle block."""
    torch.manual_seed(0)
    flow = trace(Network(step).double(), torch.randn(2, 4).double(), *given, source="0")
    return next(r for r in identify(flow, checks=False) if 2 in r.steps)


ONES, TIMES = torch.ones(2, D).double(), torch.tensor([0.0, 0.25]).double()
FED: dict[str, tuple[Callable[..., Tensor], tuple[Any, ...]]] = {
    "a mask of ones on the skip": (lambda s, x, m: (x - s.f(x)) * m, (ONES,)),
    "a mask of true": (lambda s, x, m: (x + s.f(x)) * m, (ONES.bool(),)),
    "a mask of integers": (lambda s, x, m: x * m + s.f(x), (ONES.long(),)),
    "in place": (lambda s, x, m: (x + s.f(x)).mul_(m), (ONES,)),
    "filled": (lambda s, x, m: (x + s.f(x)).masked_fill(~m, 0.0), (ONES.bool(),)),
    "chosen": (lambda s, x, m: torch.where(m, x + s.f(x), x), (ONES.bool(),)),
    "lengths": (lambda s, x, n: (x + s.f(x)) * (torch.arange(D) < n[:, None]), (torch.full((2,), D),)),
    "a share": (lambda s, x, m: x + s.f(x) / m.to(x).mean(), (ONES.bool(),)),
    "an index": (lambda s, x, i: x.index_select(1, i) + s.f(x), (torch.arange(D),)),
    "a weight": (lambda s, x, w: torch.lerp(x, s.f(x), w), (torch.tensor(0.5).double(),)),
    "a step size": (lambda s, x, t: x + (t[1] - t[0]) * s.f(x), (TIMES,)),
    "a damping": (lambda s, x, a: a * x + (1 - a) * s.f(x), (torch.tensor(0.5).double(),)),
    "a mask of zeros": (lambda s, x, m: m * x + s.f(x), (0 * ONES,)),
    "before a rectifier": (lambda s, x, m: torch.relu((x + s.f(x)) * m), (ONES,)),
    "before a norm": (lambda s, x, m: torch.layer_norm((x + s.f(x)) * m, (D,)), (ONES.bool(),)),
    "at a stage": (lambda s, x, m: x + 0.5 * (s.f(x) + s.f(m * x + s.f(x))), (ONES,)),
    "no gradient": (lambda s, x, m: (x + s.f(x)) * m.detach(), (ONES,)),
}


@pytest.mark.parametrize("kind", FED)
def test_numbers_that_another_input_makes_are_measured(kind):
    step, given = FED[kind]
    assert read(step, *given).evidence == "measured"


def rounds(s, x, n):
    for _ in range(int(n)):
        x = x + 0.5 * s.f(x)
    return x


HANDED: dict[str, tuple[Callable[..., Tensor], tuple[Any, ...]]] = {
    "a step size": (lambda s, x, t: x + (t[1] - t[0]).item() * s.f(x), (TIMES,)),
    "a step size of 1": (lambda s, x, t: x + float(t.detach()) * s.f(x), (torch.tensor(1.0),)),
    "a list": (lambda s, x, t: x + t.tolist()[0] * s.f(x), (torch.tensor([2]),)),
    "an array": (lambda s, x, t: x + float(t.numpy()[0]) * s.f(x), (torch.tensor([2]),)),
    "a number": (lambda s, x, t: x + t * s.f(x), (0.5,)),
    "a branch": (lambda s, x: x + s.f(x) if bool(x.sum() > 0) else x - 0.5 * s.f(x), ()),
    "a size": (lambda s, x: x + min(1.0, 30 / x.detach().norm().item()) * s.f(x), ()),
    "a count": (rounds, (torch.tensor(3),)),
}


@pytest.mark.parametrize("kind", HANDED)
def test_numbers_that_python_reads_off_an_input_are_measured(kind):
    step, given = HANDED[kind]
    found = read(step, *given)
    assert found.evidence == "measured"
    assert "handed to Python" in found.notes[0]


def checked(s, x, m):
    """Code looks whether there is anything to mask before it does."""
    y = s.f(x if bool(m.all()) else x * m)
    return x + y


KEPT: dict[str, tuple[Callable[..., Tensor], tuple[Any, ...]]] = {
    "a learned number": (lambda s, x: x + s.alpha * s.f(x), ()),
    "a mask inside the field": (lambda s, x, m: x + s.f(x * m), (ONES,)),
    "what is added": (lambda s, x, u: x + s.f(x) + u, (ONES,)),
    "a check that leaves the step as it is": (checked, (ONES.bool(),)),
    "a map": (lambda s, x, m: s.f(x) * m, (ONES,)),
    "a mask of the shape alone": (lambda s, x, m: (x + s.f(x)) * torch.ones_like(m), (ONES,)),
}


@pytest.mark.parametrize("kind", KEPT)
def test_what_no_input_changes_is_proven(kind):
    step, given = KEPT[kind]
    assert read(step, *given).evidence == "proven"


def test_a_step_with_two_states_is_measured_where_a_mask_multiplies_one():
    class Momentum(nn.Module):
        def __init__(self):
            super().__init__()
            self.fields = nn.ModuleList(nn.Sequential(nn.Linear(D, D), nn.Tanh()) for _ in range(4))

        def forward(self, x, m):
            v = self.fields[0](x)
            for f in self.fields:
                v = (0.9 * v + f(x)) * m
                x = x + v
            return x

    for mask in (ONES, ONES.bool()):
        found = identify(trace(Momentum().double(), torch.randn(2, D).double(), mask, source="0"), checks=False)
        assert [(r.name, r.evidence) for r in found[1:4]] == [("momentum (gamma = 0.9)", "measured")] * 3


@pytest.mark.parametrize("factor", [0.01, 0.3, 3.0, 100.0])
@pytest.mark.parametrize("kind", KEPT)
def test_what_is_proven_is_the_same_at_other_inputs(kind, factor):
    step, given = KEPT[kind]
    other = tuple((torch.rand(m.shape) < 0.5).to(m) if m.dtype == torch.bool else m * factor for m in given)
    a, b = read(step, *given), read(step, *other)
    assert (a.name, a.skip, a.step_size) == (b.name, b.skip, b.step_size)


def test_a_branch_without_a_derivative_is_no_proof_that_there_is_none():
    """What is made of the detached state, in a buffer as well, is added: gradients see the skip alone."""

    def step(m: Any, x: Tensor) -> Tensor:
        made = torch.zeros_like(x.detach())
        made.add_(m.f(x.detach()))
        return x + 0.1 * made

    torch.manual_seed(0)
    found = identify(trace(nn.Sequential(*(Block(step) for _ in range(3))), torch.randn(3, D)))
    assert {(record.name, record.evidence) for record in found} == {("no branch that gradients see", "measured")}
