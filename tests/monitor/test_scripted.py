"""Models that torch.jit.script has compiled, or compiles while they are watched."""

from __future__ import annotations

import pytest
import torch

from stabkit.errors import StabkitError
from stabkit.monitor import Monitor
from tests.monitor.networks import mlp

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*torch.jit:FutureWarning")


def test_a_scripted_model_is_watched_by_its_parameters():
    model = torch.jit.script(mlp())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def train():
        with Monitor(model, 1, optimizer=optimizer) as monitor:
            for _ in range(3):
                optimizer.zero_grad()
                loss = model(torch.randn(4, 8)).square().mean()
                loss.backward()
                monitor.step(loss)
                optimizer.step()
        return monitor

    with pytest.warns(RuntimeWarning, match="saw none of the blocks run, only their parameters"):
        monitor = train()
    assert len(monitor.records) == 3
    assert all(record.gradient_norm > 0 for record in monitor.records)


def test_scripting_a_model_that_is_watched_says_how():
    model = mlp()
    with Monitor(model, 1) as monitor:
        with pytest.raises(StabkitError, match=r"monitor.detach\(\)"):
            torch.jit.script(model)
        monitor.detach()
        scripted = torch.jit.script(model)
        monitor.attach()
        model(torch.randn(4, 8)).sum().backward()
        monitor.step()
    x = torch.randn(4, 8)
    assert torch.equal(scripted(x), model(x))
    assert len(monitor.records[0].blocks) == 4
