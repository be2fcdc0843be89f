"""Models that change something of theirs, or of the process, whenever they run: what an analysis has to put back.

Every kind is a residual network with a `touch` in its middle. ``CASES`` holds what builds each: the model, what it is
called with, and what else of the user's hangs on it (lists in closures, logs of hooks).
"""

from __future__ import annotations

import functools
import itertools
import random
import types
from collections import Counter, OrderedDict, UserDict, UserList, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


@dataclass
class Awkward:
    """A model, what it is called with, and what else must be left alone; ``step`` may be iterated."""

    model: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    others: dict[str, Any] = field(default_factory=dict)
    step: Callable[[Tensor], Tensor] | None = None


CASES: dict[str, Callable[[], Awkward]] = {}
WIDTH = 4


class Net(nn.Module):
    """x + tanh(W x), twice, around what a kind of model does; then a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.setup()

    def setup(self) -> None:
        """What a kind holds beside its layers."""

    def touch(self, h: Tensor) -> Tensor | None:
        """What it does whenever it runs; the new state, or None."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(x).tanh()
        made = self.touch(x)
        x = x if made is None else made
        return self.head(x + self.second(x).tanh())


def case(name: str, build: Callable[[], Awkward | Any]) -> None:
    """Under a name, what builds a model, or one with all else."""

    def made() -> Awkward:
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        found = build()
        found = found if isinstance(found, Awkward) else Awkward(found, (torch.randn(3, WIDTH),))
        if found.step is None and isinstance(found.model, Net):
            found.step = found.model
        return found

    assert name not in CASES
    CASES[name] = made


def kind(name: str, setup: Callable[[Any], Any], touch: Callable[[Any, Tensor], Any], **more: Any) -> None:
    """A `Net` with this setup and touch; ``more`` are further attributes of its class."""

    def returned(self: Any, h: Tensor) -> Tensor | None:
        made = touch(self, h)
        return made if isinstance(made, Tensor) else None

    body = {"setup": lambda self: setup(self) and None, "touch": returned, **more}
    case(name, lambda: types.new_class("Kind", (Net,), exec_body=lambda space: space.update(body))())


def put(**attributes: Callable[[], Any]) -> Callable[[Any], None]:
    """A setup that makes attributes."""

    def setup(self: Any) -> None:
        for name, make in attributes.items():
            setattr(self, name, make())

    return setup


# ------------------------------------------------------------------ parameters and buffers


def nothing(self: Any) -> None:
    """No setup."""


def off_graph(function: Callable[[Any], Any]) -> Callable[[Any, Tensor], None]:
    """A touch without gradients."""

    def touch(self: Any, _: Tensor) -> None:
        with torch.no_grad():
            function(self)

    return touch


kind("parameter, mul_", nothing, off_graph(lambda self: self.second.weight.mul_(1.1)))
kind("parameter, .data write", nothing, lambda self, h: self.second.weight.data.add_(0.1) is None)
kind(
    "parameter, .data replaced", nothing, lambda self, h: setattr(self.second.weight, "data", self.second.weight * 1.1)
)
kind(
    "parameter, numpy view", nothing, lambda self, h: np.multiply(w := self.second.weight.detach().numpy(), 1.1, out=w)
)
kind(
    "parameter, numpy view kept",
    lambda self: setattr(self, "view", self.second.weight.detach().numpy()),
    lambda self, h: self.view.__imul__(1.1) is None,
)
kind(
    "parameter, np.asarray",
    nothing,
    lambda self, h: np.asarray(self.second.bias.detach()).__iadd__(1) is None,
)
kind("parameter, foreach", nothing, off_graph(lambda self: torch._foreach_mul_(list(self.second.parameters()), 1.1)))
kind(
    "parameter, storage",
    nothing,
    lambda self, h: self.second.bias.untyped_storage().__setitem__(1, 7),
)
kind("parameter, dlpack", nothing, lambda self, h: torch.from_dlpack(self.second.bias.detach()).mul_(2) is None)
kind("parameter, set_", nothing, off_graph(lambda self: self.second.bias.set_(torch.ones(WIDTH))))
kind(
    "parameter replaced by another",
    nothing,
    lambda self, h: setattr(self.second, "weight", nn.Parameter(self.second.weight * 1.1)),
)
kind(
    "parameter deleted",
    put(extra=lambda: nn.Parameter(torch.ones(2))),
    lambda self, h: self._parameters.pop("extra", 0) is None,
)
kind("parameter registered", nothing, lambda self, h: self.register_parameter("late", nn.Parameter(torch.ones(2))))
kind(
    "weights renormalised before use",
    nothing,
    off_graph(lambda self: self.second.weight.div_(self.second.weight.norm(dim=0))),
)
kind("requires_grad switched", nothing, lambda self, h: self.second.weight.requires_grad_(False) is None)
kind(
    "gradient written in place",
    lambda self: setattr(self.second.weight, "grad", torch.ones(WIDTH, WIDTH)),
    off_graph(lambda self: self.second.weight.grad.mul_(2) if self.second.weight.grad is not None else None),
)
kind(
    "gradient by numpy",
    lambda self: setattr(self.second.weight, "grad", torch.ones(WIDTH, WIDTH)),
    lambda self, h: self.second.weight.grad.numpy().__iadd__(1) is None,
)
kind(
    "gradient replaced",
    lambda self: setattr(self.second.weight, "grad", torch.ones(WIDTH, WIDTH)),
    lambda self, h: setattr(self.second.weight, "grad", torch.zeros(WIDTH, WIDTH)),
)
kind(
    "buffer, exponential average",
    lambda self: self.register_buffer("mean", torch.zeros(WIDTH)),
    lambda self, h: self.mean.mul_(0.9).add_(h.detach().mean(0), alpha=0.1) is None,
)
kind(
    "buffer replaced",
    lambda self: self.register_buffer("count", torch.zeros(())),
    lambda self, h: setattr(self, "count", self.count + 1),
)
kind(
    "buffer that holds the graph",
    lambda self: self.register_buffer("memory", torch.zeros(3, WIDTH)),
    lambda self, h: self.memory.__setitem__(slice(0, 3), h) or (h + 0.1 * self.memory),
)
kind(
    "buffer, numpy",
    lambda self: self.register_buffer("count", torch.zeros(2)),
    lambda self, h: self.count.numpy().__iadd__(1) is None,
)
kind(
    "buffer, view of another",
    lambda self: [self.register_buffer("whole", torch.zeros(4)), self.register_buffer("part", self.whole[1:3])],
    lambda self, h: self.part.add_(1) is None,
)
case("batch norm in training", lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 4)))
case(
    "spectral norm in training",
    lambda: nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)), nn.Tanh(), nn.Linear(4, 4)),
)
case("old weight norm", lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 4)))
case(
    "embedding, max_norm",
    lambda: Awkward(
        nn.Sequential(nn.Embedding(5, 4, max_norm=0.5), nn.Linear(4, 4), nn.Tanh()), (torch.tensor([[0, 1], [2, 3]]),)
    ),
)
case("dropout", lambda: nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.3), nn.Linear(4, 4)))
case("LSTM", lambda: Awkward(nn.LSTM(4, 4, 2, dropout=0.2, batch_first=True), (torch.randn(2, 3, 4),)))


