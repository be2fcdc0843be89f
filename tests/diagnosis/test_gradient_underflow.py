"""Gradients that are lost to float16 are named, and the layers are not blamed for it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import stabkit
from stabkit.diagnosis import examine
from stabkit.diagnosis.finding import serious


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 8))


class Autocast(nn.Module):
    """A network with float32 weights that computes in half precision, and multiplies what it puts out."""

    def __init__(self, by: float = 1.0, dtype: torch.dtype = torch.float16) -> None:
        super().__init__()
        self.net, self.by, self.dtype = layers(), by, dtype

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=self.dtype):
            return self.net(x) * self.by


X = torch.randn(256, 8, generator=torch.Generator().manual_seed(1))
Y = torch.tanh(X @ torch.randn(8, 8, generator=torch.Generator().manual_seed(2)))


def squares(by: float = 1.0) -> Callable[[Tensor], Tensor]:
    return lambda out: by * functional.mse_loss(out.float(), Y)


LOST: dict[str, tuple[Callable[[], nn.Module], Tensor, Callable[[Tensor], Tensor]]] = {
    "a loss of small numbers": (Autocast, X, squares(1e-6)),
    "a small output": (lambda: Autocast(1e-3), X, lambda out: functional.mse_loss(out.float(), 1e-3 * Y)),
    "weights in half": (lambda: layers().half(), X.half(), squares(1e-7)),
}


def of_adam(finding: stabkit.Finding) -> bool:
    """Whether it is about what Adam makes of weights in half precision, scaled or not."""
    return "Adam's eps" in finding.evidence


@pytest.mark.parametrize("name", LOST)
def test_gradients_that_a_scaled_loss_brings_back_are_lost_to_the_dtype(name):
    make, x, loss = LOST[name]
    report = stabkit.analyze(make(), x, loss=loss)
    (found,) = [f for f in report.findings if serious(f) and not of_adam(f)]
    assert (found.kind, found.severity) == ("precision_loss", "critical")
    assert "underflow float16, whose smallest number is 6e-08: 100% of the 55" in found.evidence
    assert "with the loss scaled" in found.evidence
    assert "GradScaler" in found.remedy
    assert "bfloat16" in found.remedy
    assert ("torch.autocast" in found.remedy) is (name == "weights in half")


@pytest.mark.parametrize("name", LOST)
def test_nothing_is_said_once_the_loss_is_scaled(name):
    make, x, loss = LOST[name]
    found = stabkit.analyze(make(), x, loss=lambda out: 2.0**16 * loss(out)).findings
    assert not [f for f in found if serious(f) and not of_adam(f)]


@pytest.mark.parametrize(
    ("model", "loss"),
    [
        (Autocast(), squares()),
        (Autocast(), lambda out: functional.cross_entropy(out.float(), Y.argmax(1))),
        (Autocast(dtype=torch.bfloat16), squares(1e-6)),
        (layers(), squares(1e-6)),
    ],
)
def test_what_trains_as_it_is_needs_no_scaled_loss(model, loss):
    assert not [f for f in stabkit.analyze(model, X, loss=loss).findings if serious(f)]


def small_end(by: float, where: int = 4) -> tuple[nn.Sequential, Callable[[Tensor], Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    with torch.no_grad():
        model[where].weight.mul_(by)
        model[4].bias.zero_()
    targets = 1e-3 * functional.pad(Y, (0, 8))
    return model, lambda out: functional.mse_loss(out, targets)


def test_a_last_layer_that_is_small_on_purpose_is_left_as_it_trains_better():
    """Of outputs that are to be small: at the usual size the loss begins a million times as high."""
    model, loss = small_end(1e-3)
    diagnosis = examine(stabkit.trace(model, X), loss)
    assert not [f for f in diagnosis.findings if serious(f)]
    (told,) = [f for f in diagnosis.findings if f.module_path == "4"]
    assert "it trains as well as it is, or better" in told.remedy
    assert diagnosis.verdict.name != "vanishing"
    assert [f.module_path for f in examine(stabkit.trace(model, X)).findings if serious(f)] == ["4"]  # without a loss


def test_small_weights_that_training_minds_are_still_a_fault():
    model, _ = small_end(1e-3, where=2)
    targets = functional.pad(Y, (0, 8))
    found = examine(stabkit.trace(model, X), lambda out: functional.mse_loss(out, targets)).findings
    assert "2" in [f.module_path for f in found if serious(f)]
