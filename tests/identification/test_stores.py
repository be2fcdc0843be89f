"""States that are written into a tensor made beforehand are read as those that a list keeps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import stabkit

H = 0.2


class Midpoint(nn.Module):
    """Explicit midpoint steps whose states, or outputs made of them, are written into a tensor."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.spelling = spelling
        self.f = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 6))
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        width = 2 if self.spelling == "outputs" else 6
        xs = x.new_zeros((7, len(x), width))
        if self.spelling != "outputs":
            xs[0] = x
        for i in range(6):
            if self.spelling == "taken again":
                x = xs[i].clone()
            x = x + H * self.f(x + H / 2 * self.f(x))
            xs[i + 1] = self.head(x) if self.spelling == "outputs" else x
        return xs


class Verlet(nn.Module):
    """Two streams in turn, of which one is stacked at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = (nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 6)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        v, kept = 0.5 * x, []
        for _ in range(6):
            v = v + H / 2 * self.f(x)
            x = x + H * self.g(v)
            v = v + H / 2 * self.f(x)
            kept.append(x)
        return torch.stack(kept, 1)


@pytest.mark.parametrize("spelling", ["kept", "taken again", "outputs"])
def test_states_that_are_written_into_a_tensor(spelling):
    torch.manual_seed(0)
    found = stabkit.identify(stabkit.trace(Midpoint(spelling), torch.randn(3, 6)))
    read = [r for r in found if r.name == "midpoint"]
    assert len(read) >= 5
    assert {round(r.step_size, 6) for r in read} == {H}
    assert {r.name for r in found} <= {"midpoint", "fork", "join", "transition"}


def test_the_stack_of_what_was_put_out_is_no_history():
    torch.manual_seed(0)
    found = stabkit.identify(stabkit.trace(Verlet(), torch.randn(3, 6)))
    assert not [r.name for r in found if "general linear method" in r.name]
    assert [r.name for r in found].count("stormer_verlet") >= 5
