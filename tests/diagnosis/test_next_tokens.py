"""Losses of the next token that can be lowered by copying, and those that cannot."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import stabkit
from stabkit.diagnosis.finding import Finding
from stabkit.diagnosis.losses.next_tokens import _followed, _matched
from tests.diagnosis.two_devices import TwoDevices, elsewhere

SAMPLES, TIMES, TOKENS, WIDTH = 5, 9, 17, 16


class Language(nn.Module):
    """A model that gives every position scores of tokens."""

    def __init__(self, read: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.embed, self.head, self.read = nn.Embedding(TOKENS, WIDTH), nn.Linear(WIDTH, TOKENS), read
        self.layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, batch_first=True, dropout=0.0)
        self.forwards = nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.both = nn.GRU(WIDTH, WIDTH // 2, batch_first=True, bidirectional=True)
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3)

    def forward(self, x: Tensor, target: Tensor | None = None) -> Tensor:
        if target is not None:  # a decoder that is given what came before
            given = torch.cat([torch.zeros_like(target[:, :1]), target[:, :-1]], 1)
            return self.head(self.forwards(self.embed(given))[0] + self.both(self.embed(x))[0].mean(1, keepdim=True))
        return self.head(self.read(self, self.embed(x)))


def masked(diagonal: int | None, turned: bool = False) -> Callable[[Any, Tensor], Tensor]:
    def read(m: Any, h: Tensor) -> Tensor:
        mask = None if diagonal is None else torch.ones(h.shape[1], h.shape[1], dtype=torch.bool).triu(diagonal)
        return m.layer(h, src_mask=mask.T if mask is not None and turned else mask)

    return read


def convolved(left: int, right: int) -> Callable[[Any, Tensor], Tensor]:
    return lambda m, h: m.conv(functional.pad(h.transpose(1, 2), (left, right))).transpose(1, 2)


CAUSAL = {"mask": masked(1), "gru": lambda m, h: m.forwards(h)[0], "left padding": convolved(2, 0)}
SEEING = {
    "no mask": (masked(None), "layer.self_attn"),
    "mask of the past": (masked(1, turned=True), "layer.self_attn"),
    "mask from the second": (masked(2), "layer.self_attn"),
    "both directions": (lambda m, h: m.both(h)[0], "both"),
    "padding on both sides": (convolved(1, 1), "conv"),
}


def text() -> Tensor:
    return torch.randint(0, TOKENS, (SAMPLES, TIMES + 2), generator=torch.Generator().manual_seed(0))


def found(model: nn.Module, x: Tensor, targets: Tensor, **others: Tensor) -> list[Finding]:
    def loss(out: Tensor) -> Tensor:
        return functional.cross_entropy(out.transpose(1, 2), targets)

    return [f for f in stabkit.diagnose(stabkit.trace(model, x, kwargs=others), loss) if f.kind == "leak"]


@pytest.mark.parametrize("name", SEEING)
def test_a_model_that_sees_the_next_token_is_told_with_where(name: str):
    read, path = SEEING[name]
    torch.manual_seed(0)
    (told,) = found(Language(read), text()[:, :TIMES], text()[:, 1 : TIMES + 1])
    assert told.module_path == path
    assert told.severity == "warning"


@pytest.mark.parametrize("name", CAUSAL)
def test_a_model_that_does_not_see_it_is_silent_and_other_shifts_are_told(name: str):
    torch.manual_seed(0)
    model, x = Language(CAUSAL[name]), text()
    assert not found(model, x[:, :TIMES], x[:, 1 : TIMES + 1])
    (same,) = found(model, x[:, :TIMES], x[:, :TIMES])
    assert "the token that it is given there" in same.evidence
    (twice,) = found(model, x[:, :TIMES], x[:, 2:])
    assert twice.numbers["shift"] == 2
    (before,) = found(model, x[:, 1 : TIMES + 1], x[:, :TIMES])
    assert "the token before" in before.evidence


def test_models_that_may_see_everything_are_silent():
    torch.manual_seed(0)
    model, x = Language(masked(None)), text()[:, :TIMES]
    hidden = torch.rand(x.shape) < 0.3
    assert not found(model, x.masked_fill(hidden, 0), x.masked_fill(~hidden, -100))  # masked tokens
    assert not found(model, x, x)
    assert not found(model, x, x.flip(1))
    assert not found(model, x, (x * 7) % TOKENS)


def test_a_decoder_may_be_given_its_targets_and_an_encoder_all_of_them():
    torch.manual_seed(0)
    model, x = Language(masked(None)), text()
    for source in (x[:, :TIMES], x[:, 1 : TIMES + 1], x[:, 2:]):
        target = x[:, 1 : TIMES + 1].clone()
        assert not found(model, source, target, target=target)


def test_what_precedes_the_first_target_may_be_seen_both_ways():
    def read(m: Any, h: Tensor) -> Tensor:
        mask = torch.ones(TIMES, TIMES, dtype=torch.bool).triu(1)
        mask[:6, :6] = False
        return m.layer(h, src_mask=mask)

    torch.manual_seed(0)
    x = text()
    targets = x[:, 1 : TIMES + 1].clone()
    assert found(Language(read), x[:, :TIMES], targets)
    targets[:, :5] = -100
    assert not found(Language(read), x[:, :TIMES], targets)


class Forecast(nn.Module):
    """Reads a series and returns a value for every time."""

    def __init__(self, both: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.read, self.out = nn.GRU(3, 8, batch_first=True, bidirectional=both), nn.Linear(16 if both else 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.read(x)[0])


@pytest.mark.parametrize("both", [True, False])
def test_a_forecast_must_not_see_the_next_value(both: bool):
    series = torch.randn(SAMPLES, TIMES + 1, 3, generator=torch.Generator().manual_seed(0)).cumsum(1)

    def against(target: Tensor) -> list[Finding]:
        flow = stabkit.trace(Forecast(both), series[:, :-1])
        return [f for f in stabkit.diagnose(flow, lambda out: functional.mse_loss(out, target)) if f.kind == "leak"]

    assert [f.module_path for f in against(series[:, 1:])] == (["read"] if both else [])
    assert not against(series[:, :-1])  # an autoencoder
    assert not against(series[:, :-1].flip(1))


def test_attention_that_is_written_out_is_named_by_the_module_around_it():
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

        def forward(self, h: Tensor) -> Tensor:
            past = torch.ones(h.shape[1], h.shape[1]).tril()
            return (self.q(h) @ self.k(h).transpose(1, 2)).softmax(-1) * past @ self.v(h)

    torch.manual_seed(0)
    model = Language(lambda m, h: h + m.written(h))
    model.written = Attention()
    (told,) = found(model, text()[:, :TIMES], text()[:, 1 : TIMES + 1])
    assert told.module_path == "written"  # the mask comes after the softmax, whose sum holds what is later


def test_one_number_for_a_whole_series_is_no_next_value():
    series = torch.randn(SAMPLES, TIMES, 3, generator=torch.Generator().manual_seed(0))
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * TIMES, 8), nn.ReLU(), nn.Linear(8, 1), nn.Flatten(0))
    assert not stabkit.diagnose(stabkit.trace(model, series), lambda out: functional.mse_loss(out, series.mean((1, 2))))


@pytest.mark.parametrize(("given", "held"), [(elsewhere, Tensor.clone), (Tensor.clone, elsewhere)])
def test_targets_on_another_device_than_the_inputs(given, held):
    tokens = torch.randint(0, 50, (8, 12), generator=torch.Generator().manual_seed(1))
    series = torch.randn(8, 12, 3, generator=torch.Generator().manual_seed(2))
    with TwoDevices():
        one = _matched("tokens", given(tokens), held(tokens[:, 1:].reshape(-1)), -100)
        two = _followed("series", given(series), held(series[:, 1:].contiguous()))
    assert one is not None
    assert two is not None
    assert one.counted.sum() == two.counted.sum() == 8 * 11
    assert one.counted.device == two.counted.device == given(tokens).device


@pytest.mark.parametrize("inside", [True, False])
def test_a_softmax_along_positions_is_one_cause(inside: bool) -> None:
    class Along(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embed, self.head = nn.Embedding(TOKENS, WIDTH), nn.Linear(WIDTH, TOKENS)
            self.q, self.k = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
            self.forwards = nn.GRU(WIDTH, WIDTH, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            h = self.embed(x)
            if not inside:
                return self.head(self.forwards(h)[0]).log_softmax(1)
            scores = self.q(h) @ self.k(h).transpose(1, 2)
            later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
            return self.head(h + scores.masked_fill(later, -1e9).softmax(1) @ h).log_softmax(-1)

    x = torch.randint(0, TOKENS, (SAMPLES, TIMES + 1), generator=torch.Generator().manual_seed(0))

    def loss(out: Tensor) -> Tensor:
        return functional.nll_loss(out.flatten(0, 1), x[:, 1:].flatten())

    found = stabkit.analyze(Along(), x[:, :-1], loss=loss, spectrum="none").findings
    assert [f.kind for f in found if f.severity != "info"] == ["axes" if inside else "loss"]
    (leak,) = [f for f in found if f.kind == "leak"]
    assert "taken along the last axis nothing that comes later is seen" in leak.evidence


@pytest.mark.parametrize("causal", [True, False])
def test_padding_in_front_to_which_every_key_is_left_is_no_leak(causal: bool) -> None:
    x = text()[:, : TIMES + 1]
    x[::2, :3] = 0  # the last of them is to predict the first token, and a softmax of equal scores sees all keys

    def read(m: Any, h: Tensor) -> Tensor:
        later = torch.ones(h.shape[1], h.shape[1], dtype=torch.bool).triu(1) & causal
        scores = (h @ h.transpose(1, 2)).masked_fill(later | (x == 0)[:, None, :-1], -1e9)
        return h + scores.softmax(-1) @ h

    said = found(Language(read), x[:, :-1], x[:, 1:])
    assert [f.kind for f in said] == ([] if causal else ["leak"])


class Reading(nn.Module):
    """Tokens that read each other by an attention of one kind, none of which hides what comes later."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        made: dict[str, Callable[[], nn.Module]] = {
            "encoder": lambda: nn.TransformerEncoder(layer, 1, enable_nested_tensor=False),
            "layer": lambda: layer,
            "attention": lambda: nn.MultiheadAttention(16, 2, batch_first=True),
            "decoder": lambda: nn.TransformerDecoderLayer(16, 2, 32, dropout=0.0, batch_first=True),
            "convolution": lambda: nn.Conv1d(16, 16, 3, padding=1),
        }
        self.kind, self.embed, self.head = kind, nn.Embedding(20, 16), nn.Linear(16, 20)
        self.body = made.get(kind, lambda: nn.Linear(16, 48))()

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        if self.kind == "attention":
            h = h + self.body(h, h, h, need_weights=False)[0]
        elif self.kind == "decoder":
            h = self.body(h, torch.ones_like(h))
        elif self.kind == "convolution":
            h = h + self.body(h.transpose(1, 2)).transpose(1, 2)
        elif self.kind == "function":
            h = h + functional.scaled_dot_product_attention(*self.body(h).chunk(3, -1))
        elif self.kind == "softmax":
            q, k, v = self.body(h).chunk(3, -1)
            h = h + (q @ k.mT / 4).softmax(-1) @ v
        else:
            h = self.body(h)
        return self.head(h)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("encoder", "give body mask="),
        ("layer", "give body src_mask="),
        ("attention", "give body attn_mask="),
        ("decoder", "give body tgt_mask="),
        ("convolution", "pad on the left alone: no padding in body"),
        ("function", "is_causal=True in scaled_dot_product_attention (test_next_tokens.py"),
        ("softmax", "-torch.inf) before the softmax (test_next_tokens.py"),
    ],
)
def test_a_mask_is_named_as_the_module_that_is_called_names_it(kind, words):
    tokens = torch.randint(0, 20, (24, 9), generator=torch.Generator().manual_seed(0))
    inputs, targets = tokens[:, :-1], tokens[:, 1:]

    def loss(out: Tensor) -> Tensor:
        return functional.cross_entropy(out.flatten(0, 1), targets.flatten())

    found = stabkit.analyze(Reading(kind), inputs, loss=loss, spectrum="none").findings
    (told,) = [finding for finding in found if finding.kind == "leak"]
    assert words in told.remedy
