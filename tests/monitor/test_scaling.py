"""A loss scaler that keeps halving its scale is told at every cadence of records; one that works well is not."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from stabkit.monitor import Monitor
from stabkit.monitor.scaling import AT_START, ScaleWatch
from tests.monitor.networks import Layer, mlp


def told_at(scales: list[float]) -> list[int]:
    """The indices at which something is told of scales of successive steps."""
    scaler = SimpleNamespace(_scale=None)
    watch = ScaleWatch(scaler, 3, lambda: ((), ()))
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


class Overflows(nn.Module):
    """Four layers, about the second and third of which something is infinite in float16 from a step on."""

    def __init__(self, where: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([Layer(8) for _ in range(4)])
        self.where, self.broken = where, False
        self.layers[2].register_forward_hook(lambda module, given, out: 1e6 * out if self.breaks("inside") else out)

    def breaks(self, where: str) -> bool:
        return self.broken and self.where == where

    def forward(self, x: Tensor) -> Tensor:
        for number, layer in enumerate(self.layers):
            x = layer(x)
            if number == 1 and self.breaks("between"):
                x = x * 1e6
            if number == 1 and self.breaks("gradient"):
                x.register_hook(lambda gradient: gradient * 1e9)
        return x


@pytest.mark.parametrize("every", [1, 50])
@pytest.mark.parametrize(
    ("where", "place", "words"),
    [
        ("inside", "layers.2", "the output of layers.2 is not finite, and that of layers.1 before it is"),
        ("between", "layers.1", "what layers.2 is given is not finite, and the output of layers.1 before it is"),
        (
            "gradient",
            "layers.2",
            "the gradient of layers.1 is not finite, and that of layers.2, from which it comes, is",
        ),
    ],
)
def test_what_overflows_in_float16_is_told_with_its_place(where, place, words, every):
    model = Overflows(where)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=8)
    torch.manual_seed(1)
    with Monitor(model, every, optimizer=optimizer, scaler=scaler) as monitor:
        for step in range(30):
            model.broken = step >= 21
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16):
                loss = nn.functional.mse_loss(model(torch.randn(16, 8).half()).float(), torch.ones(16, 8))
            scaler.scale(loss).backward()
            monitor.step(loss)
            scaler.step(optimizer)
            scaler.update()
    told = [finding for finding in monitor.findings if finding.kind == "non_finite"]
    if every == 50 and where == "gradient":  # by the gradients of parameters, at a step that nothing recorded
        place = "layers.1"
        words = (
            "those of layers.1 have such gradients and those of 1 block before it, and none after it: "
            "it begins there, or between it and layers.2"
        )
    elif every == 50:
        assert "the loss is" in told.pop(0).evidence  # and the step after is recorded
    assert told[0].numbers["training_step"] <= 24
    assert told[0].module_path == place
    assert words in told[0].evidence
    assert len(told) == 1
