"""Presets that run the model themselves leave a training bit for bit as it is without a monitor."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from stabkit import Monitor


class Dropping(nn.Module):
    """Drops layers by some generator, more of them the longer it is trained."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))
        self.norm, self.head = nn.BatchNorm1d(6), nn.Linear(6, 1)
        self.kind, self.state = kind, {"schedule": [0]}
        self.own = {"torch": torch.Generator().manual_seed(1), "numpy": [np.random.default_rng(1)]}

    def keep(self) -> bool:
        if self.kind == "random":
            return random.random() < 0.7
        if self.kind == "numpy":
            return np.random.rand() < 0.7  # noqa: NPY002
        if self.kind == "torch.Generator":
            return torch.rand((), generator=self.own["torch"]).item() < 0.7
        if self.kind == "np.random.Generator":
            return self.own["numpy"][0].random() < 0.7
        return self.state["schedule"][0] % 3 > 0

    def forward(self, x: Tensor) -> Tensor:
        self.state["schedule"][0] += 1
        for layer in self.layers:
            if self.keep():
                x = x + layer(x).tanh()
        return self.head(self.norm(x))


def trained(kind: str, preset: str | None) -> list[Tensor]:
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    model = Dropping(kind)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    monitor = None if preset is None else Monitor(model, 2, preset, optimizer=optimizer, probe_every=1)
    for _ in range(8):
        x = torch.randn(5, 6)
        optimizer.zero_grad()
        loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
        loss.backward()
        if monitor is not None:
            monitor.step(loss)
        optimizer.step()
    if monitor is not None:
        monitor.close()
        assert any(record.probes.get("growth") for record in monitor.records)
    return [t.clone() for t in model.state_dict().values()]


@pytest.mark.parametrize("kind", ["random", "numpy", "torch.Generator", "np.random.Generator", "counter"])
def test_a_training_is_what_it_is_without_a_monitor(kind):
    plain = trained(kind, None)
    for preset in ("standard", "full"):
        assert all(map(torch.equal, trained(kind, preset), plain)), preset
