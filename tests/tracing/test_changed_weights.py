"""A flow of a model that was trained since says so, whoever is asked for derivatives first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import stabkit
from stabkit.errors import TraceError


def loss(out: torch.Tensor) -> torch.Tensor:
    return out.square().mean()


ASKED: dict[str, Callable[[stabkit.Flow], Any]] = {
    "jacobian": lambda flow: flow.steps[1].jacobian().dense(),
    "gradient_profile": lambda flow: stabkit.gradient_profile(flow),
    "gradient_profile of a loss": lambda flow: stabkit.gradient_profile(flow, loss),
    "gradient_profile with parameters": lambda flow: stabkit.gradient_profile(flow, loss, parameters=True),
    "diagnose": lambda flow: stabkit.diagnose(flow, loss),
    "attribute": lambda flow: stabkit.attribute(flow, loss),
    "lyapunov_spectrum": lambda flow: stabkit.lyapunov_spectrum(flow, 2),
    "cotangent": lambda flow: flow.cotangent(loss),
}


@pytest.mark.parametrize("name", ASKED)
def test_weights_that_were_changed_since_are_told(name: str):
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4)])
    flow = stabkit.trace(model, torch.randn(4, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss(model(torch.randn(4, 8))).backward()
    optimizer.step()
    with pytest.raises(TraceError, match=r"changed after it was traced.*stabkit\.trace again"):
        ASKED[name](flow)