# ------------------------------------------------------------------ attributes


class Slots:
    """Has no ``__dict__``."""

    __slots__ = ("count", "table")

    def __init__(self) -> None:
        self.count, self.table = 0, {"seen": []}


class Holder:
    """A plain object with everything in it."""

    def __init__(self) -> None:
        self.count = 0
        self.inner = types.SimpleNamespace(list=[1], tensor=torch.zeros(3, WIDTH))


class OwnList(list):
    """A list with a counter of its own."""

    appended = 0

    def append(self, item: Any) -> None:
        self.appended += 1
        super().append(item)


class OwnDict(dict):
    """A dictionary that refuses to be cleared."""

    def clear(self) -> None:
        raise TypeError("not this one")


class Cache:
    """Keys and values, layer by layer, as language models keep them."""

    def __init__(self) -> None:
        self.keys: list[Tensor] = [torch.zeros(3, 2, WIDTH)]
        self.seen = 0

    def update(self, h: Tensor) -> None:
        self.keys[0] = torch.cat([self.keys[0], h.detach().unsqueeze(1)], dim=1)
        self.seen += 1


def count_up(self: Any, _: Tensor) -> None:
    self.count = self.count + 1


kind("attribute, a number", put(count=int), count_up)
kind("attribute made", nothing, lambda self, h: setattr(self, "late", h.detach()))
kind("attribute deleted", put(extra=list), lambda self, h: self.__dict__.pop("extra", None) and None)
kind("attribute on the graph", nothing, lambda self, h: setattr(self, "last", h))
kind(
    "tensor written in place",
    put(seen=lambda: torch.zeros(3, WIDTH)),
    lambda self, h: self.seen.add_(h.detach()) is None,
)
kind(
    "tensor written on the graph",
    put(seen=lambda: torch.zeros(3, WIDTH)),
    lambda self, h: self.seen.copy_(h) * 0.1 + h,
)
kind(
    "view written on the graph",
    put(seen=lambda: torch.zeros(6, WIDTH)[:3]),
    lambda self, h: self.seen.copy_(h) * 0.1 + h,
)
kind(
    "schedule by a counter",
    put(count=lambda: {"n": [0]}),
    lambda self, h: (self.count["n"].__setitem__(0, self.count["n"][0] + 1), h * (1 + 0.1 * self.count["n"][0]))[-1],
)
kind("list appended", put(log=list), lambda self, h: self.log.append(float(h.sum())))
kind("list of a list", put(log=lambda: [[[0]]]), lambda self, h: self.log[0][0].append(1))
kind("list of tensors written", put(log=lambda: [torch.zeros(2)]), lambda self, h: self.log[0].add_(1) is None)
kind("tuple of lists", put(log=lambda: ([], {})), lambda self, h: self.log[0].append(1))
kind("tuple of tensors", put(log=lambda: (torch.zeros(2),)), lambda self, h: self.log[0].add_(1) is None)
kind("dict in dict", put(log=lambda: {"a": {"b": 0}}), lambda self, h: self.log["a"].update(b=self.log["a"]["b"] + 1))
kind("dict of tensors written", put(log=lambda: {"a": torch.zeros(2)}), lambda self, h: self.log["a"].add_(1) is None)
kind("defaultdict", put(log=lambda: defaultdict(list)), lambda self, h: self.log["k"].append(1))
kind("Counter", put(log=Counter), lambda self, h: self.log.update("ab"))
kind("OrderedDict", put(log=lambda: OrderedDict(a=1, b=2)), lambda self, h: self.log.move_to_end("a"))
kind("deque", put(log=lambda: deque([1, 2], maxlen=2)), lambda self, h: self.log.append(3))
kind("set", put(log=lambda: {1}), lambda self, h: self.log.add(len(self.log)))
kind("bytearray", put(log=lambda: bytearray(b"ab")), lambda self, h: self.log.append(1))
kind("UserDict and UserList", put(log=lambda: UserDict(a=UserList([1]))), lambda self, h: self.log["a"].append(1))
kind("subclass of list", put(log=OwnList), lambda self, h: self.log.append(1))
kind("subclass of dict", put(log=OwnDict), lambda self, h: self.log.update(a=len(self.log)))
kind("object", put(log=Holder), lambda self, h: setattr(self.log, "count", self.log.count + 1))
kind("object in object", put(log=Holder), lambda self, h: self.log.inner.list.append(1))
kind("tensor of an object", put(log=Holder), lambda self, h: self.log.inner.tensor.copy_(h) * 0.1 + h)
kind(
    "slots",
    put(log=Slots),
    lambda self, h: (setattr(self.log, "count", 1 + self.log.count), self.log.table["seen"].append(1)),
)
kind("numpy array", put(log=lambda: np.zeros(3)), lambda self, h: self.log.__iadd__(1) is None)
kind(
    "numpy arrays in a dict",
    put(log=lambda: {"a": np.zeros((2, 2))}),
    lambda self, h: self.log["a"].fill(h.sum().item()),
)
kind(
    "numpy array of objects",
    put(log=lambda: np.array([[], {}, 1], dtype=object)),
    lambda self, h: self.log[0].append(1),
)
kind("KV cache", put(cache=Cache), lambda self, h: self.cache.update(h))
kind("counter of itertools", put(ids=itertools.count), lambda self, h: next(self.ids) < 0)
kind("iterator of a list", put(ids=lambda: iter(range(100000))), lambda self, h: next(self.ids) < 0)
kind("cycle", put(ids=lambda: itertools.cycle([1.0, 1.1])), lambda self, h: h * next(self.ids))
kind("generator", put(ids=lambda: (i for i in range(10**6))), lambda self, h: next(self.ids) < 0)
kind("class attribute", nothing, lambda self, h: setattr(type(self), "runs", type(self).runs + 1), runs=0)
kind("list of the class", nothing, lambda self, h: self.runs.append(1), runs=[])
kind(
    "weights of the engine's parts",
    put(scale=lambda: torch.ones(WIDTH, requires_grad=True)),
    off_graph(lambda self: self.scale.mul_(1.1)),
)
kind("training flag", nothing, lambda self, h: self.second.eval() is None)
kind("hook registered", nothing, lambda self, h: self.second.register_forward_hook(lambda *_: None) is None)
kind("module replaced", nothing, lambda self, h: setattr(self, "head", nn.Linear(WIDTH, WIDTH)))
kind("module added", nothing, lambda self, h: self.add_module("late", nn.Linear(1, 1)))


