"""Weights that were all started alike, far from the usual size: one finding, and a remedy that covers all of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import stabkit
from stabkit.diagnosis import Finding, examine
from stabkit.diagnosis.finding import serious

_DRAWS = torch.Generator().manual_seed(0)
LABELS = torch.randint(0, 4, (24,), generator=_DRAWS)
IMAGES = torch.randn(4, 1, 12, 12, generator=_DRAWS)[LABELS] + 0.3 * torch.randn(24, 1, 12, 12, generator=_DRAWS)


def convolutions(start: Callable[[Tensor], object] | None, norm: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for i in range(5):
        layers += [nn.Conv2d(12 if i else 1, 12, 3, padding=1), *([nn.BatchNorm2d(12)] if norm else []), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AvgPool2d(4), nn.Flatten(), nn.Linear(108, 4))
    for module in model if start is not None else ():
        if isinstance(module, nn.Conv2d | nn.Linear):
            start(module.weight)
            nn.init.zeros_(module.bias)
    return model


def said(model: nn.Module, x: Tensor = IMAGES, labels: Tensor = LABELS) -> list[Finding]:
    flow = stabkit.trace(model, x)
    return [f for f in examine(flow, lambda out: functional.cross_entropy(out, labels)).findings if serious(f)]


def changed(finding: Finding) -> set[str]:
    return {str(action["parameter"]) for action in finding.actions if "parameter" in action}


WEIGHTS = {f"{i}.weight" for i in (0, 2, 4, 6, 8)}


@pytest.mark.parametrize(
    ("start", "kind"),
    [
        (lambda w: nn.init.normal_(w, 0, 0.01), "vanishing"),
        (lambda w: nn.init.constant_(w, 0.05), "copied_units"),
        (nn.init.zeros_, "no_gradient"),
    ],
    ids=["small", "constant", "zero"],
)
def test_all_layers_that_were_started_so_are_started_anew(start, kind):
    (found,) = said(convolutions(start))
    assert found.kind == kind
    assert changed(found) >= WEIGHTS


def test_layers_of_usual_size_or_before_norms_raise_nothing():
    assert said(convolutions(None)) == []
    assert said(convolutions(nn.init.kaiming_normal_)) == []
    assert said(convolutions(lambda w: nn.init.normal_(w, 0, 0.01), norm=True)) == []


def test_a_shallow_network_of_small_weights_that_learns_raises_nothing():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(144, 32), nn.ReLU(), nn.Linear(32, 4))
    for layer in (model[1], model[3]):
        nn.init.normal_(layer.weight, 0, 0.01)
    assert said(model) == []


class Bag(nn.Module):
    """The mean of tokens, and layers of it, all of one number."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(30, 16), nn.Linear(16, 4)
        self.layers = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU())
        for parameter in self.parameters():
            nn.init.constant_(parameter, 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.table(x).mean(1)))


def test_a_table_of_one_number_is_drawn_anew_with_the_layers():
    (found,) = said(Bag(), torch.randint(0, 30, (24, 6), generator=torch.Generator().manual_seed(1)))
    assert found.kind == "copied_units"
    assert changed(found) == {"table.weight", "layers.0.weight", "layers.2.weight", "head.weight"}


class Pixels(nn.Module):
    """A network of pixels, which divides them."""

    def __init__(self, by: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = (nn.Linear(144, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
        self.net, self.by = nn.Sequential(nn.Flatten(), *layers), by

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x / self.by)


def test_pixels_that_are_scaled_twice_are_the_cause():
    pixels = (90 * IMAGES.abs()).clamp(0, 255).round()
    (found,) = said(Pixels(255.0), pixels / 255)
    assert (found.kind, found.module_path) == ("input_scale", "net.1")
    assert "divided by 255 twice" in found.evidence
    assert [action["action"] for action in found.actions] == ["scale_input"]
    assert said(Pixels(1.0), pixels / 255) == []
