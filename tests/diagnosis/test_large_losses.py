"""Losses that begin far too high by the data, or by weights that were all started large."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import stabkit
from stabkit.diagnosis import examine, treat
from stabkit.diagnosis.finding import serious
from stabkit.diagnosis.losses import large
from stabkit.diagnosis.remedies.outer_causes import smaller_weights
from stabkit.diagnosis.remedies.short_training import (
    ShortTraining,
    clearly_better,
    helps,
    short_training,
    spoils,
    worse,
)
from stabkit.diagnosis.suspects import Settings, suspected

X = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
LABELS = X[:, :4].argmax(1)
TARGETS = torch.tanh(X @ torch.randn(8, 4, generator=torch.Generator().manual_seed(2)))


class Image(nn.Module):
    """Convolutions of a small image and a mean."""

    def __init__(self) -> None:
        super().__init__()
        layers = [layer for _ in range(3) for layer in (nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())]
        self.stem, self.body, self.head = nn.Conv2d(1, 8, 1), nn.Sequential(*layers), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x.view(-1, 1, 2, 4))).mean((2, 3)))


class Residual(nn.Module):
    """Residual blocks without norms."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(8, 32), nn.Linear(32, 4)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32)) for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        for block in self.blocks:
            h = h + block(h)
        return self.head(h)


def layers() -> nn.Module:
    middle = [layer for _ in range(3) for layer in (nn.Linear(32, 32), nn.ReLU())]
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), *middle, nn.Linear(32, 4))


def normal(make: type[nn.Module], size: float = 1.0) -> nn.Module:
    torch.manual_seed(0)
    model = make()
    for weight in model.parameters():
        if weight.dim() > 1:
            nn.init.normal_(weight, 0.0, size)
    return model


def classes(out: Tensor) -> Tensor:
    return functional.cross_entropy(out, LABELS)


def squares(out: Tensor) -> Tensor:
    return functional.mse_loss(out, TARGETS)


@pytest.mark.parametrize(("make", "loss"), [(layers, squares), (Image, classes), (Image, squares), (Residual, squares)])
def test_weights_that_were_all_started_large_are_started_smaller(make, loss):
    model = normal(make)
    done = treat(model, X, loss=loss)
    first = done.applied[0]
    assert "matrices were started large" in first.evidence
    assert len(first.actions) == sum(p.dim() > 1 for p in model.parameters())
    stuck, trains = (short_training(stabkit.trace(m, X), loss) for m in (model, done.model))
    assert trains.last < stuck.last
    assert trains.last < trains.first < stuck.first


@pytest.mark.parametrize("make", [layers, Image, Residual])
def test_weights_of_usual_size_raise_nothing_of_the_kind(make):
    torch.manual_seed(0)
    found = stabkit.diagnose(stabkit.trace(make(), X), classes)
    assert not [f for f in found if "started large" in f.evidence or "the loss begins" in f.evidence]


class Flow(nn.Module):
    """Steps of one field on the data themselves."""

    def __init__(self, power: int = 1, outputs: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.field = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 8))
        self.head, self.power = nn.Linear(8, outputs), power

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(8):
            x = x + self.field(x**self.power) / 8
        return self.head(x)


@pytest.mark.parametrize("size", [50.0, 1000.0])
@pytest.mark.parametrize("power", [1, 3])
def test_of_large_data_the_data_are_scaled_and_not_the_field(size, power):
    flow = stabkit.trace(Flow(power), size * X)
    told = stabkit.diagnose(flow, classes)
    if size > 50:
        assert "divide the input where the data are read by" in told[0].remedy
        assert serious(told[0])
    else:  # it learns all of it as it is
        assert not any(map(serious, told))
        assert "the input has the size" in told[0].evidence
    assert not any(action["action"] == "scale" for f in told for action in f.actions)


