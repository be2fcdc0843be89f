"""Models that write to their parameters, gradients and buffers."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from .awkward_kinds import WIDTH, Awkward, case, kind, nothing, off_graph, put

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
