"""Residual chains within a residual branch or a long skip, and parts of a field that are added and taken away again."""

import pytest
import torch
from torch import nn

from stabkit import identify, trace

WIDTH = 4


class Block(nn.Module):
    def __init__(self, h=0.1):
        super().__init__()
        self.a, self.b, self.h = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), h

    def forward(self, x):
        return x + self.h * self.b(torch.tanh(self.a(x)))


class Group(nn.Module):
    """RRDB, RCAN: residual blocks, and maybe a last layer, within a residual branch."""

    def __init__(self, h, last):
        super().__init__()
        self.body = nn.Sequential(*(Block() for _ in range(3)), *([nn.Linear(WIDTH, WIDTH)] if last else []))
        self.h = h

    def forward(self, x):
        return self.body(x) * self.h + x


def read(model, *shape):
    return identify(trace(model, torch.randn(*shape)))


@pytest.mark.parametrize(("h", "last"), [(0.2, False), (1.0, True)])
def test_a_branch_that_is_a_chain_of_blocks_is_one_field(h, last):
    torch.manual_seed(0)
    found = read(nn.Sequential(*(Group(h, last) for _ in range(3))), 2, WIDTH)
    assert {record.name for record in found} == {"forward Euler (residual in residual)"}
    assert [record.step_size for record in found] == pytest.approx([h] * 3)
    assert {record.evidence for record in found} == {"proven"}
    assert {record.skip for record in found} == {1.0}
    told = "the branch itself is 3 times forward Euler" + (", then a map" if last else "")
    assert {record.notes[0] for record in found} == {told}


def test_stages_that_read_the_state_besides_are_no_chain():
    class Stages(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            k = torch.tanh(self.a(x))
            return x + 0.3 * k + 0.6 * torch.tanh(self.b(x + 0.7 * k))

    torch.manual_seed(0)
    assert not any("residual in residual" in r.name for r in read(nn.Sequential(Stages(), Stages()), 2, WIDTH))


class LongSkip(nn.Module):
    """Few blocks within a long skip, on tokens put together by twos or on all of them."""

    def __init__(self, block, *, shortened):
        super().__init__()
        self.before = nn.Linear(WIDTH, WIDTH)
        self.down, self.up = nn.Linear(2 * WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.blocks, self.tail = nn.ModuleList(block() for _ in range(2)), nn.Linear(WIDTH, WIDTH)
        self.shortened = shortened

    def forward(self, x):
        x = self.before(x)
        y = self.down(x.reshape(len(x), -1, 2 * WIDTH)) if self.shortened else x
        for block in self.blocks:
            y = block(y)
        return x + (self.up(y).reshape(x.shape) if self.shortened else self.tail(y))


@pytest.mark.parametrize("shortened", [False, True])
@pytest.mark.parametrize("block", [Block, lambda: Group(0.2, last=True)])
def test_blocks_within_a_long_skip_are_steps_however_few_they_are(block, shortened):
    torch.manual_seed(0)
    found = read(LongSkip(block, shortened=shortened), 2, 6, WIDTH)
    assert sum(record.name.startswith("forward Euler") and record.skip == 1.0 for record in found) == 2
    assert all(len(record.steps) == 1 for record in found)


def test_a_mixer_with_its_argument_taken_away_is_one_field_of_a_splitting():
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.last = nn.GroupNorm(1, WIDTH), nn.GroupNorm(1, WIDTH)
            self.pool = nn.AvgPool2d(3, 1, 1, count_include_pad=False)
            self.inner, self.outer = nn.Conv2d(WIDTH, 6, 1), nn.Conv2d(6, WIDTH, 1)

        def forward(self, x):
            y = self.norm(x)
            x = x + 0.1 * (self.pool(y) - y)
            return x + 0.1 * self.outer(torch.relu(self.inner(self.last(x))))

    torch.manual_seed(0)
    model = nn.Sequential(Pooled(), Pooled())
    found = identify(trace(model, torch.randn(2, WIDTH, 5, 5), depth=["0", "1"]))
    assert {record.name for record in found} == {"Lie splitting (2 Euler steps)"}
    assert [record.step_size for record in found] == pytest.approx([0.1, 0.1])


def test_what_a_last_layer_reads_besides_is_no_state_of_it():
    class Token(nn.Module):
        """A learned token that reads a sequence, in two layers (CaiT)."""

        def __init__(self):
            super().__init__()
            self.token = nn.Parameter(torch.randn(1, 1, WIDTH))
            self.layers = nn.ModuleList(Reading() for _ in range(2))
            self.before = Block()

        def forward(self, x):
            x, token = self.before(x), self.token.expand(len(x), -1, -1)
            for layer in self.layers:
                token = layer(token, x)
            return token

    class Reading(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

        def forward(self, token, x):
            both = torch.cat([token, x], 1)
            weights = (self.q(token) @ self.k(both).mT).softmax(-1)
            return token + weights @ self.v(both)

    torch.manual_seed(0)
    last = read(Token(), 2, 5, WIDTH)[-1]
    assert (last.name, last.method, last.skip) == ("forward Euler", None, None)
    assert last.notes[0] == "1 value is held from before and read for the last time: a join"


def test_weights_that_are_drawn_for_every_sample_are_told():
    class Shaken(nn.Module):
        def __init__(self, scale):
            super().__init__()
            self.a, self.b, self.scale = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), scale

        def forward(self, x):
            share = torch.rand(len(x), 1) if self.scale is None else self.scale
            return x + share * torch.tanh(self.a(x)) + (1 - share) * torch.tanh(self.b(x))

    torch.manual_seed(0)
    for scale, told in (
        (None, True),
        (nn.Parameter(torch.rand(WIDTH)), False),
        (nn.Parameter(torch.rand(1, 1)), False),
    ):
        found = read(nn.Sequential(Shaken(scale), Shaken(scale)).train(), WIDTH, WIDTH)
        assert {any("each sample's own" in note for note in record.notes) for record in found} == {told}
