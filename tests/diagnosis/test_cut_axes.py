"""Reshapes that cut through axes are told where a transposition serves better; those that are meant are not."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import stabkit
from stabkit.diagnosis import Finding, examine
from stabkit.diagnosis.states.cut_axes import Turn, turn_of

Loss = Callable[[Tensor], Tensor]


def said(model: nn.Module, x: Tensor, loss: Loss) -> list[Finding]:
    return [f for f in examine(stabkit.trace(model, x), loss).findings if f.kind == "axes"]


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("given", "made", "turn"),
    [
        ((2, 12, 32), (2, 4, 12, 8), Turn((2, 12, 4, 8), (0, 2, 1, 3))),
        ((2, 12, 32), (8, 12, 8), Turn((2, 12, 4, 8), (0, 2, 1, 3))),
        ((2, 4, 12, 8), (2, 12, 32), Turn((2, 4, 12, 8), (0, 2, 1, 3))),
        ((2, 32, 4, 5), (2, 20, 32), Turn((2, 32, 4, 5), (0, 2, 3, 1))),
        ((6, 3, 7), (42, 3), Turn((6, 3, 7), (0, 2, 1))),
        ((2, 7, 5), (2, 5, 7), Turn((2, 7, 5), (0, 2, 1))),
    ],
)
def test_the_move_that_was_meant(given: tuple[int, ...], made: tuple[int, ...], turn: Turn) -> None:
    assert turn_of(given, made) == turn
    x = torch.arange(math.prod(given)).reshape(given)
    assert x.reshape(turn.split).permute(turn.order).reshape(made).shape == made


@pytest.mark.parametrize(
    ("given", "made"),
    [
        ((2, 12, 32), (2, 12, 4, 8)),  # heads
        ((2, 12, 4, 8), (2, 12, 32)),
        ((2, 12, 32), (96, 8)),
        ((2, 8, 6, 6), (2, 288)),  # flattened
        ((2, 8, 6, 6), (2, 8, 3, 2, 3, 2)),  # windows
        ((2, 12, 8), (2, 4, 24)),  # frames that are stacked
        ((2, 16, 20), (2, 4, 4, 20)),  # groups of channels
        ((0, 4), (4, 0)),
    ],
)
def test_reshapes_of_whole_axes(given: tuple[int, ...], made: tuple[int, ...]) -> None:
    assert turn_of(given, made) is None


class Tagger(nn.Module):
    """A class for every position, as (batch, classes, positions)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv1d(4, 16, 3, padding=1), nn.ReLU(), nn.Conv1d(16, 3, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def test_logits_of_every_position() -> None:
    x = drawn(12, 4, 20)
    labels = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    (found,) = said(Tagger(), x, lambda out: functional.cross_entropy(out.reshape(-1, 3), labels.reshape(-1)))
    assert found.severity == "warning"
    assert found.remedy.startswith("transpose(1, 2) before it")
    assert found.numbers["learnt_turned"] > 0.2 > found.numbers["learnt"]
    turned = said(Tagger(), x, lambda out: functional.cross_entropy(out.mT.reshape(-1, 3), labels.reshape(-1)))
    assert turned == []


class Sequence(nn.Module):
    """A recurrence over time, which takes and gives times first."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rnn, self.head = nn.GRU(4, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x.transpose(0, 1))[0]).view(-1, 3)


def test_times_before_samples() -> None:
    x = drawn(16, 5, 4)
    labels = (x[..., 0] > 0).long() + (x[..., 1] > 0).long()
    (found,) = said(Sequence(), x, lambda out: functional.cross_entropy(out, labels.reshape(-1)))
    assert (found.severity, found.remedy[:15]) == ("warning", "transpose(0, 1)")
    assert said(Sequence(), x, lambda out: functional.cross_entropy(out, labels.t().reshape(-1))) == []


class Attention(nn.Module):
    """Two heads of self-attention, written out."""

    def __init__(self, turned: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.turned, self.qkv, self.out, self.head = turned, nn.Linear(8, 24), nn.Linear(8, 8), nn.Linear(8, 3)

    def split(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        return x.reshape(batch, length, 2, 4).transpose(1, 2) if self.turned else x.reshape(batch, 2, length, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.split(part) for part in self.qkv(x).chunk(3, -1))
        y = (q @ k.mT / 2).softmax(-1) @ v
        return self.head(x + self.out((y.transpose(1, 2) if self.turned else y).reshape(x.shape)))


def test_heads_that_see_parts_of_the_sequence() -> None:
    x = drawn(8, 6, 8)
    labels = torch.arange(48) % 3

    def loss(out: Tensor) -> Tensor:
        return functional.cross_entropy(out.reshape(-1, 3), labels)

    (found,) = said(Attention(turned=False), x, loss)
    assert found.severity == "warning"
    assert "changes the output at 3 positions, with a transposition at 6" in found.evidence
    assert said(Attention(turned=True), x, loss) == []


class Normalised(nn.Module):
    """Groups of channels that are normalised by hand: cut, and put together again."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head = nn.Conv2d(1, 32, 3, 2, 1), nn.Linear(32, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y = x.view(len(x), 16, -1)
        y = y / (y.std(-1, keepdim=True) + 1e-3)
        return self.head(y.view(x.shape).relu().amax((2, 3)))


class Stacked(nn.Module):
    """Two frames at a time, where there are twice as many as features, and the last counts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rnn, self.head = nn.GRU(8, 12, batch_first=True), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x.reshape(len(x), 4, 8))[0][:, -1])


@pytest.mark.parametrize(("model", "shape"), [(Normalised(), (16, 1, 8, 8)), (Stacked(), (16, 8, 4))])
def test_what_is_meant_is_at_most_a_fact(model: nn.Module, shape: tuple[int, ...]) -> None:
    x = drawn(*shape)
    labels = (x.flatten(1)[:, -4:].sum(1) > 0).long()
    assert [f for f in said(model, x, lambda out: functional.cross_entropy(out, labels)) if f.severity != "info"] == []
