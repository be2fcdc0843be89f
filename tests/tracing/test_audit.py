from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from stabkit.tracing import Flow, trace


class Middle(nn.Module):
    """A layer whose output passes through something that autograd does not, or does not truly, differentiate."""

    def __init__(self, function) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.gate = nn.Linear(3, 3)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, self.layer(x))


def flow_through(function) -> Flow:
    return trace(nn.Sequential(nn.Linear(3, 3), nn.Tanh(), Middle(function), nn.Linear(3, 3)), torch.randn(2, 3))


def assert_noted_there(flow: Flow, *words: str) -> None:
    """The note stands at the step of the middle module, and at no other."""
    noted = [step for step in flow.steps if step.notes]
    assert [step.module_path.split(".")[0] for step in noted] == ["2"]
    for word in words:
        assert word in " ".join(noted[0].notes)


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.sign()

    @staticmethod
    def backward(ctx, grad):
        return grad


def no_grad_gate(module: Middle, x: Tensor) -> Tensor:
    with torch.no_grad():
        gate = module.gate(x).sigmoid()
    return x * gate


def no_grad_branch(module: Middle, x: Tensor) -> Tensor:
    with torch.no_grad():
        branch = module.gate(x)
    return x + branch.sin()


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda m, x: StraightThrough.apply(x), ["hand-written backward", "StraightThrough"]),
        (lambda m, x: x + (x.round() - x).detach(), ["without gradient", "detach"]),
        (no_grad_gate, ["without gradient", "2"]),
        (no_grad_branch, ["without gradient", "2"]),
        (lambda m, x: x * torch.from_numpy(x.detach().numpy()).sigmoid(), ["without gradient"]),
        (lambda m, x: x * m.gate(x.detach()).tanh(), ["without gradient", "detach"]),
        (lambda m, x: x.round() + x, ["piecewise constant", "Round"]),
        (lambda m, x: torch.sign(x) * x, ["piecewise constant", "Sign"]),
    ],
    ids=[
        "straight-through Function",
        "straight-through detach",
        "no_grad gate",
        "no_grad branch",
        "numpy",
        "detached",
        "round",
        "sign",
    ],
)
def test_absent_derivatives_are_named_at_their_step(function, words):
    assert_noted_there(flow_through(function), *words)


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch deprecates its own quantised tensors
def test_quantised_layers_say_that_their_jacobian_is_not_theirs():
    middle = Middle(lambda m, x: x + m.gate(x))
    middle.gate = torch.ao.nn.quantized.dynamic.Linear(3, 3)
    flow = trace(nn.Sequential(nn.Linear(3, 3), nn.Tanh(), middle, nn.Linear(3, 3)), torch.randn(2, 3))
    assert_noted_there(flow, "without a derivative")


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: x.relu() + x.abs(),
        lambda m, x: x * x.detach().ge(0),  # a mask carries no derivative that could be lost
        lambda m, x: x + torch.zeros_like(x),
        lambda m, x: nn.functional.dropout(x, 0.5),
        lambda m, x: x - x.max().item() * 0,
        lambda m, x: x[:, x.detach()[0].argsort()],
    ],
)
def test_ordinary_steps_have_no_notes(function):
    assert all(not step.notes for step in flow_through(function).steps)
