"""A loss that holds a tensor against itself is told, with the output that was forgotten."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import stabkit
from stabkit.diagnosis import Finding

_DRAWS = torch.Generator().manual_seed(0)
CLASSES = torch.randint(0, 4, (48,), generator=_DRAWS)
CENTRES = 2 * torch.randn(4, 10, generator=_DRAWS)
ANCHORS, POSITIVES, NEGATIVES = (
    CENTRES[(CLASSES + shift) % 4] + 0.5 * torch.randn(48, 10, generator=_DRAWS) for shift in (0, 0, 1)
)
TRIPLET = nn.TripletMarginLoss()


class Embedded(nn.Module):
    """Three batches through one network; the third input may be forgotten."""

    def __init__(self, forgotten: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.f = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 8))
        self.forgotten = forgotten

    def forward(self, a: Tensor, p: Tensor, n: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.f(a), self.f(p), self.f(a if self.forgotten else n)


def said(loss: Callable[[tuple[Tensor, ...]], Tensor], model: nn.Module | None = None) -> list[Finding]:
    report = stabkit.analyze(model or Embedded(), ANCHORS, POSITIVES, NEGATIVES, loss=loss, spectrum="none")
    return [f for f in report.findings if f.severity != "info"]


def by_hand(out: tuple[Tensor, ...]) -> Tensor:
    near, far = (out[0] - out[1]).square().sum(1), (out[0] - out[0]).square().sum(1)
    return functional.relu(near - far + 1).mean()


@pytest.mark.parametrize(
    ("loss", "pair", "output"),
    [
        (lambda out: TRIPLET(out[0], out[1], out[0]), "anchor and its negative", "2"),
        (lambda out: TRIPLET(out[0], out[1], negative=out[1]), "positive and its negative", "2"),
        (lambda out: TRIPLET(out[0], out[0], out[2]), "anchor and its positive", "1"),
        (by_hand, "input and its other", "2"),
    ],
)
def test_a_tensor_that_is_held_against_itself(loss, pair, output):
    (found,) = said(loss)
    assert found.kind == "loss"
    assert f"the same numbers as its {pair}" in found.evidence
    assert f"the output '{output}' is read by nothing, and the loss with it in that place was tried" in found.evidence
    assert f"the output '{output}'" in found.remedy


def test_an_input_that_the_model_forgets():
    (found,) = said(lambda out: TRIPLET(*out), Embedded(forgotten=True))
    assert "anchor and its negative" in found.evidence


@pytest.mark.parametrize(
    "loss",
    [
        lambda out: TRIPLET(*out),
        lambda out: (out[0] - out[0].detach()).square().mean() + TRIPLET(*out),
        lambda out: functional.mse_loss(out[0], out[0].detach()) + TRIPLET(*out),
        lambda out: (torch.cdist(out[0], out[0]) - 1).relu().mean() + TRIPLET(*out),
        lambda out: functional.cosine_similarity(out[0][:, None], out[0][None], -1).mean() + TRIPLET(*out),
    ],
)
def test_what_differs_or_was_taken_off_the_graph_raises_nothing(loss):
    assert said(loss) == []


def test_outputs_that_begin_at_zero_are_no_tensor_given_twice():
    model = Embedded()
    nn.init.zeros_(model.f[2].weight)
    assert not [f for f in said(lambda out: TRIPLET(*out), model) if "the same numbers" in f.evidence]
