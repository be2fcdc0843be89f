"""Healthy networks of five families, in several widths, depths, activations and norms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, relu

import stabkit


@dataclass(frozen=True)
class Network:
    """A network ready to be traced.

    Attributes:
        model: in the mode in which it is analysed.
        inputs: of its call.
        blocks: paths of its blocks, first to last.
        trace: makes its flow.
    """

    model: nn.Module
    inputs: tuple[Tensor, ...]
    blocks: tuple[str, ...]
    trace: Callable[[nn.Module, tuple[Tensor, ...]], Any] = lambda model, inputs: stabkit.trace(model, *inputs)

    def flow(self) -> Any:
        return self.trace(self.model, self.inputs)


class Layer(nn.Module):
    """act(norm(W x + b))."""

    def __init__(self, n_in: int, n_out: int, act: nn.Module, norm: bool = False) -> None:
        super().__init__()
        self.fc, self.norm, self.act = nn.Linear(n_in, n_out), nn.LayerNorm(n_out) if norm else nn.Identity(), act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.fc(x)))


GAINS = {nn.ReLU: 2**0.5, nn.Tanh: 1.1, nn.GELU: 1.5, nn.SiLU: 1.7, nn.LeakyReLU: 2**0.5}


def mlp(seed: int, width: int = 48, depth: int = 12, act: Any = nn.ReLU, norm: bool = False) -> Network:
    """Layers as modules of their own, weights critical for the activation."""
    torch.manual_seed(seed)
    layers = [Layer(width, width, act(), norm) for _ in range(depth)]
    model = nn.Sequential(nn.Linear(20, width), *layers, nn.Linear(width, 10))
    for layer in layers:
        nn.init.normal_(layer.fc.weight, std=GAINS[act] / width**0.5)
        nn.init.zeros_(layer.fc.bias)
    return Network(model.eval(), (torch.randn(16, 20),), tuple(str(i + 1) for i in range(depth)))


def flat_mlp(seed: int, width: int = 40, depth: int = 10, act: Any = nn.Tanh) -> Network:
    """Linear, activation, linear, activation, ...: every module a step."""
    torch.manual_seed(seed)
    modules: list[nn.Module] = [nn.Linear(12, width), act()]
    for _ in range(depth):
        modules += [nn.Linear(width, width), act()]
    model = nn.Sequential(*modules, nn.Linear(width, 5))
    for index in range(2, 2 * depth + 2, 2):
        layer = model[index]
        nn.init.orthogonal_(layer.weight, gain=GAINS[act])
        nn.init.zeros_(layer.bias)
    return Network(model.eval(), (torch.randn(16, 12),), tuple(str(2 * i + 2) for i in range(depth)))


class Residual(nn.Module):
    """x + h W2 act(W1 norm(x))."""

    def __init__(self, width: int, act: nn.Module, norm: bool, scale: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width) if norm else nn.Identity()
        self.fc1, self.act, self.fc2, self.scale = nn.Linear(width, width), act, nn.Linear(width, width), scale

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.fc2(self.act(self.fc1(self.norm(x))))


def residual(seed: int, width: int = 40, depth: int = 10, act: Any = nn.ReLU, norm: bool = True) -> Network:
    torch.manual_seed(seed)
    blocks = nn.ModuleList(Residual(width, act(), norm, 1.0 if norm else depth**-0.5) for _ in range(depth))
    model = nn.Sequential()
    model.add_module("stem", nn.Linear(16, width))
    model.add_module("blocks", nn.Sequential(*blocks))
    model.add_module("head", nn.Linear(width, 7))
    return Network(model.eval(), (torch.randn(12, 16),), tuple(f"blocks.{i}" for i in range(depth)))


class ConvBlock(nn.Module):
    """A plain convolution, batch norm and ReLU; or a residual block of two of them, with the norm first."""

    def __init__(self, channels: int, residual: bool) -> None:
        super().__init__()
        self.residual = residual
        self.norm1, self.conv1 = nn.BatchNorm2d(channels), nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        if residual:
            self.norm2, self.conv2 = nn.BatchNorm2d(channels), nn.Conv2d(channels, channels, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if not self.residual:
            return relu(self.norm1(self.conv1(x)))
        return x + self.conv2(relu(self.norm2(self.conv1(relu(self.norm1(x))))))


class ConvNet(nn.Module):
    def __init__(self, channels: int, depth: int, residual: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.body = nn.Sequential(*[ConvBlock(channels, residual) for _ in range(depth)])
        self.head = nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x)).mean((2, 3)))


def cnn(seed: int, channels: int = 12, depth: int = 8, residual: bool = True, train: bool = True) -> Network:
    torch.manual_seed(seed)
    model = ConvNet(channels, depth, residual)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    inputs = torch.randn(8, 3, 8, 8)
    model.train()
    with torch.no_grad():
        for _ in range(40):
            model(torch.randn(16, 3, 8, 8))  # running statistics that fit
    return Network(model.train(train), (inputs,), tuple(f"body.{i}" for i in range(depth)))


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.qkv, self.out, self.heads = nn.Linear(width, 3 * width), nn.Linear(width, width), heads

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        y = torch.softmax(q @ k.transpose(-1, -2) / (d // self.heads) ** 0.5, -1) @ v
        return self.out(y.transpose(1, 2).reshape(b, t, d))


class TransformerBlock(nn.Module):
    def __init__(self, width: int, heads: int, post: bool, skip: bool = True) -> None:
        super().__init__()
        self.norm1, self.norm2, self.post, self.skip = nn.LayerNorm(width), nn.LayerNorm(width), post, skip
        self.attention = Attention(width, heads)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        if not self.skip:
            return self.attention(x)
        if self.post:
            x = self.norm1(x + self.attention(x))
            return self.norm2(x + self.fc2(gelu(self.fc1(x))))
        x = x + self.attention(self.norm1(x))
        return x + self.fc2(gelu(self.fc1(self.norm2(x))))


class Transformer(nn.Module):
    def __init__(self, width: int, depth: int, heads: int, post: bool, skip: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, width)
        self.position = nn.Parameter(0.1 * torch.randn(16, width))
        self.layers = nn.ModuleList(TransformerBlock(width, heads, post, skip) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 50)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.position[: tokens.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def transformer(seed: int, width: int = 32, depth: int = 8, heads: int = 4, post: bool = False) -> Network:
    torch.manual_seed(seed)
    model = Transformer(width, depth, heads, post)
    return Network(model.eval(), (torch.randint(0, 50, (6, 10)),), tuple(f"layers.{i}" for i in range(depth)))


def torch_encoder(seed: int, width: int = 32, depth: int = 6, norm_first: bool = True) -> Network:
    torch.manual_seed(seed)
    layer = nn.TransformerEncoderLayer(width, 4, 2 * width, batch_first=True, norm_first=norm_first)
    model = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
    return Network(model.eval(), (torch.randn(6, 9, width),), tuple(f"layers.{i}" for i in range(depth)))


class Recurrent(nn.Module):
    """A stack of recurrent cells, unrolled: depth is time."""

    def __init__(self, width: int, steps: int, kind: str) -> None:
        super().__init__()
        self.cell = {"rnn": nn.RNNCell, "gru": nn.GRUCell, "lstm": nn.LSTMCell}[kind](width, width)
        self.steps, self.kind = steps, kind

    def forward(self, x: Tensor) -> Tensor:
        state: Any = (torch.zeros_like(x), torch.zeros_like(x)) if self.kind == "lstm" else torch.zeros_like(x)
        for _ in range(self.steps):
            state = self.cell(x, state)
        return state[0] if self.kind == "lstm" else state


def recurrent(seed: int, width: int = 32, steps: int = 20, gain: float = 1.0) -> Network:
    """h' = tanh(W h) with W orthogonal, iterated."""
    torch.manual_seed(seed)
    cell = nn.RNNCell(width, width)
    nn.init.orthogonal_(cell.weight_hh, gain=gain)
    nn.init.zeros_(cell.bias_hh)
    nn.init.zeros_(cell.bias_ih)
    inputs = 0.3 * torch.randn(steps, 8, width) if gain <= 1 else torch.zeros(steps, 8, width)
    return Network(
        cell.eval(),
        (inputs, 0.5 * torch.randn(8, width)),
        ("",),
        lambda model, given: stabkit.recurrent_flow(model, given[0], given[1]),
    )
