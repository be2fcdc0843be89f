"""A model without a non-linearity between its matrices is told as what it is; where it is meant it is a fact."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import stabkit
from stabkit.diagnosis import Finding, examine, treat
from stabkit.diagnosis.remedies.usual_training import RATES, adam, left_after, sgd

SAMPLES = 64
POINTS = torch.rand(SAMPLES, 2, generator=torch.Generator().manual_seed(1)) * 2 - 1
QUADRANTS = (POINTS.prod(1) > 0).float()
IMAGES = torch.randn(48, 1, 8, 8, generator=torch.Generator().manual_seed(2))
IMAGES = IMAGES * (1 + torch.arange(48) % 2).reshape(-1, 1, 1, 1)
LOUD = torch.arange(48) % 2


class Raw(nn.Module):
    """Matrices that are no layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Parameter(torch.randn(2, 24)), nn.Parameter(torch.randn(24, 1) / 5)

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.first + 0.1) @ self.second


class Skips(nn.Module):
    """Linear layers with skips, a batch norm and dropout, none of which bends anything in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.norm, self.inner = nn.Linear(2, 32), nn.BatchNorm1d(32), nn.Linear(32, 32)
        self.drop, self.head = nn.Dropout(0.1), nn.Linear(32, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.stem(x))
        return torch.sigmoid(self.head(h + self.drop(self.inner(h))))


def dense(*between: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 32), *between, nn.Linear(32, 32), nn.Linear(32, 1))


def convolutions() -> nn.Sequential:
    torch.manual_seed(0)
    layers = (nn.Conv2d(1, 16, 3), nn.Conv2d(16, 16, 1), nn.AvgPool2d(6), nn.Flatten())
    return nn.Sequential(*layers, nn.Linear(16, 2))


def binary(out: Tensor) -> Tensor:
    return functional.binary_cross_entropy_with_logits(out.squeeze(-1), QUADRANTS)


def said(model: nn.Module, inputs: Tensor, loss: Callable[[Tensor], Tensor]) -> list[Finding]:
    return [f for f in examine(stabkit.trace(model, inputs), loss).findings if f.kind == "affine"]


BENT: dict[str, tuple[Callable[[], nn.Module], Tensor, Callable[[Tensor], Tensor]]] = {
    "dense": (dense, POINTS, binary),
    "raw": (Raw, POINTS, binary),
    "skips": (Skips, POINTS, lambda p: functional.binary_cross_entropy(p.squeeze(-1), QUADRANTS)),
    "convolutions": (convolutions, IMAGES, lambda out: functional.cross_entropy(out, LOUD)),
}


@pytest.mark.parametrize("name", BENT)
def test_matrices_without_an_activation_between_are_told_where_that_hurts(name):
    make, inputs, loss = BENT[name]
    (found,) = said(make(), inputs, loss)
    assert found.severity == "warning", found.evidence
    assert "an activation" in found.remedy


def test_the_remedy_is_carried_out():
    done = treat(dense(), POINTS, loss=binary)
    assert [f.kind for f in done.applied] == ["affine"]
    assert sum(isinstance(module, nn.ReLU) for module in done.model.modules()) == 2


class Beside(nn.Module):
    """Layers, or matrices that are no layers, and a product beside them that comes last; bent where asked."""

    def __init__(self, raw: bool, bent: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c, self.skip = (
            nn.Linear(2, 24),
            nn.Linear(24, 24),
            nn.Linear(24, 1),
            nn.Linear(2, 1),
        )
        self.raw, self.bend = raw, torch.relu if bent else (lambda h: h)

    def forward(self, x: Tensor) -> Tensor:
        if self.raw:  # the layers hold the parameters alone
            h = self.bend(functional.linear(x, self.a.weight, self.a.bias))
            h = self.bend(torch.einsum("bi,oi->bo", h, self.b.weight))
            return h @ self.c.weight.T + functional.linear(x, self.skip.weight)
        return self.c(self.bend(self.b(self.bend(self.a(x))))) + self.skip(x)


def held(model: nn.Module) -> nn.Module:
    """The same with all parameters in its own hands."""
    if model.raw:
        for name in "abc":
            layer = getattr(model, name)
            holder = nn.Module()
            holder.weight, holder.bias = layer.weight, layer.bias
            setattr(model, name, holder)
    return model


@pytest.mark.parametrize("raw", [False, True])
def test_what_is_told_is_what_was_tried(raw):
    (found,) = said(held(Beside(raw)), POINTS, binary)
    assert found.severity == "warning"
    assert [action["module"] for action in found.actions] == ([] if raw else ["a", "b"])
    call = stabkit.trace(held(Beside(raw, bent=True)), POINTS).forward_pass
    begins = float(binary(call.model(POINTS)).detach())
    left = left_after(call, binary, [by(rate) for rate in RATES for by in (adam, sgd)], steps=100)
    assert f"to {left * begins:.3g} with ReLUs between" in found.evidence


class OneOfAll(nn.Module):
    """One matrix that is the last one too: no activation goes behind the others alone."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(self.layer(x)))[:, :1]


def test_what_cannot_be_tried_as_it_is_told_is_a_fact():
    (found,) = said(OneOfAll(), POINTS, binary)
    assert (found.severity, found.actions) == ("info", ())
    assert "ReLUs" not in found.evidence


MATRIX = torch.randn(6, 6, generator=torch.Generator().manual_seed(4))
VECTORS = torch.randn(SAMPLES, 6, generator=torch.Generator().manual_seed(5))


def test_a_deep_linear_network_of_a_linear_task_is_a_fact():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(6, 6, bias=False) for _ in range(4)))
    found = said(model, VECTORS, lambda out: functional.mse_loss(out, VECTORS @ MATRIX))
    assert [f.severity for f in found] == ["info"]


def test_a_linear_autoencoder_is_a_fact():
    torch.manual_seed(0)
    data = VECTORS[:, :2] @ MATRIX[:2]
    found = said(nn.Sequential(nn.Linear(6, 2), nn.Linear(2, 6)), data, lambda out: functional.mse_loss(out, data))
    assert [f.severity for f in found] == ["info"]


class LowRank(nn.Module):
    """A stretch of two matrices in a row, before an activation."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.down, self.up, self.head = nn.Linear(2, 4), nn.Linear(4, 32), nn.Linear(32, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(functional.gelu(self.up(self.down(x))))


@pytest.mark.parametrize(
    "make",
    [
        LowRank,
        lambda: dense(nn.ReLU()),
        lambda: nn.Linear(2, 1),
        lambda: nn.Sequential(nn.Linear(2, 16), nn.LayerNorm(16), nn.Linear(16, 1)),
        lambda: nn.Sequential(nn.Linear(2, 16), nn.Threshold(0.1, 0.0), nn.Linear(16, 1)),
    ],
)
def test_what_bends_somewhere_raises_nothing(make):
    torch.manual_seed(0)
    assert said(make(), POINTS, binary) == []
