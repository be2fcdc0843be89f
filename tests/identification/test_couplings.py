"""Affine couplings beside linear maps, and what leads around a part of a step, which is no shortcut of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import stabkit

C = 6


class _Flow(nn.Module):
    """A coupling with maps before and behind; ``how`` says what is wrong with it."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.mix = how, nn.Conv2d(C, C, 1, bias=False)
        self.loc, self.scale = nn.Parameter(torch.randn(C, 1, 1) / 9), nn.Parameter(1 + torch.rand(C, 1, 1) / 9)
        self.net = nn.Sequential(nn.Conv2d(C // 2, 9, 3, padding=1), nn.ReLU(), nn.Conv2d(9, C, 1))

    def forward(self, x: Tensor) -> Tensor:
        if self.how in ("after", "both", "leak"):
            x = self.mix(self.scale * (x + self.loc))
        if self.how == "bent":
            x = torch.tanh(self.mix(x))
        a, b = x.chunk(2, 1)
        log_s, t = self.net(b if self.how == "leak" else a).chunk(2, 1)
        x = torch.cat([a, (b + t) * torch.sigmoid(log_s + 2)], 1)
        return self.mix(x) if self.how in ("before", "both") else x


@pytest.mark.parametrize(
    ("how", "name"),
    [
        ("after", "affine coupling (after a linear map)"),
        ("before", "affine coupling (before a linear map)"),
        ("both", "affine coupling (after and before a linear map)"),
        ("none", "affine coupling"),
    ],
)
def test_a_coupling_beside_linear_maps(how: str, name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(_Flow(how) for _ in range(3))).eval()
    found = stabkit.identify(stabkit.trace(model, torch.randn(2, C, 4, 4)), checks=False)
    assert [(r.name, r.evidence, r.step_size) for r in found] == [(name, "measured", None)] * 3


@pytest.mark.parametrize("how", ["bent", "leak"])
def test_what_is_no_coupling_beside_a_linear_map(how: str) -> None:
    """A nonlinear map before it; a scale made of what it scales."""
    torch.manual_seed(0)
    model = nn.Sequential(*(_Flow(how) for _ in range(3))).eval()
    found = stabkit.identify(stabkit.trace(model, torch.randn(2, C, 4, 4)), checks=False)
    assert not any("coupling" in r.name for r in found)


class _Masked(nn.Module):
    """Couplings whose coordinates a mask of ones and zeros chooses; ``how`` says how they are written."""

    def __init__(self, masks: list[Tensor], how: str) -> None:
        super().__init__()
        self.how, (size,) = how, masks[0].shape
        for i, mask in enumerate(masks):
            self.register_buffer(f"mask_{i}", mask)
        self.nets = nn.ModuleList(nn.Sequential(nn.Linear(size, 9), nn.Tanh(), nn.Linear(9, size)) for _ in masks)
        self.scales = nn.ModuleList(nn.Linear(size, size) for _ in masks)

    def forward(self, x: Tensor) -> Tensor:
        for i, (net, scale) in enumerate(zip(self.nets, self.scales, strict=True)):
            m = self.get_buffer(f"mask_{i}")
            if self.how == "whole":
                x = m * x + (1 - m) * (x + net(m * x))
            elif self.how == "branch":
                x = x + (1 - m) * net(x * m)
            elif self.how == "back":
                x = x * m + (1 - m) * (x - net(m * x))
            elif self.how == "scaled":
                x = m * x + (1 - m) * (x * torch.exp(torch.tanh(scale(m * x))) + net(m * x))
            elif self.how == "reads all":
                x = x + (1 - m) * net(x)
            else:  # reads what it moves
                x = x + m * net(x * m)
        return x


def _masked(how: str, masks: int) -> list[str]:
    torch.manual_seed(0)
    even = (torch.arange(C) % 2).float()
    model = nn.Sequential(*(_Masked([even, 1 - even, even][:masks], how) for _ in range(3)))
    found = stabkit.identify(stabkit.trace(model, torch.randn(2, C), depth=["0", "1", "2"]), checks=False)
    return [r.name for r in found]


@pytest.mark.parametrize("how", ["whole", "branch", "back"])
@pytest.mark.parametrize(
    ("masks", "name"),
    [
        (1, "additive coupling (half of a reversible step)"),
        (2, "reversible (two-stream symplectic Euler)"),
        (3, "reversible (3 couplings in turn)"),
    ],
)
def test_a_mask_that_chooses_what_moves_makes_a_coupling(how: str, masks: int, name: str) -> None:
    assert _masked(how, masks) == [name] * 3


def test_a_mask_beside_a_scale_makes_an_affine_coupling() -> None:
    assert _masked("scaled", 1) == ["affine coupling"] * 3


@pytest.mark.parametrize("how", ["reads all", "reads what it moves"])
def test_a_mask_alone_makes_no_coupling(how: str) -> None:
    assert _masked(how, 1) == ["forward Euler"] * 3


class _Changes(nn.Module):
    """From one width to another, with something around the whole, or around a part of it."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.before, self.behind = nn.Conv2d(C, 2 * C, 1), nn.Conv2d(3 * C, 2 * C, 1)
        self.f, self.wide = nn.Conv2d(C, C, 3, padding=1), nn.Conv2d(C, 2 * C, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "chunks":
            parts = list(torch.relu(self.before(x)).chunk(2, 1))
            parts.append(torch.tanh(self.f(parts[-1])))
            return torch.relu(self.behind(torch.cat(parts, 1)))
        if self.how == "activated":
            x = torch.nn.functional.silu(x)
        if self.how == "inside":
            x = x + torch.tanh(self.f(x))
        pad = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, C)) if self.how == "padded" else self.before(x)
        return torch.relu(pad + self.wide(torch.relu(self.f(x))))


@pytest.mark.parametrize(("how", "said"), [
    ("padded", "option A"), ("projection", "is a projection"), ("chunks", ""),
    ("activated", "passes Silu and then a projection"), ("inside", ""),
])  # fmt: skip
def test_the_shortcut_of_a_step_leads_around_all_of_it(how: str, said: str) -> None:
    torch.manual_seed(0)
    (found,) = stabkit.identify(stabkit.trace(_Changes(how), torch.randn(2, C, 4, 4), depth=[""]), checks=False)
    assert found.name == "transition"
    assert ("shortcut" in found.notes[0]) == bool(said)
    assert said in found.notes[0]


class _Hamiltonian(nn.Module):
    """The field of a Hamiltonian, whose halves change places."""

    def __init__(self) -> None:
        super().__init__()
        self.H = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 1))
        self.drive = nn.Linear(4, 6)

    def forward(self, x: Tensor, u: Tensor) -> Tensor:
        x = x * torch.sigmoid(self.drive(u))
        with torch.enable_grad():
            y = x if x.requires_grad else x.detach().requires_grad_()
            gradient = torch.autograd.grad(self.H(y).sum(), y, create_graph=True)[0]
        q, p = gradient.chunk(2, -1)
        return torch.cat([p, -q], -1)


class _ByEntry(nn.Module):
    """Its Euler steps, with a step size for each entry."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.into, self.h = _Hamiltonian(), nn.Linear(4, 6), nn.Parameter(0.25 * (0.5 + torch.rand(6)))

    def forward(self, inputs: Tensor) -> Tensor:
        x = torch.tanh(self.into(inputs[:, 0]))
        for t in range(inputs.shape[1]):
            x = x + self.h * self.f(x, inputs[:, t])
        return x


def test_parts_that_are_laid_out_with_gaps_are_looked_at_all_the_same():
    torch.manual_seed(0)
    found = stabkit.identify(stabkit.trace(_ByEntry(), torch.randn(3, 6, 4)))
    assert found
    assert not [r.name for r in found if "coupling" in r.name]


class _Affine(nn.Module):
    """Half of the state is scaled and shifted by what a network makes of the other half (RealNVP)."""

    def __init__(self, flip: bool, last: float) -> None:
        super().__init__()
        self.net, self.flip = nn.Sequential(nn.Linear(4, 16), nn.LeakyReLU(), nn.Linear(16, 8)), flip
        with torch.no_grad():
            for parameter in self.net[-1].parameters():
                parameter.mul_(last)

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1)
        a, b = (b, a) if self.flip else (a, b)
        scale, shift = self.net(a).chunk(2, 1)
        b = b * (0.8 * torch.tanh(scale)).exp() + shift
        return torch.cat((b, a) if self.flip else (a, b), 1)


@pytest.mark.parametrize(("last", "name"), [(0.0, "additive coupling"), (1.0, "affine coupling")])
def test_what_a_network_gives_for_scale_and_shift_is_no_field_that_holds_the_state(last: float, name: str):
    torch.manual_seed(0)
    model = nn.Sequential(*[_Affine(bool(i % 2), last) for i in range(4)])
    found = stabkit.identify(stabkit.trace(model, torch.randn(8, 8)))
    assert [r.name.startswith(name) for r in found] == [True] * 4
    assert stabkit.analyze(model, torch.randn(8, 8)).verdict == "stable"


def test_nothing_is_read_of_numbers_that_are_not_finite():
    torch.manual_seed(0)
    model = nn.Sequential(*[_Affine(bool(i % 2), 1.0) for i in range(4)])
    with torch.no_grad():
        model[1].net[0].weight[0, 0] = float("inf")
    found = stabkit.identify(stabkit.trace(model, torch.randn(8, 8)))
    assert {(r.name, r.evidence) for r in found} == {("unknown", "unknown")}
    assert all("not finite" in note for r in found for note in r.notes)
