"""Hand-made architectures of the hard cases: unusual state spaces, solvers, and ways of holding modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class Residual(nn.Module):
    """x + tanh(W x + b)."""

    def __init__(self, size: int = 6) -> None:
        super().__init__()
        self.inner = nn.Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x).tanh()


class Stack(nn.Module):
    """A stem, residual blocks run by some function of block and input, and a head."""

    def __init__(self, run: Callable[[nn.Module, Tensor], Tensor] | None = None, depth: int = 3, size: int = 6) -> None:
        super().__init__()
        self.stem = nn.Linear(4, size)
        self.blocks = nn.ModuleList(Residual(size) for _ in range(depth))
        self.head = nn.Linear(size, 3)
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = self.run(block, x) if self.run else block(x)
        return self.head(x)


class Wrapped(nn.Module):
    """A stack of blocks called in an unusual way."""

    def __init__(self, call: Callable[..., Any], inner: nn.Module | None = None) -> None:
        super().__init__()
        self.net = inner or Stack()
        self.call = call

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(self.net, *args, **kwargs)


# ---------------------------------------------------------------- weights and modules in unusual places


class Hyper(nn.Module):
    """The weights of each layer are made from the input itself."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.makers = nn.ModuleList(nn.Linear(4, 16) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for maker in self.makers:
            weights = maker(x).view(-1, 4, 4)
            x = x + torch.bmm(weights, x.unsqueeze(-1)).squeeze(-1).tanh()
        return x


class GraphLayer(nn.Module):
    """Messages along edges, summed at their targets."""

    def __init__(self) -> None:
        super().__init__()
        self.message, self.update = nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        sent = self.message(torch.cat([x[edges[0]], x[edges[1]]], dim=1)).relu()
        received = torch.zeros_like(x).index_add_(0, edges[1], sent)
        largest = torch.zeros_like(x).scatter_reduce(0, edges[1].unsqueeze(1).expand_as(sent), sent, "amax")
        return x + self.update(torch.cat([received, largest], dim=1))


class GraphNetwork(nn.Module):
    """Three layers over one graph; all nodes together are one sample."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(GraphLayer() for _ in range(3))

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, edges)
        return x


class SparseGraphNetwork(nn.Module):
    """Graph convolutions with a sparse adjacency matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.sparse.mm(adjacency, layer(x)).tanh()
        return x


class Fourier(nn.Module):
    """Spectral convolutions with complex weights."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(torch.randn(5, dtype=torch.complex64)) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for weight in self.weights:
            x = x + torch.fft.irfft(torch.fft.rfft(x) * weight, n=x.shape[-1]).tanh()
        return x


class Experts(nn.Module):
    """Each sample is sent to its best expert, by Python control flow on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(4, 3)
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.router(x).softmax(-1)
        weight, chosen = scores.max(-1)
        out = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            rows = (chosen == index).nonzero().squeeze(1)
            if rows.numel():
                out.index_copy_(0, rows, expert(x[rows]) * weight[rows].unsqueeze(1))
        return x + out


class EarlyExit(nn.Module):
    """Blocks run until the data says enough."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Residual(4) for _ in range(10))

    def forward(self, x: Tensor) -> Tensor:
        for count, block in enumerate(self.blocks):
            x = block(x)
            if count >= 4 and x.norm().item() > 0:
                break
        return x


class Dynamic(nn.Module):
    """Submodules that exist only through ``__getattr__``, and a reference to itself."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.ModuleDict({f"block{i}": Residual(4) for i in range(3)})
        self.owner = [self]
        object.__setattr__(self, "myself", self)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("get_"):
            return self.table[name.removeprefix("get_")]
        return super().__getattr__(name)

    def forward(self, x: Tensor) -> Tensor:
        for i in range(3):
            x = getattr(self.owner[0].myself, f"get_block{i}")(x)
        return x


class Stateful(nn.Module):
    """Keeps its hidden state on itself while it walks over time."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(4, 4)
        self.hidden: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.hidden = None
        for t in range(x.shape[1]):
            self.hidden = self.cell(x[:, t], self.hidden)
        return self.hidden


class Scan(nn.Module):
    """A selective state space in a loop, written into a preallocated buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.drive = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        state, out = torch.zeros_like(x[:, 0]), torch.empty_like(x)
        for t in range(x.shape[1]):
            state = torch.sigmoid(self.gate(x[:, t])) * state + self.drive(x[:, t])
            out[:, t] = state
        return out


class TiedAutoencoder(nn.Module):
    """The decoder is the transposed encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(6, 3)
        self.bias = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(self.encoder(x).tanh(), self.encoder.weight.t(), self.bias)


class TiedLanguageModel(nn.Module):
    """Token embeddings written in place; the head shares their weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.blocks = nn.ModuleList(Residual(6) for _ in range(3))
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x *= 2
        x[:, 0] += 1
        for block in self.blocks:
            x = block(x)
        return self.head(x)