def _shared() -> Awkward:
    log: list[int] = []
    state = {"n": 0}

    class Closing(Net):
        def touch(self, h: Tensor) -> None:
            log.append(1)
            state["n"] += 1

    return Awkward(Closing(), (torch.randn(3, WIDTH),), others={"log": log, "state": state})


def _nonlocal() -> Awkward:
    count, net = 0, Net()

    def model(x: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return net(x) * (1 + 0.01 * count)

    return Awkward(model, (torch.randn(3, WIDTH),), others={"cell": lambda: count}, step=model)


GLOBAL_LOG: list[int] = []
GLOBAL_COUNT = 0


def _global() -> Awkward:
    class Global(Net):
        def touch(self, h: Tensor) -> None:
            global GLOBAL_COUNT
            GLOBAL_LOG.append(1)
            GLOBAL_COUNT += 1

    return Awkward(Global(), (torch.randn(3, WIDTH),), others={"log": GLOBAL_LOG, "count": lambda: GLOBAL_COUNT})


case("list in a closure", _shared)
case("number of a closure", _nonlocal)
case("globals of its file", _global)


# ------------------------------------------------------------------ randomness

GENERATOR = np.random.default_rng(3)


def dropped(draw: Callable[[Any], float]) -> Callable[[Any, Tensor], Tensor]:
    """The state, kept or halved by a coin."""
    return lambda self, h: h * (1.0 if draw(self) < 0.5 else 0.5)


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


# ------------------------------------------------------------------ inputs and calls


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


# ------------------------------------------------------------------ hooks, modes, and odd parameters


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
