"""Backwards written by hand: those that break the chain rule are told, those that differ on purpose are not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional

import stabkit
from stabkit.diagnosis import Finding, examine

X = torch.randn(64, 6, generator=torch.Generator().manual_seed(1))
Y = (X[:, 0] * X[:, 1] > 0).long()


class Mish(Function):
    """Returns its derivative, whatever comes back."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * torch.tanh(functional.softplus(x))

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        t = torch.tanh(functional.softplus(x))
        return t + x * (1 - t * t) * torch.sigmoid(x)


class Sine(Function):
    """With a context that is set up apart; what comes back is added."""

    @staticmethod
    def forward(x, rate):
        return torch.sin(rate * x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0])
        ctx.rate = inputs[1]

    @staticmethod
    def backward(ctx, grad):
        return grad + ctx.rate * torch.cos(ctx.rate * ctx.saved_tensors[0]), None


class Times(Function):
    """A linear layer whose gradient by the weight is that of another sample each."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.t() @ x.flip(0)


class Round(Function):
    @staticmethod
    def forward(ctx, x):
        return torch.round(4 * x) / 4

    @staticmethod
    def backward(ctx, grad):
        return grad


class Sign(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.sign(x)

    @staticmethod
    def backward(ctx, grad):
        return grad * (ctx.saved_tensors[0].abs() < 1)


class Spike(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        return grad / (1 + (3 * ctx.saved_tensors[0]) ** 2)


class Reversed(Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return -0.3 * grad


class Clipped(Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad.clamp(-0.01, 0.01)


class Clamp(Function):
    """Straight through where it is cut."""

    @staticmethod
    def forward(ctx, x):
        return x.clamp(-1, 1)

    @staticmethod
    def backward(ctx, grad):
        return grad


class Tanh(Function):
    """As it should be."""

    @staticmethod
    def forward(ctx, x):
        y = torch.tanh(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, grad):
        (y,) = ctx.saved_tensors
        return grad * (1 - y * y)


class Dropped(Function):
    """Draws a mask."""

    @staticmethod
    def forward(ctx, x):
        mask = (torch.rand_like(x) > 0.2).to(x.dtype)
        ctx.save_for_backward(mask)
        return x * mask

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0]


class WithLoss(Function):
    """Carries a loss of its own, as balanced experts do."""

    @staticmethod
    def forward(ctx, x, extra):
        ctx.save_for_backward(extra)
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad, 0.01 * torch.ones_like(ctx.saved_tensors[0])


class Fused(Function):
    """A loss that knows that 1 comes back to it."""

    @staticmethod
    def forward(ctx, x, labels):
        ctx.save_for_backward(x, labels)
        return functional.cross_entropy(x, labels)

    @staticmethod
    def backward(ctx, grad):
        x, labels = ctx.saved_tensors
        return (x.softmax(1) - functional.one_hot(labels, x.shape[1]).to(x)) / len(x), None


bound = Mish.apply  # as it is often called


class Net(nn.Module):
    def __init__(self, between: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c, self.between = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 2), between

    def forward(self, x: Tensor) -> Tensor:
        x = self.between(self.a(x), self)
        return self.c(torch.tanh(self.between(self.b(x), self)))


def said(between: Any, loss: Any = lambda out: functional.cross_entropy(out, Y)) -> list[Finding]:
    model = Net(between)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    found = [f for f in examine(stabkit.trace(model, X), loss).findings if f.kind == "wrong_derivative"]
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())
    return found


@pytest.mark.parametrize(
    ("between", "name", "what"),
    [
        (lambda x, net: Mish.apply(x), "Mish", "even where nothing comes back"),
        (lambda x, net: bound(x), "Mish", "even where nothing comes back"),
        (lambda x, net: Sine.apply(x, 2.0), "Sine", "even where nothing comes back"),
        (lambda x, net: Times.apply(x, net.b.weight) if x.shape[1] == 16 else x, "Times", "is not the derivative"),
    ],
)
def test_a_backward_that_is_no_derivative_is_told_with_what_the_derivative_is_worth(between, name, what):
    forward = {each: each.__dict__["forward"] for each in (Mish, Sine, Times)}
    (found,) = said(between)
    assert found.severity == "warning"
    assert f"the backward of {name}" in found.evidence
    assert what in found.evidence
    assert "with the derivative in its place" in found.evidence
    assert all(each.__dict__["forward"] is kept for each, kept in forward.items())


@pytest.mark.parametrize("function", [Round, Sign, Spike, Reversed, Clipped, Clamp, Tanh, Dropped])
def test_a_gradient_that_is_right_or_other_on_purpose_raises_nothing(function):
    assert said(lambda x, net: function.apply(x)) == []


def test_losses_that_ride_along_or_end_the_chain_raise_nothing():
    assert said(lambda x, net: WithLoss.apply(x, net.b.weight.square().mean())) == []
    assert said(lambda x, net: torch.tanh(x), lambda out: Fused.apply(out, Y)) == []
