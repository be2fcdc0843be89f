"""The monitor says which parameters get no gradient, and when a block dies."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import stabkit
from stabkit.diagnosis import Finding


class Net(nn.Module):
    """An encoder, something between, and a decoder."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enc = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8))
        self.dec = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.dec(self.between(self.enc(x)))


def layers(depth: int = 4) -> nn.Sequential:
    torch.manual_seed(0)
    hidden = [module for _ in range(depth) for module in (nn.Linear(16, 16), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(16, 4))


def heard(
    model: nn.Module, width: int, steps: int = 6, meddle: Callable[[int], None] = lambda step: None
) -> list[Finding]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    generator = torch.Generator().manual_seed(1)
    with stabkit.Monitor(model, every=1, optimizer=optimizer) as monitor:
        for step in range(steps):
            meddle(step)
            optimizer.zero_grad()
            loss = model(torch.randn(8, width, generator=generator)).square().mean()
            loss.backward()
            monitor.step(loss)
            optimizer.step()
    return monitor.findings


@pytest.mark.parametrize("between", [Tensor.detach, lambda h: torch.tensor(h.tolist()), lambda h: (h > 0).float()])
def test_parameters_without_gradient_are_named_once(between):
    (found,) = heard(Net(between), 6)
    assert (found.kind, found.module_path, found.numbers["parameters"]) == ("no_gradient", "enc.2", 4)
    assert "enc.0.weight, enc.0.bias, enc.2.weight, enc.2.bias" in found.evidence


def test_frozen_parameters_and_blocks_that_are_left_out_at_times_are_no_finding():
    frozen = Net(Tensor.detach)
    frozen.enc.requires_grad_(False)
    assert heard(frozen, 6) == []
    model = layers()

    def skip(step: int) -> None:
        model.forward = lambda x: nn.Sequential(*[m for i, m in enumerate(model) if i // 2 != step % 4])(x)

    assert [f.kind for f in heard(model, 16, meddle=skip) if f.kind == "no_gradient"] == []


def test_a_block_that_dies_is_said_at_once():
    model = layers()

    def kill(step: int) -> None:
        if step == 3:
            model[4].bias.data.fill_(-50.0)

    found = [f for f in heard(model, 16, meddle=kill) if f.kind == "dead"]
    assert [(f.module_path, f.severity, f.numbers["training_step"]) for f in found] == [("4", "critical", 3.0)]
    assert "nor do the 2 blocks before it" in found[0].evidence


def test_a_head_that_starts_at_zero_wakes_up_and_is_not_dead():
    model = layers()
    nn.init.zeros_(model[8].weight)
    model[8].bias.data.fill_(1.0)
    assert [f for f in heard(model, 16) if f.kind == "dead"] == []


def test_a_block_that_was_dead_from_the_start_is_said_in_the_second_record():
    model = layers()
    model[2].bias.data.fill_(-50.0)
    (found,) = [f for f in heard(model, 16) if f.kind == "dead"]
    assert (found.module_path, found.numbers["training_step"]) == ("2", 1.0)


def test_a_head_that_is_replaced_is_not_said_to_get_no_gradient():
    model = nn.Sequential()
    model.body, model.head = layers(), nn.Linear(4, 4)

    def replace(step: int) -> None:
        if step == 3:
            model.zero_grad()
            model.head = nn.Linear(4, 3)

    assert heard(model, 16, 8, replace) == []
