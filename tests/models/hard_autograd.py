"""Custom ``autograd.Function``s, stopped gradients and tensor subclasses of the hard cases."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .hard_models import Residual


class Between(nn.Module):
    """A residual block, some function of a module and a tensor, and another residual block."""

    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.before, self.middle, self.after = Residual(4), middle, Residual(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.middle(self.before(x)))


class Binarise(torch.autograd.Function):
    """A straight-through estimator."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sign()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class BinaryLayer(nn.Module):
    """A layer with binary activations."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return Binarise.apply(self.layer(x))


class DetachedRounding(nn.Module):
    """A straight-through estimator without a Function: x + (round(x) - x).detach()."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        return x + ((8 * x).round() / 8 - x).detach()


class NoGradGate(nn.Module):
    """A layer multiplied by a gate that is computed without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.gate = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            gate = self.gate(x).sigmoid()
        return self.layer(x) * gate


class NumpySine(torch.autograd.Function):
    """Forward and backward in numpy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.from_numpy(x.detach().numpy()).sin()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.from_numpy(grad.detach().numpy() * x.detach().cos().numpy())


class OnceSquare(torch.autograd.Function):
    """Not differentiable a second time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * grad


class Calls(nn.Module):
    """A linear layer followed by a custom Function."""

    def __init__(self, function: type[torch.autograd.Function]) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function.apply(self.layer(x))


class _ReversibleFunction(torch.autograd.Function):
    """Keeps only the output of all blocks; the backward recomputes their inputs one after another."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, blocks: list[nn.Module]) -> Tensor:
        ctx.blocks = blocks
        with torch.no_grad():
            for block in blocks:
                x = block(x)
        ctx.output = x.detach()
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        y = ctx.output
        for block in reversed(ctx.blocks):
            with torch.no_grad():
                x = block.inverse(y)
            with torch.enable_grad():
                leaf = x.detach().requires_grad_()
                out = block(leaf)
            (grad,) = torch.autograd.grad(out, leaf, grad)
            y = x
        return grad, None


class AffineCoupling(nn.Module):
    """A coupling layer that can be inverted exactly."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=1)
        a = a + self.f(b).tanh()
        return torch.cat([a, b + self.g(a).tanh()], dim=1)

    def inverse(self, y: Tensor) -> Tensor:
        a, b = y.chunk(2, dim=1)
        b = b - self.g(a).tanh()
        return torch.cat([a - self.f(b).tanh(), b], dim=1)


class RecomputedReversible(nn.Module):
    """Four reversible blocks behind one Function."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 4)
        self.blocks = nn.ModuleList(AffineCoupling() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return _ReversibleFunction.apply(self.stem(x), list(self.blocks))


class Scaled(Tensor):
    """A tensor subclass without behaviour of its own."""


class SubclassLayer(nn.Module):
    """A layer whose weight is a tensor subclass."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4).as_subclass(Scaled))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.weight).tanh()


class GradientReversal(torch.autograd.Function):
    """Ganin et al. 2016: the identity, whose backward changes the sign."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return -grad


class NewStyle(torch.autograd.Function):
    """A Function with ``setup_context``, a vmap rule of its own, and several outputs, one of them an integer."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, power: int) -> tuple[Tensor, Tensor, Tensor]:
        return x**power, x.argmax(-1), x.sin()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.power = inputs[1]
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, first: Tensor, _index: Tensor, second: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return first * ctx.power * x ** (ctx.power - 1) + second * x.cos(), None


class SeveralOutputs(nn.Module):
    """Uses two of the three outputs of a new-style Function."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        cubed, index, sine = NewStyle.apply(self.layer(x), 3)
        return cubed + sine * index.unsqueeze(-1)


class InPlaceFunction(torch.autograd.Function):
    """Writes to its input and says so."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad
