"""Normalizing flows that are neither steps nor couplings by a mask, and loops whose rounds have no matrix."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import stabkit
from stabkit.identification import Identification

WIDTH, LAYERS = 6, 4


def read(model: nn.Module, *shape: int) -> tuple[Identification, ...]:
    torch.manual_seed(0)
    x = torch.randn(*(shape or (3, WIDTH)), dtype=torch.float64)
    return stabkit.identify(stabkit.trace(model.double(), x), checks=False)


class Made(nn.Module):
    """Masked layers that make a shift and a scale of the coordinates before each (Germain et al. 2015)."""

    def __init__(self, *, masked: bool = True) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, 10), nn.Linear(10, 2 * WIDTH)
        degree, hidden = torch.arange(WIDTH), torch.arange(10) % (WIDTH - 1)
        into, out = hidden[:, None] >= degree, (degree[:, None] > hidden).repeat(2, 1)
        if not masked:
            into, out = torch.ones_like(into), torch.ones_like(out)
        self.register_buffer("into", into.double())
        self.register_buffer("out", out.double())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.relu(nn.functional.linear(x, self.a.weight * self.into, self.a.bias))
        return nn.functional.linear(hidden, self.b.weight * self.out, self.b.bias).chunk(2, 1)


class Flow(nn.Module):
    """Layers of Made.

    Args:
        gated: z' = s z + (1 - s) m with a sigmoid (Kingma et al. 2016), else (x - m) exp(-a).
        flips: whether the coordinates are reversed behind every layer.
        masked: whether there is an order at all.
    """

    def __init__(self, *, gated: bool, flips: bool, masked: bool = True) -> None:
        super().__init__()
        self.layers, self.gated, self.flips = nn.ModuleList(Made(masked=masked) for _ in range(LAYERS)), gated, flips

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            m, a = layer(x)
            s = torch.sigmoid(a + 1.5)
            x = s * x + (1 - s) * m if self.gated else (x - m) * torch.exp(-a)
            x = x.flip(1) if self.flips else x
        return x


@pytest.mark.parametrize("flips", [True, False])
@pytest.mark.parametrize("gated", [True, False])
def test_an_autoregressive_map_has_a_triangular_jacobian(gated, flips):
    found = read(Flow(gated=gated, flips=flips))
    assert len(found) == LAYERS
    assert {r.name for r in found} == {"autoregressive affine map (MAF, IAF)" + ", then a permutation" * flips}
    assert {r.evidence for r in found} == {"measured"}


@pytest.mark.parametrize("gated", [True, False])
def test_without_an_order_of_the_coordinates_it_is_a_gate(gated):
    found = read(Flow(gated=gated, flips=False, masked=False))
    assert not any("autoregressive" in r.name for r in found)


class Interleaved(nn.Module):
    """NICE (Dinh et al. 2015) with the coordinates taken by turns and put back by a stack."""

    def __init__(self) -> None:
        super().__init__()
        half = WIDTH // 2
        self.m = nn.ModuleList(nn.Sequential(nn.Linear(half, 9), nn.ReLU(), nn.Linear(9, half)) for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        for i, m in enumerate(self.m):
            a, b = x[:, ::2], x[:, 1::2]
            a, b = (a, b + m(a)) if i % 2 else (a + m(b), b)
            x = torch.stack([a, b], 2).reshape(x.shape)
        return x


def test_coordinates_that_take_turns_are_coupled():
    found = [r for r in read(Interleaved()) if r.step_size is not None]
    assert len(found) == LAYERS
    assert {r.name for r in found} == {"additive coupling (half of a reversible step)"}


class Halves(nn.Module):
    """RealNVP (Dinh et al. 2017) on images: halves of the channels, which change places behind every coupling."""

    def __init__(self) -> None:
        super().__init__()
        make = lambda: nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 3, padding=1))  # noqa: E731
        self.nets = nn.ModuleList(make() for _ in range(LAYERS))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        volume = x.new_zeros(len(x))
        for net in self.nets:
            a, b = x.chunk(2, 1)
            scale, shift = net(a).chunk(2, 1)
            scale = torch.tanh(scale)
            x = torch.cat([b * scale.exp() + shift, a], 1)
            volume = volume + scale.flatten(1).sum(1)
        return x, volume


def test_halves_that_change_places_are_coupled_by_affine_maps():
    found = read(Halves(), 2, 4, 3, 3)
    assert [r.name for r in found] == ["affine coupling"] * LAYERS


class Planar(nn.Module):
    """Rezende and Mohamed 2015: x + u tanh(w.x + b), the product with w written as one with entries and their sum."""

    def __init__(self) -> None:
        super().__init__()
        self.u, self.w = (nn.ParameterList(nn.Parameter(torch.randn(1, WIDTH)) for _ in range(LAYERS)) for _ in "uw")

    def forward(self, x: Tensor) -> Tensor:
        for u, w in zip(self.u, self.w, strict=True):
            x = x + u * torch.tanh((w * x).sum(-1, keepdim=True) + 0.1)
        return x


def test_a_planar_flow_is_an_euler_step_of_a_field_of_rank_one():
    found = read(Planar())
    assert [r.name for r in found] == ["forward Euler"] * LAYERS
    assert [r.step_size for r in found] == [1.0] * LAYERS
    assert {r.evidence for r in found} == {"proven"}


class Beliefs(nn.Module):
    """Damped rounds of loopy belief propagation by logarithms: no matrix, and messages that begin at zero."""

    def __init__(self, rounds: int = 5) -> None:
        super().__init__()
        self.psi, self.rounds = nn.Parameter(torch.randn(4, 4, 3, 3)), rounds

    def forward(self, unary: Tensor) -> Tensor:
        messages = torch.zeros(len(unary), 4, 4, 3, dtype=unary.dtype)
        for _ in range(self.rounds):
            others = (unary + messages.sum(1))[:, :, None] - messages.transpose(1, 2)
            new = torch.logsumexp(others[..., None] + self.psi, dim=3)
            messages = 0.5 * messages + 0.5 * (new - torch.logsumexp(new, -1, keepdim=True))
        return torch.log_softmax(unary + messages.sum(1), -1)


def test_rounds_of_messages_are_damped_steps():
    found = [r for r in read(Beliefs(), 2, 4, 3) if r.step_size is not None]
    assert len(found) == 5
    assert {(r.name, r.step_size) for r in found} == {("damped Euler (a = 0.5)", 0.5)}


class Routing(nn.Module):
    """Dynamic routing (Sabour et al. 2017): logits that grow by the agreement of predictions with their sum."""

    def __init__(self, rounds: int = 6) -> None:
        super().__init__()
        self.W, self.rounds = nn.Parameter(0.3 * torch.randn(1, 5, 3, 4, 4)), rounds

    def forward(self, u: Tensor) -> Tensor:
        said = (self.W @ u[:, :, None, :, None]).squeeze(-1)
        logits = torch.zeros(*said.shape[:3], 1, dtype=u.dtype)
        for i in range(self.rounds):
            v = (torch.softmax(logits, dim=2) * said).sum(1, keepdim=True)
            v = v / (1 + (v**2).sum(-1, keepdim=True))
            if i < self.rounds - 1:
                logits = logits + (said * v).sum(-1, keepdim=True)
        return v.squeeze(1)


def test_routing_by_agreement_moves_logits_by_euler_steps():
    found = [r for r in read(Routing(), 2, 5, 4) if r.name == "forward Euler"]
    assert len(found) == 5  # the first adds to zeros, as the others do, and the last round moves them no more
