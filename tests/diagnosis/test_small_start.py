"""What starts small before a first norm is a change of units; growth behind it is judged as ever."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from stabkit.diagnosis import Diagnosis, examine
from stabkit.diagnosis.blocks.small_start import owed
from stabkit.diagnosis.finding import serious
from stabkit.tracing import trace


class Block(nn.Module):
    """x + f(norm(x)) on tokens, behind a norm of the skip as well where asked."""

    def __init__(self, width: int, first: bool = False) -> None:
        super().__init__()
        self.first = nn.LayerNorm(width, eps=1e-12) if first else nn.Identity()
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.f = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return x + self.f(self.norm(x))


class Reader(nn.Module):
    """Embeddings of some size, a token of zeros in front where asked, and blocks."""

    def __init__(self, depth: int, size: float, zeros: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(8, 16)
        nn.init.normal_(self.embed.weight, std=size)
        self.token = nn.Parameter(torch.zeros(1, 1, 16)) if zeros else None
        self.blocks = nn.ModuleList(Block(16, first=i == 0 and not zeros) for i in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        if self.token is not None:
            x = torch.cat([self.token.expand(len(x), 1, 16), x], 1)
        for block in self.blocks:
            x = block(x)
        return x


def said(model: nn.Module) -> Diagnosis:
    return examine(trace(model, torch.randint(0, 8, (3, 5), generator=torch.Generator().manual_seed(1))))


@pytest.mark.parametrize("depth", [3, 12])  # a verdict on the stretch; one block beside its peers
@pytest.mark.parametrize("zeros", [True, False])
def test_a_small_start_before_a_norm_is_no_explosion(depth: int, zeros: bool):
    found = said(Reader(depth, 1.0 if zeros else 1e-4, zeros))
    assert found.verdict.growth > math.log(1e3)
    assert found.verdict.name in ("stable", "drift")
    assert "small before the first norm" in found.verdict.summary
    (told,) = found.findings
    assert (told.severity, told.module_path) == ("info", "blocks.0")
    assert "clipped" in told.remedy


@pytest.mark.parametrize("size", [1.0, 1e-4])
def test_growth_behind_a_small_start_is_still_one(size: float):
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16))
            self.layers = nn.Sequential(*(nn.Linear(16, 16, bias=False) for _ in range(8)))
            for layer in self.layers:
                nn.init.orthogonal_(layer.weight, 3.0)

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(self.first(x))

    x = size * torch.randn(4, 16, generator=torch.Generator().manual_seed(1))
    found = examine(trace(Plain(), x))
    assert found.verdict.name == "exploding"
    assert any(serious(each) for each in found.findings)


def test_what_a_gain_owes_is_what_unit_vectors_would_not_give():
    torch.manual_seed(0)
    norm = nn.Sequential(nn.LayerNorm(16, eps=0.0), nn.Linear(16, 16)).double()
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    unit = x / x.square().mean(-1, keepdim=True).sqrt()
    sizes = torch.tensor([1e-3, 1e-2, 0.1, 0.5, 1.0], dtype=torch.float64).reshape(1, 5, 1)

    def gain(inputs: Tensor) -> tuple[float, float]:
        step = trace(norm, inputs).steps[0]
        columns = torch.randn(2, 80, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        pulled = step.jacobian().T @ columns
        return 0.5 * float(pulled.square().sum().log()), owed(step.source, pulled)

    (small, less), (full, nothing) = gain(sizes * unit), gain(unit)
    assert nothing == pytest.approx(0.0, abs=1e-9)
    assert small - less == pytest.approx(full, abs=1e-9)
