"""Hard cases: unusual ways of calling a model, of wrapping it, and of passing data in and out."""

from __future__ import annotations

import copy
import dataclasses
import types
from collections import namedtuple
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from .building import THREE_BLOCKS, built, chain, on, stack, wrapped, x
from .hard_models import Residual, Stack, Wrapped
from .zoo import Subject

Pair = namedtuple("Pair", ["left", "right"])


@dataclasses.dataclass
class Batch:
    """A dataclass input with a tensor, something else, and a nest."""

    x: Tensor
    name: str
    more: dict[str, Any]


def _ensemble(net: nn.Module, x: Tensor) -> Tensor:
    weights = {name: torch.stack([p, 1.1 * p, 0.9 * p]) for name, p in net.named_parameters()}
    return torch.vmap(lambda w, x: torch.func.functional_call(net, w, (x,)), in_dims=(0, None), out_dims=1)(weights, x)


def _random_inside(net: nn.Module, x: Tensor) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        noise = torch.randn_like(x)
    return net(x + 0.1 * noise) + functional.dropout(net(x), 0.5)


def _in_place(net: nn.Module, x: Tensor) -> Tensor:
    x.mul_(2)
    h = net.stem(x)
    h[:, 1:3].sin_()
    h.t()[0] += 1
    for block in net.blocks:
        h += block(h)
        h = h.relu_() + 0
    return net.head(h)


def _thread(net: nn.Module, x: Tensor) -> Tensor:
    import threading

    found: list[Tensor] = []
    worker = threading.Thread(target=lambda: found.append(net.stem(x)))
    worker.start()
    worker.join()
    h = found[0]
    for block in net.blocks:
        h = block(h)
    return net.head(h)


def _autocast(net: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return net(x)


def _linear_algebra(net: nn.Module, x: Tensor) -> Tensor:
    gram = x @ x.mT + 3 * torch.eye(x.shape[-2], dtype=x.dtype)
    values, vectors = torch.linalg.eigh(gram)
    h = torch.linalg.solve(gram, net(x)) + torch.linalg.cholesky(gram) @ net(x)
    return h * values.sum(-1)[..., None, None] + (vectors.square() @ torch.linalg.svdvals(x)[..., None])


def _selections(net: nn.Module, x: Tensor) -> Tensor:
    h = net(x)
    top, where = h.topk(2, dim=1)
    h = h.scatter(1, where, top.sin()).masked_fill(h < -1, 0.5)
    h = torch.where(h > 0, h, h.exp() - 1)
    h[h > 2] = 2.0
    return torch.einsum("bi,bj->bij", h.sort(1).values, h.cumsum(1)).flip(1).diagonal(dim1=1, dim2=2)


def _differentiates_inside(net: nn.Module, x: Tensor) -> Tensor:
    gradient = torch.func.vmap(torch.func.grad(lambda one: net(one).sum()))(x)
    return net(x) + gradient[:, :3] ** 2


def _hooked(pre: bool) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = Stack()
        for block in model.blocks:
            if pre:
                block.register_forward_pre_hook(lambda module, args: (1.5 * args[0],))
            else:
                block.register_forward_hook(lambda module, args, out: out * 0.5 + args[0].sin())
        return model

    return make


def _with_backward_hooks() -> nn.Module:
    model = Stack()
    for block in model.blocks:
        block.register_full_backward_hook(lambda module, grad_input, grad_output: None)
    return model


def _forward_replaced() -> nn.Module:
    model = Stack()
    block = model.blocks[1]
    block.forward = types.MethodType(lambda self, x: x + 2 * self.inner(x).tanh(), block)
    return model


class _OwnCall(Residual):
    def __call__(self, x: Tensor) -> Tensor:
        return self.forward(x)


def _checkpointed_dropout(block: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(lambda x: functional.dropout(block(x), 0.5), x, use_reentrant=False)


def _distributed() -> nn.Module:
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return nn.parallel.DistributedDataParallel(Stack())


def _compiled_inside() -> nn.Module:
    model = Stack()
    model.blocks[1].compile(backend="eager")
    return model


def _model_output(net: nn.Module, x: Tensor) -> Any:
    from transformers.modeling_outputs import CausalLMOutput

    h = net.stem(x)
    states = [h]
    for block in net.blocks:
        states.append(block(states[-1]))
    logits = net.head(states[-1])
    return CausalLMOutput(loss=logits.square().mean(), logits=logits, hidden_states=tuple(states))


def _convolutional() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3))
    return model.to(memory_format=torch.channels_last)


