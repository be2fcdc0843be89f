"""A model that is blind to the order of its tokens is told where its targets depend on it, and not of sets."""

from __future__ import annotations

import re
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import stabkit
from stabkit.diagnosis import Finding, examine
from stabkit.diagnosis.inputs.lost_order import _Samples

SAMPLES, LENGTH = 48, 6
_GENERATOR = torch.Generator().manual_seed(3)
ORDERS = torch.stack([torch.randperm(LENGTH, generator=_GENERATOR) for _ in range(SAMPLES)])
FIRST = ((ORDERS == 0).float().argmax(1) < (ORDERS == 1).float().argmax(1)).long()
TEXTS = torch.randint(0, 30, (SAMPLES, LENGTH), generator=_GENERATOR)
POINTS = torch.randn(SAMPLES, LENGTH, 3, generator=_GENERATOR)
SHUFFLED = torch.stack([POINTS[0][order] for order in ORDERS])


class Blind(nn.Module):
    """Attention over tokens, or over vectors, and a mean over them."""

    def __init__(
        self, outputs: int, *, positions: bool = False, vectors: bool = False, batch_first: bool = True
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed: nn.Module = nn.Linear(3, 16) if vectors else nn.Embedding(30, 16)
        self.at = nn.Parameter(torch.randn(LENGTH, 16)) if positions else None
        self.attend = nn.MultiheadAttention(16, 2, batch_first=batch_first)
        self.head, self.axis = nn.Linear(16, outputs), int(batch_first)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        h = h if self.at is None else h + self.at
        return self.head((h + self.attend(h, h, h, need_weights=False)[0]).mean(self.axis))


class Bag(nn.Module):
    """The mean of the embeddings of the tokens, or of a map of points."""

    def __init__(self, outputs: int, vectors: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed: nn.Module = nn.Linear(3, 16) if vectors else nn.Embedding(30, 16)
        self.head = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.embed(x)).mean(1))


def said(model: nn.Module, inputs: Tensor, loss: Callable[[Tensor], Tensor]) -> list[Finding]:
    return [f for f in examine(stabkit.trace(model, inputs), loss).findings if f.kind == "order"]


def first(out: Tensor) -> Tensor:
    return functional.cross_entropy(out, FIRST)


# model, inputs, loss
BLIND: dict[str, tuple[Callable[[], nn.Module], Tensor, Callable[[Tensor], Tensor]]] = {
    "classes": (lambda: Blind(2), ORDERS, first),
    "one logit": (
        lambda: Blind(1),
        ORDERS,
        lambda out: functional.binary_cross_entropy_with_logits(out.squeeze(-1), FIRST.float()),
    ),
    "numbers": (
        lambda: Blind(1),
        ORDERS,
        lambda out: functional.mse_loss(out.squeeze(-1), ORDERS[:, 0].float()),
    ),
    "time first": (lambda: Blind(2, batch_first=False), ORDERS.T.contiguous(), first),
    "vectors": (lambda: Blind(2, vectors=True), SHUFFLED, first),
    "bag": (lambda: Bag(2), ORDERS, first),
}


@pytest.mark.parametrize("name", BLIND)
def test_targets_that_depend_on_an_order_which_is_not_seen(name):
    make, inputs, loss = BLIND[name]
    (found,) = said(make(), inputs, loss)
    assert found.severity == "warning"
    assert found.numbers["floor"] > 0.3 * found.numbers["scale"]
    assert "positional" in found.remedy


MANY = 128
RISING = torch.arange(MANY) % 4 // 2
ROWS = torch.randint(0, 30, (MANY, LENGTH), generator=torch.Generator().manual_seed(5))
# the larger half of the tokens comes first, or last
SORTED = torch.where(RISING[:, None] > 0, ROWS.sort(1).values, ROWS.sort(1, descending=True).values)


