"""States that are carried as two values, of which only the sum is read: fused norms hand on the increment beside it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from stabkit.identification import Identification, identify
from stabkit.tracing import trace

WIDTH, LAYERS = 6, 5


def branch() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 8), nn.SiLU(), nn.Linear(8, WIDTH))


class AddNorm(nn.LayerNorm):
    """What is normalised, and the sum that is."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        total = x if residual is None else x + residual
        return super().forward(total), total


class Block(nn.Module):
    def __init__(self, branches: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(AddNorm(WIDTH) for _ in range(branches))
        self.branches = nn.ModuleList(branch() for _ in range(branches))

    def forward(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        for norm, f in zip(self.norms, self.branches, strict=True):
            x, residual = norm(x, residual)
            x = f(x)
        assert residual is not None
        return x, residual


class Pairs(nn.Module):
    """The residual begins as nothing; the last addition and norm lie behind the loop."""

    def __init__(self, branches: int = 1, *, fused: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(branches) for _ in range(LAYERS))
        self.norm, self.fused = AddNorm(WIDTH), fused

    def forward(self, x: Tensor) -> Tensor:
        residual = None
        for block in self.blocks:
            x, residual = block(x, residual)
        assert residual is not None
        made: Tensor = self.norm(x, residual)[0] if self.fused else self.norm(residual + x)[0]
        return made


class Stacked(nn.Module):
    """Both values in one tensor, the increment at first zero."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(1) for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        both = torch.stack([torch.zeros_like(x), x])
        for block in self.blocks:
            both = torch.stack(block(both[0], both[1]))
        return both.sum(0)


class Kept(nn.Module):
    """Increments that are read by themselves: momentum, and a field that is evaluated one step late."""

    def __init__(self, *, late: bool) -> None:
        super().__init__()
        self.fields, self.late = nn.ModuleList(branch() for _ in range(LAYERS)), late

    def forward(self, x: Tensor) -> Tensor:
        v = torch.zeros_like(x)
        for f in self.fields:
            if self.late:
                v, x = f(x), x + v
            else:
                x = x + v
                v = 0.5 * v + f(x)
        return x + v


def read(model: nn.Module) -> tuple[Identification, ...]:
    torch.manual_seed(0)
    return identify(trace(model.eval(), torch.randn(3, 4, WIDTH)))


@pytest.mark.parametrize(("branches", "name"), [(1, "forward Euler"), (2, "Lie splitting (2 Euler steps)")])
@pytest.mark.parametrize("fused", [False, True])
def test_a_state_and_its_pending_increment_are_one_state(branches: int, name: str, fused: bool) -> None:
    found = read(Pairs(branches, fused=fused))
    assert [(r.name, r.evidence, r.step_size) for r in found[:LAYERS]] == [(name, "proven", 1.0)] * LAYERS
    assert found[0].notes[0].startswith("the first step of its kind")
    assert found[0].notes[0].endswith(": a fork")
    assert all(r.notes[0].startswith("the 2 values are one state") for r in found[1 : LAYERS - 1])


def test_both_values_in_one_tensor() -> None:
    found = [r for r in read(Stacked()) if r.method is not None]
    assert {(r.name, r.evidence) for r in found} == {("forward Euler", "proven")}
    assert len(found) >= LAYERS - 1


@pytest.mark.parametrize(("late", "name"), [(False, "momentum (gamma = 0.5)"), (True, "delayed Euler (k = 1)")])
def test_an_increment_that_is_read_by_itself_is_a_state(late: bool, name: str) -> None:
    assert {r.name for r in read(Kept(late=late))[1:LAYERS]} == {name}