SUBJECTS = [
    Subject(
        "plain function", built(lambda: lambda x: (x @ torch.ones(4, 4, dtype=x.dtype)).sin() + x, on(2, 4)), fast=True
    ),
    Subject(
        "dict in, dict out",
        wrapped(lambda m, b: {"y": m(b["x"])}, lambda: {"x": x(2, 4), "id": "a"}),
        **THREE_BLOCKS,
        fast=True,
    ),
    Subject(
        "namedtuple in and out", wrapped(lambda m, b: Pair(m(b.left), None), lambda: Pair(x(2, 4), 3)), **THREE_BLOCKS
    ),
    Subject(
        "dataclass in and out",
        wrapped(lambda m, b: Batch(m(b.x) + b.more["y"], "", {}), lambda: Batch(x(2, 4), "n", {"y": torch.ones(1)})),
        **THREE_BLOCKS,
    ),
    Subject("ModelOutput with a loss first", wrapped(_model_output), **THREE_BLOCKS, fast=True),
    Subject("keyword inputs", built(lambda: Wrapped(lambda m, *, a, b=None: m(a)), a=on(2, 4)), **THREE_BLOCKS),
    Subject(
        "several float inputs",
        wrapped(lambda m, a, b, c: m(a + b.sin()) * c, on(2, 4), on(2, 4), on(2, 3)),
        **THREE_BLOCKS,
    ),
    Subject(
        "one-hot inputs",
        wrapped(lambda m, t: m(functional.one_hot(t, 4).to(m.head.weight.dtype)), lambda: torch.randint(4, (5,))),
        **THREE_BLOCKS,
    ),
    Subject("in place on the input, on views, on states", wrapped(_in_place), fast=True),
    Subject("view of the input as output", built(lambda: lambda x: x.t()[1:3].t(), on(2, 4))),
    Subject("input among the outputs", wrapped(lambda m, x: {"input": x, "y": m(x)}), **THREE_BLOCKS, target="y"),
    Subject(
        "checkpoint, reentrant",
        built(lambda: Stack(lambda b, x: checkpoint(b, x, use_reentrant=True)), on(2, 4)),
        **THREE_BLOCKS,
        fast=True,
    ),
    Subject(
        "checkpoint, not reentrant",
        stack(lambda b, x: checkpoint(b, x, use_reentrant=False)),
        **THREE_BLOCKS,
        fast=True,
    ),
    Subject("compiled model", built(lambda: torch.compile(Stack(), backend="eager"), on(2, 4)), **THREE_BLOCKS),
    Subject("module.compile() inside", built(_compiled_inside, on(2, 4)), **THREE_BLOCKS),
    Subject("torch.jit.script", built(lambda: torch.jit.script(chain(*[lambda: Residual(4)] * 3)().eval()), on(2, 4))),
    Subject("torch.jit.trace", built(lambda: torch.jit.trace(Stack().double().eval(), x(2, 4).double()), on(2, 4))),
    Subject("torch.jit.fork inside", wrapped(lambda m, x: torch.jit.wait(torch.jit.fork(m, x)) + m(2 * x)), options={}),
    Subject(
        "torch.export'ed module",
        built(lambda: torch.export.export(Stack().double(), (x(2, 4).double(),)).module(), on(2, 4), train=None),
    ),
    Subject("fx GraphModule", built(lambda: torch.fx.symbolic_trace(Stack()), on(2, 4)), 3, r"blocks\.\d(\.inner)?"),
    Subject("DistributedDataParallel", built(_distributed, on(2, 4)), **THREE_BLOCKS),
    Subject("DataParallel", built(lambda: nn.DataParallel(Stack()), on(2, 4)), **THREE_BLOCKS),
    Subject("autocast to bfloat16", wrapped(_autocast), **THREE_BLOCKS, dtype=None),
    Subject(
        "bfloat16 parameters", built(lambda: Stack().bfloat16(), lambda: x(2, 4).bfloat16()), **THREE_BLOCKS, dtype=None
    ),
    Subject("float16 parameters", built(lambda: Stack().half(), lambda: x(2, 4).half()), **THREE_BLOCKS, dtype=None),
    Subject(
        "channels_last", built(_convolutional, lambda: x(2, 3, 8, 8).to(memory_format=torch.channels_last)), fast=True
    ),
    Subject(
        "channels_last, batch of one",
        built(_convolutional, lambda: x(1, 3, 8, 8).to(memory_format=torch.channels_last)),
    ),
    Subject(
        "batch norm and dropout in train mode",
        built(
            chain(lambda: nn.Linear(4, 6), lambda: nn.BatchNorm1d(6), lambda: nn.Dropout(0.3), lambda: Residual(6)),
            on(5, 4),
            train=True,
        ),
        fast=True,
    ),
    Subject("batch of one", built(Stack, on(1, 4)), **THREE_BLOCKS),
    Subject("no batch dimension", built(Stack, on(4)), **THREE_BLOCKS, options={"batch_dim": None}),
    Subject("worker thread", wrapped(_thread)),
    Subject("vmapped ensemble", wrapped(_ensemble), fast=True),
    Subject(
        "functional_call with other weights",
        wrapped(lambda m, x: torch.func.functional_call(m, {k: 2 * p for k, p in m.named_parameters()}, (x,))),
        **THREE_BLOCKS,
    ),
    Subject("random numbers inside", wrapped(_random_inside)),
    Subject("linear algebra", built(lambda: Wrapped(_linear_algebra, nn.Linear(4, 4)), on(2, 4, 4))),
    Subject("selections", wrapped(_selections)),
    Subject("torch.func.grad inside", wrapped(_differentiates_inside)),
    Subject("forward hooks that change the output", built(_hooked(pre=False), on(2, 4)), **THREE_BLOCKS, fast=True),
    Subject("forward pre-hooks that change the input", built(_hooked(pre=True), on(2, 4)), **THREE_BLOCKS),
    Subject("full backward hooks", built(_with_backward_hooks, on(2, 4)), **THREE_BLOCKS),
    Subject("forward replaced on the instance", built(_forward_replaced, on(2, 4)), **THREE_BLOCKS),
    Subject("class with its own __call__", built(chain(*[lambda: _OwnCall(4)] * 3), on(2, 4))),
    Subject(
        "checkpoint with dropout, train",
        built(lambda: Stack(_checkpointed_dropout), on(2, 4), train=True),
        **THREE_BLOCKS,
    ),
    Subject("torch.cond", wrapped(lambda m, x: torch.cond(x.sum() > 0, lambda x: x.sin(), lambda x: x.cos(), (m(x),)))),
    Subject(
        "tensor hook that scales gradients",
        wrapped(lambda m, x: (h := m.stem(x), h.register_hook(lambda g: 2 * g), m.head(h))[-1]),
    ),
    Subject("deep copy of a traced model", built(lambda: copy.deepcopy(Stack()), on(2, 4)), **THREE_BLOCKS),
]
