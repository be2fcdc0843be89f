"""Which input depth is counted from, where a model has several."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from stabkit.errors import StabkitError
from stabkit.tracing import trace


class Denoiser(nn.Module):
    """A network of blocks that a class modulates, embedded anew at each call."""

    def __init__(self, dim: int = 16) -> None:
        super().__init__()
        self.take, self.give = nn.Linear(4, dim), nn.Linear(dim, 4)
        self.label = nn.Embedding(6, dim)
        self.mod = nn.ModuleList([nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim)) for _ in range(2)])
        self.field = nn.ModuleList([nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim)) for _ in "ab"])

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h, c = self.take(x), self.label(y)
        for mod, field in zip(self.mod, self.field, strict=True):
            shift, scale = mod(c)[:, None].chunk(2, -1)
            h = h + field(h * (1 + scale) + shift)
        return self.give(h)


class Sampler(nn.Module):
    """Euler steps along a velocity (rectified flow), or those of DDIM, which also multiply the state."""

    def __init__(self, ddim: bool, guided: bool) -> None:
        super().__init__()
        self.net, self.ddim, self.guided = Denoiser(), ddim, guided
        self.register_buffer("alphas", torch.tensor([0.3, 0.6, 0.9, 1.0]))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for now, after in zip(self.alphas[:-1], self.alphas[1:], strict=True):
            v = self.net(x, y)
            if self.guided:
                v = v + 3.0 * (v - self.net(x, torch.zeros_like(y)))
            if self.ddim:
                clean = (x - (1 - now).sqrt() * v) / now.sqrt()
                x = after.sqrt() * clean + (1 - after).sqrt() * v
            else:
                x = x + (after - now) * v
        return x


@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
@pytest.mark.parametrize("ddim", [False, True], ids=["flow", "ddim"])
def test_a_sampler_is_counted_from_its_noise_and_not_from_the_class_that_each_call_embeds(ddim: bool, guided: bool):
    # the class has the longer way and more numbers, and the first of its embeddings enters one call alone
    model, x, y = Sampler(ddim, guided), torch.randn(2, 3, 4), torch.tensor([1, 3])
    for memory in ("keep", "recompute"):
        assert trace(model, x, y, memory=memory).source_name == "0"


class Words(nn.Module):
    """A language model over time-major tokens, which is given its hidden state."""

    def __init__(self, kind: type[nn.RNNBase], layers: int = 2) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Embedding(20, 8), nn.Linear(8, 20)
        self.rnn = kind(8, 8, layers)

    def forward(self, x: Tensor, hidden: object) -> tuple[Tensor, object]:
        out, hidden = self.rnn(self.encoder(x), hidden)
        return self.decoder(out).flatten(0, 1), hidden


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_a_recurrent_layer_is_counted_from_the_tokens_and_not_from_the_state_that_is_passed_in(kind, layers: int):
    zero = torch.zeros(layers, 2, 8)
    model, words = Words(kind, layers), torch.randint(0, 20, (7, 2))
    flow = trace(model, words, (zero, zero.clone()) if kind is nn.LSTM else zero)
    assert flow.source_name == "encoder"
    assert [step.name for step in flow.steps] == [step.name for step in trace(model, words, None).steps]


class Loop(nn.Module):
    """A loop over data with a cell, from a state that is given, and larger than the data."""

    def __init__(self, kind: type[nn.RNNCellBase], time: int) -> None:
        super().__init__()
        self.cell, self.time, self.head = kind(3, 16), time, nn.Linear(16, 2)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        for now in x.unbind(self.time):
            h = self.cell(now, h)
        return self.head(h)


@pytest.mark.parametrize("kind", [nn.GRUCell, nn.RNNCell])
@pytest.mark.parametrize("time", [0, 1])
def test_a_loop_over_data_is_counted_from_them_and_not_from_the_state_with_which_it_begins(kind, time: int):
    x = torch.randn(*((6, 2) if time == 0 else (2, 6)), 3)
    assert trace(Loop(kind, time), x, torch.zeros(2, 16)).source_name == "0"


class Controlled(nn.Module):
    """A state that Euler steps carry, under a force that is given for each of them."""

    def __init__(self) -> None:
        super().__init__()
        self.field = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4))

    def forward(self, x: Tensor, u: Tensor) -> Tensor:
        for t in range(u.shape[1]):
            x = x + 0.1 * self.field(torch.cat([x, u[:, t]], -1))
        return x


def test_a_simulation_is_counted_from_its_state_and_not_from_the_forces_of_its_steps():
    assert trace(Controlled(), torch.randn(2, 4), torch.randn(2, 6, 2)).source_name == "0"


class Conditioned(nn.Module):
    """Blocks that read one time each: the same embedding, of which each block takes a part of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(1, 8), nn.SiLU(), nn.Linear(8, 32))
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)) for _ in range(4)])

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        for block, shift in zip(self.blocks, self.time(t).chunk(4, -1), strict=True):
            x = x + block(torch.tanh(x) + shift)
        return torch.tanh(x)


def test_parts_of_an_embedding_are_a_condition_and_not_parts_of_a_sequence():
    assert trace(Conditioned(), torch.randn(1, 8), torch.rand(1, 1)).source_name == "0"


def test_a_constant_that_is_returned_is_said_to_be_one():
    """A tensor that is written to, of which a part is returned that nothing was written into."""

    class Unwritten(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            kept = x.new_zeros(3, *x.shape)
            kept[0] = torch.tanh(self.f(x))
            return kept[-1]

    with pytest.raises(StabkitError, match="what is returned is a constant"):
        trace(Unwritten(), torch.randn(2, 4))


class Unrolled(nn.Module):
    """Data that every step compares its state with, and maps whose real and imaginary parts every step reads."""

    def __init__(self):
        super().__init__()
        self.nets = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))

    def forward(self, data, maps):
        x = data
        for net in self.nets:
            real, imaginary = maps[..., 0], maps[..., 1]
            seen = torch.tanh(net(real * x)) * real + torch.sin(net(imaginary * x)) * imaginary
            x = x - 0.5 * (x - data) - seen
        return x.square().sum(-1)


def test_the_state_that_steps_carry_on_is_the_source_and_no_map_that_they_read():
    assert trace(Unrolled(), torch.randn(2, 6), torch.randn(2, 6, 2)).source_name == "0"
