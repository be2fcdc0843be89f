"""Half a kick before drifts and kicks makes a leapfrog; kicks that come first or turn back do not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import stabkit

H, WIDTH = 0.1, 4


class _Rounds(nn.Module):
    """Half a kick, then rounds, and all states given out."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.force, self.drift, self.other = (
            nn.Sequential(nn.Linear(WIDTH, 9), nn.Tanh(), nn.Linear(9, WIDTH)) for _ in range(3)
        )

    def forward(self, z: Tensor) -> Tensor:
        p, q = z.chunk(2, -1)
        size = {"back": -H / 2, "full": H}.get(self.how, H / 2)
        first = self.other if self.how == "other" else self.force
        slope = first(q)
        seen = [p, q]
        if self.how == "kick first":
            p = p + size * slope
        for i in range(5):
            if self.how == "kick first":
                p = p + H * self.force(q)
                q = q + H * self.drift(p)
            else:
                p = p + (H / 2 if i else size) * slope
                q = q + H * self.drift(p)
                slope = self.force(q)
                p = p + H / 2 * slope
            seen += [p, q]
        return torch.cat([torch.stack(seen[::2]), torch.stack(seen[1::2])], -1)


@pytest.mark.parametrize("how", ["leapfrog", "back", "full", "other", "kick first"])
def test_half_a_kick_before_makes_a_leapfrog(how: str) -> None:
    torch.manual_seed(0)
    flow = stabkit.trace(_Rounds(how).double(), torch.randn(3, 2 * WIDTH, dtype=torch.float64))
    found = stabkit.identify(flow, checks=False)
    leapfrogs = [r for r in found if "leapfrog" in r.name]
    assert bool(leapfrogs) == (how == "leapfrog")
    assert [r.step_size for r in leapfrogs] == pytest.approx([H] * len(leapfrogs))
