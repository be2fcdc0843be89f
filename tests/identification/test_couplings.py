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
        pad = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, C)) if self.how == "padded" else self.before(x)
        return torch.relu(pad + self.wide(torch.relu(self.f(x))))


@pytest.mark.parametrize(("how", "said"), [("padded", "option A"), ("projection", "a projection"), ("chunks", "")])
def test_the_shortcut_of_a_step_leads_around_all_of_it(how: str, said: str) -> None:
    torch.manual_seed(0)
    (found,) = stabkit.identify(stabkit.trace(_Changes(how), torch.randn(2, C, 4, 4), depth=[""]), checks=False)
    assert found.name == "transition"
    assert ("shortcut" in found.notes[0]) == bool(said)
    assert said in found.notes[0]
