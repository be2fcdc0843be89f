"""Three streams and more that are renewed one after the other, each reading what is new of those before it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from stabkit.identification import identify
from stabkit.tracing import trace

D = 5
WIDTHS = (4, 5, 6)


def field(width: int, out: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, out), nn.Tanh())


class Residual(nn.Module):
    """A block inside of a level."""

    def __init__(self, width):
        super().__init__()
        self.norm, self.layer = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x):
        return x + torch.tanh(self.layer(self.norm(x)))


class Level(nn.Module):
    """What a column makes of the level below, new, and of that above, old."""

    def __init__(self, i, below):
        super().__init__()
        self.down = nn.Linear(below, WIDTHS[i])
        self.up = nn.Linear(WIDTHS[i + 1], WIDTHS[i]) if i + 1 < len(WIDTHS) else None
        self.blocks = nn.Sequential(Residual(WIDTHS[i]), Residual(WIDTHS[i]))

    def forward(self, below, above):
        x = self.down(below)
        return self.blocks(x if self.up is None or above is None else x + self.up(above))


class Column(nn.Module):
    """A reversible column (RevCol), every level of which keeps a share of what it was."""

    def __init__(self, share):
        super().__init__()
        self.shares = nn.ParameterList(nn.Parameter(torch.full((1, width), share)) for width in WIDTHS)
        self.levels = nn.ModuleList(Level(i, below) for i, below in enumerate((3, *WIDTHS[:-1])))

    def forward(self, x, *streams):
        new, below = [], x
        for i, level in enumerate(self.levels):
            above = streams[i + 1] if i + 1 < len(streams) else None
            below = self.shares[i] * streams[i] + level(below, above)
            new.append(below)
        return tuple(new)


class Columns(nn.Module):
    """Columns that all read the stem."""

    def __init__(self, share, depth=4):
        super().__init__()
        self.stem = nn.Linear(2, 3)
        self.first = nn.ModuleList(nn.Linear(3, width) for width in WIDTHS)
        self.columns = nn.ModuleList(Column(share) for _ in range(depth))
        self.head = nn.Linear(WIDTHS[-1], 2)

    def forward(self, x):
        x = self.stem(x)
        streams = tuple(layer(x) for layer in self.first)
        for column in self.columns:
            streams = column(x, *streams)
        return self.head(streams[-1])


class Ring(nn.Module):
    """Every stream takes what its neighbours are by then."""

    def __init__(self, share):
        super().__init__()
        self.fields, self.share = nn.ModuleList(field(D, D) for _ in range(3)), share

    def forward(self, *streams):
        x = list(streams)
        for i, f in enumerate(self.fields):
            x[i] = self.share * x[i] + (1.1 - self.share) * f(x[i - 1] + x[(i + 1) % 3])
        return tuple(x)


class Rings(nn.Module):
    """Several such blocks; their fields are modules, at which a flow is cut."""

    def __init__(self, share, depth=4):
        super().__init__()
        self.first = nn.ModuleList(nn.Linear(2, D) for _ in range(3))
        self.blocks = nn.ModuleList(Ring(share) for _ in range(depth))
        self.head = nn.Linear(3 * D, 2)

    def forward(self, x):
        streams = tuple(layer(x) for layer in self.first)
        for block in self.blocks:
            streams = block(*streams)
        return self.head(torch.cat(streams, -1))


class InALoop(Rings):
    """One block, again and again."""

    def forward(self, x):
        streams = tuple(layer(x) for layer in self.first)
        for _ in self.blocks:
            streams = self.blocks[0](*streams)
        return self.head(torch.cat(streams, -1))


@pytest.mark.parametrize("model", [Columns, Rings, InALoop])
@pytest.mark.parametrize(("share", "how"), [(1.0, "Euler"), (0.75, "damped Euler")])
def test_a_sweep_over_three_streams_is_one_step(model, share, how):
    torch.manual_seed(0)
    flow = trace(model(share).double(), torch.randn(2, 2).double())
    found = [r for r in identify(flow, checks=False) if r.evidence == "proven" and len(r.system) > 60]
    numbers = "" if share == 1.0 else f" (a = {share})"
    assert [r.name for r in found] == [f"Gauss-Seidel {how} of 3 coupled states{numbers}"] * len(found)
    assert len(found) >= 3


def test_columns_are_not_one_long_step_from_the_stem():
    torch.manual_seed(0)
    found = identify(trace(Columns(0.75).double(), torch.randn(2, 2).double()), checks=False)
    assert max(len(r.steps) for r in found) == 1
    assert not any(r.name == "linear skip" for r in found)