def test_a_field_that_grows_with_the_square_of_large_data():
    class Quadratic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(6):
                x = x + 0.05 * x * self.a(x)
            return x

    x = 60.0 * X
    for loss in (None, lambda out: functional.mse_loss(out, x.roll(1, 1))):
        told = [f for f in stabkit.diagnose(stabkit.trace(Quadratic(), x), loss) if serious(f)]
        assert told
        assert "divide the input where the data are read by" in told[0].remedy
        assert not told[0].actions


@pytest.mark.parametrize("with_loss", [False, True])
def test_large_images_behind_a_norm_have_small_gradients_and_no_fault(with_loss):
    torch.manual_seed(0)
    layers = [nn.BatchNorm2d(3), nn.Conv2d(3, 16, 3, 2), nn.ReLU(), nn.Conv2d(16, 16, 3, 2), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))
    x = 255 * torch.rand(16, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    loss = (lambda out: functional.cross_entropy(out, LABELS[:16])) if with_loss else None
    found = stabkit.diagnose(stabkit.trace(model, x), loss)
    assert not [f for f in found if serious(f)]
    (fact,) = [f for f in found if f.kind == "vanishing"]
    assert "the unit of the input alone" in fact.remedy


def test_what_training_says_of_a_remedy():
    stuck, falls = ShortTraining(2.0, 2.0), ShortTraining(100.0, 1.0)
    assert helps(ShortTraining(2.0, 1.0), stuck)
    assert not helps(ShortTraining(2.0, 1.99), stuck)  # no better than what fails
    assert helps(ShortTraining(2.0, 1.01), falls)
    assert not helps(ShortTraining(2.0, 1.5), falls)  # the first loss of what is far too high is no measure
    assert worse(ShortTraining(2.0, 1.5), falls)
    assert clearly_better(ShortTraining(2.0, 0.5), falls)
    assert spoils(ShortTraining(2.0, 2.0), falls)
    assert not spoils(ShortTraining(3.0, 2.0), falls)


def test_norms_in_eval_mode_are_no_witnesses_of_large_data():
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1)).eval()
    x, y = 300 * torch.randn(32, 8), torch.randn(32, 1)
    found = examine(stabkit.trace(model, x), lambda out: (out - y).square().mean()).findings
    assert not [f for f in found if f.severity != "info"]


class Growing(nn.Module):
    """Residual blocks without norms, all of whose matrices were started large."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head = nn.Linear(8, 24), nn.Linear(24, 4)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 24)) for _ in range(8))
        for weight in self.parameters():
            if weight.dim() > 1:
                nn.init.normal_(weight, 0.0, 2.5 / weight.shape[1] ** 0.5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        for block in self.blocks:
            h = h + block(h)
        return self.head(h)


def test_what_was_tried_of_another_remedy_is_not_told_of_this_one():
    """With no trial left no remedy of the growth is told, and the one that trains better takes its place."""
    flow = stabkit.trace(Growing(), X)
    bare = next(f for f in suspected(flow, Settings(squares)).findings if f.kind == "exploding" and len(f.steps) > 2)
    told = examine(flow, squares, trials=0).findings[0]
    assert (told.kind, told.steps) == (bare.kind, bare.steps)
    assert "matrices with the standard deviation 1 / sqrt(fan-in)" in told.remedy
    assert told.evidence.startswith(f"{bare.evidence}; the loss begins at")
    assert "tried on a copy" not in told.evidence
    assert told.evidence.count("as it is") == 1


def test_what_begins_no_lower_is_not_trained(monkeypatch):
    """A loss that plain training brings below where it begins with smaller weights is not too large by them."""
    flow = stabkit.trace(normal(layers, 0.6), X)
    found = suspected(flow, Settings(classes))
    assert smaller_weights(found.measurement)
    monkeypatch.setattr(large, "trained_with", lambda *_: pytest.fail("trained"))
    assert large.with_large_loss(flow, found, found.findings, Settings(classes)) is found