class Tagger(nn.Module):
    """A score for every token, by attention."""

    def __init__(self, positions: bool, causal: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(30, 16), nn.Linear(16, 3)
        self.at = nn.Parameter(torch.randn(LENGTH, 16)) if positions else None
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.mask = nn.Transformer.generate_square_subsequent_mask(LENGTH) if causal else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        return self.head(self.encoder(h if self.at is None else h + self.at, mask=self.mask))


# every token stands in its sample several times, and is tagged by whether it stood there before
REPEATED = torch.randint(0, 2, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(7))
BEFORE = torch.stack([(REPEATED[:, :i] == REPEATED[:, i : i + 1]).sum(1).clamp(max=2) for i in range(LENGTH)], 1)


def tags(out: Tensor) -> Tensor:
    return functional.cross_entropy(out.flatten(0, 1), BEFORE.flatten())


def test_tokens_that_are_tagged_by_where_they_stand():
    (found,) = said(Tagger(positions=False), REPEATED, tags)
    assert found.severity == "warning"
    assert "wherever in its sample it stands" in found.evidence
    assert said(Tagger(positions=True), REPEATED, tags) == []
    assert said(Tagger(positions=False, causal=True), REPEATED, tags) == []


def test_tokens_that_are_tagged_by_themselves_raise_nothing():
    model = Tagger(positions=False)
    assert said(model, REPEATED, lambda out: functional.cross_entropy(out.flatten(0, 1), REPEATED.flatten())) == []


WORDS = torch.randint(0, 20, (SAMPLES, 8), generator=torch.Generator().manual_seed(11))
PLACES = torch.arange(8).expand(SAMPLES, 8)
CHANCE = torch.randint(0, 8, (SAMPLES, 8), generator=torch.Generator().manual_seed(12))


def test_tokens_that_are_tagged_by_their_place_and_learnt_by_heart_without_it():
    """The floor is not above what noisy labels leave: positions must do more than tell tokens apart."""

    def said_of(labels: Tensor) -> list[Finding]:
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        model = nn.Sequential(nn.Embedding(30, 32), nn.TransformerEncoder(layer, 1), nn.Linear(32, 8))
        return said(model, WORDS, lambda out: functional.cross_entropy(out.flatten(0, 1), labels.flatten()))

    (found,) = said_of(PLACES)
    assert found.severity == "warning"
    assert "with the same sines in another order in every sample" in found.evidence
    assert said_of(CHANCE) == []


def test_an_order_that_no_two_samples_share_is_told_by_samples_held_out():
    """Of 48 tasks of sets with 64 to 200 samples none is told."""
    (found,) = said(Blind(2), SORTED, lambda out: functional.cross_entropy(out, RISING))
    assert "sines of the position" in found.evidence


SUMS = TEXTS.float().mean(1)
# model, inputs, loss
SEEN: dict[str, tuple[Callable[[], nn.Module], Tensor, Callable[[Tensor], Tensor]]] = {
    "positions": (lambda: Blind(2, positions=True), ORDERS, first),
    "bag of a set": (lambda: Bag(1), TEXTS, lambda out: functional.mse_loss(out.squeeze(-1), SUMS / 10)),
    "points": (
        lambda: Bag(1, vectors=True),
        POINTS,
        lambda out: functional.mse_loss(out.squeeze(-1), POINTS.square().mean((1, 2))),
    ),
    "the same clouds, of the same class": (
        lambda: Bag(2, vectors=True),
        torch.cat([SHUFFLED[:24], POINTS[1][ORDERS[24:]]]),
        lambda out: functional.cross_entropy(out, (torch.arange(SAMPLES) >= 24).long()),
    ),
    "the same rows, of other classes": (lambda: Bag(2), TEXTS[:1].expand(SAMPLES, -1).contiguous(), first),
    "recurrence": (lambda: Recurrent(), ORDERS, first),
}


class Recurrent(nn.Module):
    """A GRU over tokens."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.gru, self.head = nn.Embedding(30, 16), nn.GRU(16, 16, batch_first=True), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gru(self.embed(x))[0][:, -1])


@pytest.mark.parametrize("name", SEEN)
def test_sets_and_what_sees_the_order_raise_nothing(name):
    make, inputs, loss = SEEN[name]
    assert said(make(), inputs, loss) == []


def test_attention_over_a_set_raises_nothing():
    of_sum = (ROWS.sum(1) > 87).long()
    assert said(Blind(2), ROWS, lambda out: functional.cross_entropy(out, of_sum)) == []
    assert said(Blind(1), TEXTS, lambda out: functional.mse_loss(out.squeeze(-1), SUMS / 10)) == []


class ReadAt(nn.Module):
    """Attention over tokens, of which the state at one position is read."""

    def __init__(self, position: int) -> None:
        super().__init__()
        self.body, self.position = Tagger(positions=False), position

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)[:, self.position, :2]


@pytest.mark.parametrize(("position", "words"), [(-1, "in any order before the last one"), (0, "behind the first one")])
def test_what_is_read_at_an_end_is_no_matter_of_order(position, words):
    """The token there is seen as what it is; the order of the others is lost."""
    own, other = ORDERS[:, position] % 2, ORDERS[:, -1 - position] % 2
    assert said(ReadAt(position), ORDERS, lambda out: functional.cross_entropy(out, own)) == []
    (found,) = said(ReadAt(position), ORDERS, lambda out: functional.cross_entropy(out, other))
    assert words in found.evidence
    assert found.numbers["floor"] > 0.3 * found.numbers["scale"]
    assert said(ReadAt(LENGTH // 2), ORDERS, lambda out: functional.cross_entropy(out, own)) == []


def test_positions_are_added_along_time_in_either_layout():
    def loss(out: Tensor) -> Tensor:
        return functional.cross_entropy(out, RISING)

    told = [said(Blind(2), SORTED, loss), said(Blind(2, batch_first=False), SORTED.T.contiguous(), loss)]
    assert "sines of the position" in told[0][0].evidence
    ends = [re.findall(r"(\d+)% ", found.evidence) for (found,) in told]
    assert [float(end) for end in ends[0]] == pytest.approx([float(end) for end in ends[1]], abs=5)


class Named(nn.Module):
    """Takes its tokens by name, beside something that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Blind(2)

    def forward(self, scale: float, *, tokens: Tensor) -> Tensor:
        return scale * self.inner(tokens)


def test_tokens_that_are_given_by_name():
    flow = stabkit.trace(Named(), 1.0, kwargs={"tokens": SORTED})
    found = [f for f in examine(flow, lambda out: functional.cross_entropy(out, RISING)).findings if f.kind == "order"]
    assert ["sines of the position" in f.evidence for f in found] == [True]


class Started(nn.Module):
    """A transformer with positions, of which something begins at zero."""

    def __init__(self, zero: str) -> None:
        super().__init__()
        self.body = Blind(2, positions=zero != "nothing seen")
        self.gate = nn.Parameter(torch.zeros(()) if zero == "gate" else torch.ones(()))
        with torch.no_grad():
            if zero in ("head", "nothing seen"):
                self.body.head.weight.zero_()
            if zero == "positions":
                self.body.at.zero_()
            if zero == "dead":
                self.body.head.bias.fill_(-50.0)
        self.dead = zero == "dead"

    def forward(self, x: Tensor) -> Tensor:
        out = self.gate * self.body(x)
        return out.relu() if self.dead else out


@pytest.mark.parametrize("zero", ["head", "positions", "gate", "dead"])
def test_what_begins_at_zero_is_not_blind(zero):
    assert said(Started(zero), ORDERS, first) == []


def test_a_head_of_zeros_hides_no_blindness():
    (found,) = said(Started("nothing seen"), ORDERS, first)
    assert found.severity == "warning"


class InTraining(nn.Module):
    """Positions that are added in training alone."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Blind(2, positions=True)

    def forward(self, x: Tensor) -> Tensor:
        body, h = self.body, self.body.embed(x)
        h = h + body.at if self.training else h
        return body.head((h + body.attend(h, h, h, need_weights=False)[0]).mean(1))


def test_a_floor_that_training_goes_below_is_none():
    assert said(InTraining(), ORDERS, first) == []


def test_two_positions_are_exchanged():
    pairs = torch.tensor([[0, 1], [1, 0]]).repeat(SAMPLES // 2, 1)
    targets = pairs[:, 0]

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embed, self.attend = nn.Embedding(2, 16), nn.MultiheadAttention(16, 2, batch_first=True)
            self.head, self.at = nn.Linear(16, 2), nn.Parameter(torch.randn(2, 16))

        def forward(self, x: Tensor) -> Tensor:
            h = self.embed(x) + self.at
            return self.head(self.attend(h, h, h, need_weights=False)[0].mean(1))

    assert said(Two(), pairs, lambda out: functional.cross_entropy(out, targets)) == []


class Spectrum(nn.Module):
    """The power spectrum of a signal, which shifts and reversal leave as it is."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Sequential(nn.Linear(LENGTH // 2 + 1, 16), nn.ReLU(), nn.Linear(16, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.fft.rfft(x[..., 0], dim=1).abs())


def test_a_power_spectrum_sees_most_orders():
    assert said(Spectrum(), SHUFFLED, first) == []


@pytest.mark.parametrize("square", [torch.arange(16), torch.arange(16) % 4])
def test_time_first_and_as_long_as_wide(square):
    class Scored(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embed, self.attend = nn.Embedding(16, 16), nn.MultiheadAttention(16, 2)
            self.head, self.at = nn.Linear(16, 2), nn.Parameter(torch.randn(16, 1, 16))

        def forward(self, x: Tensor) -> Tensor:
            h = self.embed(x) + self.at
            return self.head(self.attend(h, h, h, need_weights=False)[0])

    tokens = square[:, None].expand(16, 16).contiguous()
    targets = (torch.arange(256) % 2).reshape(16, 16)
    assert said(Scored(), tokens, lambda out: functional.cross_entropy(out.flatten(0, 1), targets.flatten())) == []


def test_many_numbers_are_told_apart_quickly():
    rows = torch.randn(64, 256, 64)
    begun = time.perf_counter()
    held = _Samples(rows.double(), 1)
    assert time.perf_counter() - begun < 1.0
    assert len(set(held.content)) == 64
    mixed = _Samples(torch.stack([rows[0], rows[0].flip(0)]).double(), 1)
    assert len(set(mixed.content)) == 1
    assert len(set(mixed.order)) == 2
