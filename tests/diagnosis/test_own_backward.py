"""Functions whose backward computes the gradients of parameters by itself, as those of reversible networks do."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import stabkit
from stabkit.tracing.recording.training_pass import training_pass


class Recomputed(torch.autograd.Function):
    """y2 = x2 + f(x1) without a graph; on the way back f runs again, and puts gradients into its parameters."""

    @staticmethod
    def forward(ctx, x, layers):
        for layer in layers:
            x = x + torch.tanh(layer(x))
        ctx.save_for_backward(x)
        ctx.layers, ctx.given = layers, x
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            start = x.detach().requires_grad_()
            out = start
            for layer in ctx.layers:
                out = out + torch.tanh(layer(out))
            torch.autograd.backward(out, grad)
        return start.grad, None


class Net(nn.Module):
    def __init__(self, unused: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 3)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        if unused:
            self.idle = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(Recomputed.apply(self.first(x), self.layers))


X = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))


def test_what_a_function_puts_into_grad_is_a_gradient_and_comes_back():
    model = Net()
    model.layers[0].weight.grad = held = torch.ones(6, 6)
    flow = stabkit.trace(model, X)
    found = training_pass(flow.forward_pass, lambda out: out.square().mean()).gradients
    assert model.layers[0].weight.grad is held
    assert bool((held == 1).all())
    assert model.layers[1].weight.grad is None
    plain = Net()
    plain(X).square().mean().backward()
    for path, parameter in plain.named_parameters():
        torch.testing.assert_close(found[path], parameter.grad)


def test_only_what_gets_none_is_told():
    for loss in (None, lambda out: out.square().mean()):
        assert "no_gradient" not in [f.kind for f in stabkit.analyze(Net(), X, loss=loss).findings]
        (found,) = [f for f in stabkit.analyze(Net(unused=True), X, loss=loss).findings if f.kind == "no_gradient"]
        assert "idle.weight" in found.evidence
        assert "layers" not in found.evidence


class Inner(nn.Module):
    """Its forward pass takes a step of its own along a gradient that it asks autograd for."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.energy, self.last = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        start = x.detach().requires_grad_()
        torch.autograd.backward(self.energy(start).square().sum())
        self.energy.zero_grad()
        return self.last(x - 0.1 * start.grad)


def test_a_forward_pass_that_calls_backward_is_no_other_thread():
    model = Inner()
    assert len(stabkit.trace(model, X).steps) >= 1
    assert all(parameter.grad is None for parameter in model.parameters())
