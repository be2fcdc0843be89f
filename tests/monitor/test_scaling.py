"""A loss scaler that keeps halving its scale is told at every cadence of records; one that works well is not."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from stabkit.monitor import Monitor
from stabkit.monitor.scaling import AT_START, ScaleWatch
from tests.monitor.networks import mlp


def told_at(scales: list[float]) -> list[int]:
    """The indices at which something is told of scales of successive steps."""
    scaler = SimpleNamespace(_scale=None)
    watch = ScaleWatch(scaler, 3)
    found = []
    for step, scale in enumerate(scales):
        scaler._scale = torch.tensor(scale)
        found += [step] * len(watch.look(step))
    return found


def test_halvings_that_do_not_end_are_told_once():
    works = [8.0, 8.0, 16.0, 8.0, 4.0, 4.0, 8.0, 8.0]
    assert told_at(works) == []
    assert told_at([65536.0 / 2**k for k in range(8)] + [256.0] * 4) == []  # where a scaler finds its scale
    assert told_at([65536.0 / 2**k for k in range(30)]) == [AT_START]
    assert told_at([*works, 4.0, 2.0, 1.0, 0.5, 0.25]) == [len(works) + 2]


@pytest.mark.parametrize("every", [1, 10, 50])
def test_infinite_gradients_under_a_scaler_are_told_within_three_steps(every):
    model = mlp(width=8, depth=3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=8)
    torch.manual_seed(1)
    with Monitor(model, every, optimizer=optimizer, scaler=scaler) as monitor:
        for step in range(45):
            optimizer.zero_grad()
            output = model(torch.randn(16, 8))
            if step >= 40 or step in (25, 26):  # two are how a scaler works
                output.register_hook(lambda gradient: gradient * torch.inf)
            loss = nn.functional.mse_loss(output, torch.ones(16, 2))
            scaler.scale(loss).backward()
            monitor.step(loss)
            scaler.step(optimizer)
            scaler.update()
    assert monitor.findings[0].kind == "non_finite"
    assert "loss scale" in monitor.findings[0].evidence
    assert 40 <= monitor.findings[0].numbers["training_step"] <= 43
