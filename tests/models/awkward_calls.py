"""Models that draw, write to what they are given, hang hooks, or are made in odd ways."""

from __future__ import annotations

import functools
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .awkward_kinds import WIDTH, Awkward, Cache, Net, case, dropped, kind, nothing, put

GENERATOR = np.random.default_rng(3)


kind("random", nothing, dropped(lambda self: random.random()))
kind("numpy.random", nothing, dropped(lambda self: np.random.rand()))  # noqa: NPY002
kind(
    "torch.Generator",
    put(rng=lambda: torch.Generator().manual_seed(1)),
    dropped(lambda self: torch.rand((), generator=self.rng).item()),
)
kind("random.Random", put(rng=lambda: random.Random(1)), dropped(lambda self: self.rng.random()))
kind("np.random.Generator", put(rng=lambda: np.random.default_rng(1)), dropped(lambda self: self.rng.random()))
kind("np.random.RandomState", put(rng=lambda: np.random.RandomState(1)), dropped(lambda self: self.rng.rand()))
kind(
    "generators in a dict", put(rng=lambda: {"a": [random.Random(1)]}), dropped(lambda self: self.rng["a"][0].random())
)
kind("generator of its file", nothing, dropped(lambda self: GENERATOR.random()))
kind("draw by a bound method", put(draw=lambda: random.Random(1).random), dropped(lambda self: self.draw()))
kind(
    "draw by a partial",
    put(draw=lambda: functools.partial(np.random.default_rng(1).uniform, 0, 1)),
    dropped(lambda self: self.draw()),
)
kind("torch.rand", nothing, lambda self, h: h * torch.rand(WIDTH))


def _first_in_place() -> Awkward:
    return Awkward(
        nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)), (torch.randn(3, 4),)
    )


class Popping(Net):
    """Takes things out of what it is given."""

    def forward(self, x: Tensor, given: dict[str, Any]) -> Tensor:
        given["log"].append(1)
        x = super().forward(x) + given.pop("shift", 0.0)
        return x


class Remembering(Net):
    """Writes to a cache that it is given."""

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        if cache is not None:
            cache.update(x)
        return super().forward(x)


def _popping() -> Awkward:
    return Awkward(Popping(), (torch.randn(3, WIDTH), {"log": [], "shift": torch.ones(WIDTH)}))


def _remembering() -> Awkward:
    return Awkward(Remembering(), (torch.randn(3, WIDTH),), {"cache": Cache()})


def _numpy_input() -> Awkward:
    class Scaled(Net):
        def forward(self, x: Tensor, scale: np.ndarray) -> Tensor:
            scale *= 2
            return super().forward(x)

    return Awkward(Scaled(), (torch.randn(3, WIDTH), np.ones(3)))


def _leaf_input() -> Awkward:
    x = torch.randn(3, WIDTH, requires_grad=True)
    x.grad = torch.ones(3, WIDTH)
    return Awkward(Net(), (x,))


case("input, in-place ReLU first", _first_in_place)
case("input, a dict that is emptied", _popping)
case("input, a cache that grows", _remembering)
case("input, a numpy array", _numpy_input)
case("input, a leaf with a gradient", _leaf_input)


def _hooked() -> Awkward:
    net, log = Net(), []
    net.first.register_full_backward_hook(lambda *_: log.append("full"))
    net.first.register_full_backward_pre_hook(lambda *_: log.append("pre"))
    net.second.weight.register_hook(lambda g: log.append("parameter"))
    net.second.weight.register_post_accumulate_grad_hook(lambda p: log.append("accumulated"))
    return Awkward(net, (torch.randn(3, WIDTH),), others={"log": log})


def _counting_hooks() -> Awkward:
    net, log = Net(), []
    net.first.register_forward_hook(lambda *_: log.append("forward"))
    net.first.register_forward_pre_hook(lambda *_: log.append("pre"))
    return Awkward(net, (torch.randn(3, WIDTH),), others={"log": log})


class Counted(torch.autograd.Function):
    """Its backward counts, and writes to the module."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, owner: Any) -> Tensor:
        ctx.owner = owner
        return x.sin()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.owner.passed.append(1)
        ctx.owner.seen.add_(1)
        return grad * 0.5, None


kind("backward that counts", put(passed=list, seen=lambda: torch.zeros(2)), lambda self, h: Counted.apply(h, self))


def _tensor_hook(self: Any, h: Tensor) -> Tensor:
    made = h * 1.0
    if made.requires_grad:
        made.register_hook(lambda g: self.passed.append(1))
    return made


kind("tensor hook that counts", put(passed=list), _tensor_hook)


def _inference() -> Awkward:
    with torch.inference_mode():
        net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    return Awkward(net, (torch.randn(3, 4),))


class Quantised(Net):
    """Learns its scale from what it sees, as observers do."""

    def setup(self) -> None:
        self.fake = torch.ao.quantization.FakeQuantize()

    def touch(self, h: Tensor) -> Tensor:
        return self.fake(h)


class Codebook(Net):
    """Moves its codes towards what it sees."""

    def setup(self) -> None:
        self.register_buffer("codes", torch.randn(4, WIDTH))

    def touch(self, h: Tensor) -> Tensor:
        nearest = torch.cdist(h.detach(), self.codes).argmin(1)
        self.codes[nearest] = 0.9 * self.codes[nearest] + 0.1 * h.detach()
        return h + (self.codes[nearest] - h).detach()


class Scripted(nn.Module):
    """Counts its calls in TorchScript."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.calls = 0
        self.register_buffer("mean", torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = torch.tanh(self.first(x))
        self.mean += x.detach().mean(0)
        return self.head(x)


class OwnOptimizer(Net):
    """Trains a part of itself while it runs."""

    def setup(self) -> None:
        self.inner = nn.Linear(WIDTH, 1)
        self.optimizer = torch.optim.Adam(self.inner.parameters(), 0.1)

    def touch(self, h: Tensor) -> None:
        with torch.enable_grad():
            self.optimizer.zero_grad()
            for p in self.inner.parameters():
                p.grad = torch.ones_like(p)
            self.optimizer.step()


class Process(Net):
    """Changes settings of the process, and puts none back."""

    def touch(self, h: Tensor) -> None:
        torch.manual_seed(5)
        random.seed(5)
        np.random.seed(5)  # noqa: NPY002


class Raising(Net):
    """Fails after it has changed something."""

    def setup(self) -> None:
        self.log: list[int] = []

    def touch(self, h: Tensor) -> None:
        self.log.append(1)
        with torch.no_grad():
            self.second.weight.add_(1)
        raise ValueError("after a write")


case("hooks of the way back", _hooked)
case("hooks of the forward pass that count", _counting_hooks)
case("parameters made under inference_mode", _inference)
case("fake quantisation", Quantised)
case("codebook", Codebook)
case("TorchScript with a counter", lambda: torch.jit.script(Scripted()))
case("trains a part of itself", OwnOptimizer)
case("seeds the process", Process)
case("raises after a write", Raising)
case("lazy modules", lambda: nn.Sequential(nn.LazyLinear(4), nn.Tanh(), nn.LazyLinear(4)))
case("tied parameters", lambda: (net := Net(), setattr(net.second, "weight", net.first.weight))[0])
