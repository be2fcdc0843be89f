"""Healthy networks, and the same with one fault each: what is put in is what must be found."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from tests.diagnosis import networks
from tests.diagnosis.networks import Network

Make = Callable[[int], Network]
Break = Callable[[Network, str], object]


@dataclass(frozen=True)
class Case:
    """A network and what must be found in it.

    Attributes:
        name: of the case.
        make: the healthy network, from a seed.
        fault: what is done to one block, or to all of it; None for a healthy case.
        kinds: kinds of the finding that must come first.
        local: whether a block is at fault, which must be named first.
        end: the path at fault where it is not one of the blocks: a stem, a transition or a head.
    """

    name: str
    make: Make
    fault: Break | None = None
    kinds: frozenset[str] = field(default=frozenset())
    local: bool = False
    end: str = ""

    def build(self, seed: int) -> tuple[Network, str]:
        """The network of a seed with its fault, and the path of the block at fault."""
        network = self.make(seed)
        blocks = network.blocks
        block = self.end or blocks[(len(blocks) // 3 + 2 * seed) % len(blocks)]
        if self.fault is not None:
            with torch.no_grad():
                self.fault(network, block)
        return network, block


def matrices(network: Network, block: str) -> list[nn.Parameter]:
    return [p for p in network.model.get_submodule(block).parameters() if p.dim() > 1]


def scaled(factor: float, which: int = -1) -> Break:
    """One matrix of one block times a factor."""
    return lambda network, block: matrices(network, block)[which].data.mul_(factor)


def everywhere(factor: float) -> Break:
    """All matrices of all blocks times a factor."""

    def fault(network: Network, _: str) -> None:
        for block in network.blocks:
            for parameter in matrices(network, block):
                parameter.mul_(factor)

    return fault


def biased(value: float, everywhere: bool = False) -> Break:
    """All biases of one block (or of all) set to one value, those of norms apart when there are others."""

    def fault(network: Network, block: str) -> None:
        for path in network.blocks if everywhere else (block,):
            module = network.model.get_submodule(path)
            linear = [m.bias for m in module.modules() if isinstance(m, nn.Linear | nn.Conv2d) and m.bias is not None]
            for bias in linear or [m.bias for m in module.modules() if getattr(m, "bias", None) is not None]:
                bias.data.fill_(value)

    return fault


def poisoned(value: float) -> Break:
    def fault(network: Network, block: str) -> None:
        matrices(network, block)[-1].view(-1)[0] = value

    return fault


def without_norm(network: Network, block: str) -> None:
    module = network.model.get_submodule(block)
    name = next(n for n, m in module.named_children() if "Norm" in type(m).__name__)
    setattr(module, name, nn.Identity())


def gamma(factor: float) -> Break:
    """The scale of one norm of one block times a factor."""

    def fault(network: Network, block: str) -> None:
        next(m for m in network.model.get_submodule(block).modules() if "Norm" in type(m).__name__).weight.mul_(factor)

    return fault


def step_of(scale: float, everywhere: bool = True) -> Break:
    """The step size of residual blocks."""

    def fault(network: Network, block: str) -> None:
        for path in network.blocks if everywhere else (block,):
            network.model.get_submodule(path).scale *= scale

    return fault


def skipless(seed: int) -> Network:
    torch.manual_seed(seed)
    model = networks.Transformer(32, 10, 4, post=False, skip=False)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.orthogonal_(module.weight)
    return Network(model.eval(), (torch.randint(0, 50, (6, 10)),), tuple(f"layers.{i}" for i in range(10)))


class Rotation(nn.Module):
    """x + h A x with A antisymmetric: every mode turns, and forward Euler makes it grow."""

    def __init__(self, width: int, h: float) -> None:
        super().__init__()
        self.fc, self.h = nn.Linear(width, width, bias=False), h
        self.fc.weight.data = torch.randn(width, width) / width**0.5
        self.fc.weight.data -= self.fc.weight.data.T.clone()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.h * self.fc(x)


def rotations(h: float, depth: int = 24) -> Make:
    def make(seed: int) -> Network:
        torch.manual_seed(seed)
        model = nn.Sequential(*[Rotation(24, h) for _ in range(depth)])
        return Network(model, (torch.randn(8, 24),), tuple(str(i) for i in range(depth)))

    return make


class Shear(nn.Module):
    """A small non-normal map: it amplifies before it contracts."""

    def __init__(self, n: int, coupling: float) -> None:
        super().__init__()
        A = torch.zeros(n, n)
        A[: n // 2, n // 2 :] = coupling * torch.eye(n // 2)
        A[: n // 2, : n // 2] = 0.8 * torch.eye(n // 2)
        A[n // 2 :, n // 2 :] = 0.7 * torch.eye(n // 2)
        self.weight = nn.Parameter(A)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.T


def shears(coupling: float, depth: int = 24) -> Make:
    def make(seed: int) -> Network:
        torch.manual_seed(seed)
        model = nn.Sequential(*[Shear(12, coupling) for _ in range(depth)])
        return Network(model, (torch.randn(8, 12),), tuple(str(i) for i in range(depth)))

    return make


def of(builder: Callable[..., Network], **options: Any) -> Make:
    return lambda seed: builder(seed, **options)


GROWS = frozenset({"exploding", "unstable_step", "saturated"})
SHRINKS = frozenset({"vanishing", "dead", "overdamped"})

HEALTHY = [
    Case("mlp relu", of(networks.mlp)),
    Case("mlp narrow deep", of(networks.mlp, width=24, depth=20)),
    Case("mlp tanh", of(networks.mlp, act=nn.Tanh)),
    Case("mlp gelu", of(networks.mlp, act=nn.GELU, depth=6)),
    Case("mlp silu layer norm", of(networks.mlp, act=nn.SiLU, norm=True, width=64)),
    Case("flat mlp tanh", of(networks.flat_mlp)),
    Case("flat mlp relu", of(networks.flat_mlp, act=nn.ReLU, width=64)),
    Case("residual norm", of(networks.residual)),
    Case("residual scaled", of(networks.residual, norm=False)),
    Case("residual tanh deep", of(networks.residual, act=nn.Tanh, depth=24, width=24)),
    Case("cnn residual train", of(networks.cnn)),
    Case("cnn residual eval", of(networks.cnn, train=False)),
    Case("cnn plain train", of(networks.cnn, residual=False)),
    Case("transformer pre-norm", of(networks.transformer)),
    Case("transformer post-norm", of(networks.transformer, post=True)),
    Case("transformer wide", of(networks.transformer, width=48, depth=4)),
    Case("torch encoder", of(networks.torch_encoder)),
    Case("rnn orthogonal", of(networks.recurrent, steps=15)),
    Case("rotations, small step", rotations(0.05)),
]

LOCAL = [
    Case("mlp weight x5", of(networks.mlp), scaled(5.0), GROWS, True),
    Case("mlp weight x20", of(networks.mlp, act=nn.GELU), scaled(20.0), GROWS, True),
    Case("mlp weight x0.05", of(networks.mlp), scaled(0.05), SHRINKS, True),
    Case("mlp dead biases", of(networks.mlp), biased(-10.0), SHRINKS, True),
    Case("mlp saturating gain", of(networks.mlp, act=nn.Tanh), scaled(20.0), GROWS, True),
    Case("mlp NaN", of(networks.mlp), poisoned(math.nan), frozenset({"non_finite"}), True),
    Case("mlp without a norm", of(networks.mlp, norm=True), without_norm, GROWS | SHRINKS, True),
    Case("flat mlp weight x20", of(networks.flat_mlp), scaled(20.0), GROWS, True),
    Case("flat mlp dead biases", of(networks.flat_mlp, act=nn.ReLU), biased(-10.0), SHRINKS, True),
    Case("flat mlp head x20", of(networks.flat_mlp), scaled(20.0), GROWS, True, end="22"),
    Case("residual branch x5", of(networks.residual), scaled(5.0), GROWS, True),
    Case("residual branch x20", of(networks.residual, norm=False), scaled(20.0), GROWS, True),
    Case("residual branch zero", of(networks.residual), scaled(0.0), SHRINKS, True),
    Case("residual step x20", of(networks.residual, norm=False), step_of(20.0, False), GROWS, True),
    Case("residual without a norm", of(networks.residual, width=64), without_norm, GROWS | SHRINKS, True),
    Case("residual head x20", of(networks.residual), scaled(20.0), GROWS, True, end="head"),
    Case("cnn weight x20", of(networks.cnn, train=False), scaled(20.0), GROWS, True),
    Case("cnn plain weight x0.05", of(networks.cnn, residual=False, train=False), scaled(0.05), SHRINKS, True),
    Case("cnn branch zero", of(networks.cnn), scaled(0.0), SHRINKS, True),
    Case("cnn dead norm bias", of(networks.cnn, residual=False), biased(-10.0), SHRINKS, True),
    Case("cnn norm scale x20", of(networks.cnn, train=False), gamma(20.0), GROWS, True),
    Case(
        "cnn weight x20 behind a norm",
        of(networks.cnn),
        scaled(20.0, 0),
        frozenset({"vanishing", "unstable_step"}),
        True,
    ),
    Case("cnn infinite weight", of(networks.cnn), poisoned(math.inf), frozenset({"non_finite"}), True),
    Case("transformer ffn x20", of(networks.transformer), scaled(20.0), GROWS, True),
    Case("transformer qkv x20", of(networks.transformer, post=True), scaled(20.0, 0), GROWS, True),
    Case("transformer ffn x0.05", of(networks.transformer), scaled(0.05), SHRINKS, True),
    Case("transformer without a norm", of(networks.transformer), without_norm, GROWS | SHRINKS, True),
    Case("torch encoder zero ffn", of(networks.torch_encoder), scaled(0.0), SHRINKS, True),
    Case("torch encoder NaN", of(networks.torch_encoder), poisoned(math.nan), frozenset({"non_finite"}), True),
]

GLOBAL = [
    Case("mlp gain x3", of(networks.mlp), everywhere(3.0), frozenset({"exploding"})),
    Case("mlp gain x0.3", of(networks.mlp, act=nn.Tanh), everywhere(0.3), frozenset({"vanishing"})),
    Case("mlp dead everywhere", of(networks.mlp), biased(-10.0, True), frozenset({"dead", "vanishing"})),
    Case("flat mlp gain x12", of(networks.flat_mlp, depth=14), everywhere(12.0), GROWS),
    Case("residual no norm, step x40", of(networks.residual, norm=False), step_of(40.0), GROWS),
    Case("cnn plain gain x0.2", of(networks.cnn, residual=False, train=False), everywhere(0.2), SHRINKS),
    Case("cnn residual gain x3", of(networks.cnn, train=False), everywhere(3.0), GROWS),
    Case("transformer without skips", skipless, None, frozenset({"rank_collapse", "vanishing"})),
    Case("rotations, large step", rotations(0.9), None, frozenset({"unstable_step", "exploding"})),
    Case("shears", shears(20.0), None, frozenset({"transient_growth"})),
    Case(
        "rnn chaotic", of(networks.recurrent, gain=2.5, width=64, steps=60), None, frozenset({"chaotic", "exploding"})
    ),
    Case("rnn vanishing", of(networks.recurrent, gain=0.5, steps=20), None, frozenset({"vanishing"})),
]
