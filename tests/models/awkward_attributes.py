"""Models that change what hangs on them: attributes, containers, objects, closures, classes and globals."""

from __future__ import annotations

import itertools
import types
from collections import Counter, OrderedDict, UserDict, UserList, defaultdict, deque
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .awkward_kinds import WIDTH, Awkward, Cache, Net, case, kind, nothing, off_graph, put


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
