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
    closing = [r.steps for r in found if "closing half kick" in r.name]
    assert closing == ([found[-1].steps] if how == "leapfrog" else [])
    assert not [r for r in found if how == "leapfrog" and r.name.startswith("symplectic Euler")]


class _Trajectory(nn.Module):
    """Leapfrog with the gradients of a learned Hamiltonian, by kicks and drifts, all states stacked (SRNN)."""

    def __init__(self, last: float) -> None:
        super().__init__()
        self.last = last
        self.kinetic, self.potential = (nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 1)) for _ in range(2))

    def slope(self, energy: nn.Module, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x if x.requires_grad else x.detach().requires_grad_(True)
            return torch.autograd.grad(energy(x).sum(), x, create_graph=True)[0]

    def forward(self, q: Tensor, p: Tensor) -> Tensor:
        seen = [torch.cat([q, p], -1)]
        for i in range(5):
            p = p - 0.5 * H * self.slope(self.potential, q)
            q = q + H * self.slope(self.kinetic, p)
            p = p - (0.5 if i < 4 else self.last) * H * self.slope(self.potential, q)
            seen.append(torch.cat([q, p], -1))
        return torch.stack(seen, 1)


@pytest.mark.parametrize("last", [0.5, 1.0, 0.3])
def test_the_last_step_of_a_leapfrog_is_its_end_where_its_kick_is_half_of_a_step(last: float) -> None:
    torch.manual_seed(0)
    model, given = _Trajectory(last).double(), torch.randn(2, 4, 3, dtype=torch.float64)
    found = stabkit.identify(stabkit.trace(model, *given), checks=False)
    closing = "stormer_verlet (leapfrog, drift and closing half kick)"
    assert (found[-1].name == closing) == (last == 0.5)
    assert not any("next one does" in note for note in found[0].notes)  # half a kick is not what a whole step does
