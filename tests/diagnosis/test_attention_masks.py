"""Masks the wrong way round, masks that mask nothing, and all the ways in which they are right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import stabkit
from stabkit.diagnosis.finding import Finding
from stabkit.diagnosis.inputs.attention_masks import _is_right, _is_turned
from stabkit.diagnosis.inputs.padding import padding_of
from tests.diagnosis.two_devices import TwoDevices, elsewhere

SAMPLES, TIMES, WIDTH = 4, 8, 16


def tokens(left: bool = False, full: bool = False) -> Tensor:
    torch.manual_seed(0)
    made = torch.randint(3, 30, (SAMPLES, TIMES))
    for i, row in enumerate(made):
        row[TIMES - i if full else 3 + i :] = 0
    return made.flip(1) if left else made


class Reader(nn.Module):
    """Embeds tokens, lets them attend to each other in one of several ways, and reads the first that is none."""

    def __init__(self, attend: Callable[[Any, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.embed, self.attend = nn.Embedding(30, WIDTH), attend
        self.layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, batch_first=True, dropout=0.0)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        padding = x == 0 if mask is None else mask
        return self.out(self.attend(self, self.embed(x), padding).mean(1))


def by_layer(m: Any, h: Tensor, padding: Tensor) -> Tensor:
    return m.layer(h, src_key_padding_mask=padding)


def by_product(m: Any, h: Tensor, padding: Tensor) -> Tensor:
    return functional.scaled_dot_product_attention(*m.qkv(h).chunk(3, -1), attn_mask=~padding[:, None, :])


def by_hand(m: Any, h: Tensor, padding: Tensor) -> Tensor:
    q, k, v = m.qkv(h).chunk(3, -1)
    scores = (q @ k.transpose(1, 2) / WIDTH**0.5).masked_fill(padding[:, None, :], -torch.inf)
    return scores.softmax(-1) @ v


def by_floats(m: Any, h: Tensor, padding: Tensor) -> Tensor:
    return functional.scaled_dot_product_attention(*m.qkv(h).chunk(3, -1), attn_mask=(~padding[:, None, :]).to(h))


def by_infinities(m: Any, h: Tensor, padding: Tensor) -> Tensor:
    mask = torch.zeros(padding.shape).masked_fill(padding, -torch.inf)
    return functional.scaled_dot_product_attention(*m.qkv(h).chunk(3, -1), attn_mask=mask[:, None, :])


def turned(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda m, h, padding: attend(m, h, ~padding)


WAYS = [by_layer, by_product, by_hand, by_infinities]


def found(model: nn.Module, *args: Tensor) -> list[Finding]:
    labels = torch.arange(SAMPLES) % 3
    said = stabkit.diagnose(stabkit.trace(model, *args), loss=lambda out: functional.cross_entropy(out, labels))
    return [f for f in said if f.kind == "mask"]


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("attend", WAYS)
def test_a_mask_the_wrong_way_round_is_told_and_the_right_one_is_not(attend: Callable[..., Tensor], left: bool):
    (told,) = found(Reader(turned(attend)), tokens(left))
    assert told.severity == "critical"
    assert "see the padding alone" in told.evidence
    assert "~mask" in told.remedy
    assert not found(Reader(attend), tokens(left))


def test_a_mask_that_is_given_is_read_beside_the_tokens():
    x = tokens()
    assert [f.severity for f in found(Reader(by_layer), x, x != 0)] == ["critical"]
    assert not found(Reader(by_layer), x, x == 0)
    assert not found(Reader(by_layer), x, torch.zeros_like(x, dtype=torch.bool))


def test_it_is_said_where_it_leaves_a_row_without_keys_too():
    x = tokens(full=True)  # the first sequence has no padding: turned round, its mask hides every key
    said = stabkit.diagnose(stabkit.trace(Reader(turned(by_hand)), x))
    assert {f.kind for f in said} >= {"mask", "non_finite"}
    assert said[0].kind == "mask"


def test_zeros_and_ones_in_floats_mask_nothing():
    (told,) = found(Reader(by_floats), tokens())
    assert "floats are added to the scores" in told.evidence
    assert told.severity == "warning"


class Pooling(nn.Module):
    """The mean of what tokens are embedded in, over those that a mask keeps."""

    def __init__(self, keep_padding: bool, embed: bool = True) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(30, WIDTH) if embed else None, nn.Linear(WIDTH, 3)
        self.keep_padding = keep_padding

    def forward(self, x: Tensor, given: Tensor | None = None) -> Tensor:
        kept = ((x == 0) == self.keep_padding).unsqueeze(2)
        h = self.embed(x) if given is None else given
        return self.out((h * kept).sum(1) / kept.sum(1).clamp_min(1))


def test_a_mean_over_the_padding_is_told_and_tokens_that_only_say_how_long_a_sequence_is_are_not():
    torch.manual_seed(0)
    (told,) = found(Pooling(True), tokens())
    assert "depends on the padding alone" in told.evidence
    assert not found(Pooling(False), tokens())
    assert not found(Pooling(False), tokens(), torch.randn(SAMPLES, TIMES, WIDTH))
    whole = torch.randint(3, 30, (SAMPLES, TIMES), generator=torch.Generator().manual_seed(1))
    assert not found(Pooling(False), whole)


def test_padding_is_one_value_that_fills_ends_of_different_lengths():
    x = tokens()
    assert torch.equal(padding_of(x), x == 0)
    assert torch.equal(padding_of(x.flip(1)), x.flip(1) == 0)
    vectors = torch.randn(SAMPLES, TIMES, 3) * (x != 0).unsqueeze(2)
    assert torch.equal(padding_of(vectors), x == 0)
    assert padding_of(torch.randint(3, 30, (SAMPLES, TIMES))) is None
    assert padding_of(torch.randn(SAMPLES, TIMES)) is None
    assert padding_of(x != 0) is None  # which end is filled up is not known
    x[0, 1] = 0
    assert padding_of(x) is None


@pytest.mark.parametrize("given", [torch.eye(4).to_sparse(), torch.empty(0, 4), torch.full((3, 4), torch.nan)])
def test_what_has_no_tokens_has_no_padding(given):
    assert padding_of(given) is None
    assert padding_of(given.to(torch.complex64)) is None


@pytest.mark.parametrize(("keys", "padding"), [(elsewhere, Tensor.clone), (Tensor.clone, elsewhere)])
def test_padding_of_inputs_that_the_model_moves_to_its_device(keys, padding):
    filled = torch.tensor([[False, False, True, True], [False, True, True, True], [False, False, False, False]])
    with TwoDevices():
        assert _is_turned(keys(filled), padding(filled))
        assert not _is_turned(keys(~filled), padding(filled))
        assert _is_right(keys(~filled), padding(filled))
        assert not _is_right(keys(filled), padding(filled))
