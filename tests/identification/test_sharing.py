"""What readings of a step share: each stretch is sorted once, and only what is kept is measured."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from stabkit.identification import identify
from stabkit.identification.form.coefficients import LinearCombination
from stabkit.identification.form.pieces import Piece
from stabkit.tracing import trace


class Residual(nn.Module):
    def __init__(self, step: float = 1.0, *, norm: bool = False) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6) if norm else nn.Identity()
        self.f = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        return x + self.step * self.f(self.norm(x))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(6, 6, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0]


def models() -> dict[str, tuple[nn.Module, Tensor]]:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return {
        "residual": (nn.Sequential(*[Residual() for _ in range(3)]), torch.randn(2, 6)),
        "pre-norm": (nn.Sequential(*[Residual(norm=True) for _ in range(3)]), torch.randn(2, 6)),
        "encoder": (nn.TransformerEncoder(layer, 3, enable_nested_tensor=False), torch.randn(2, 5, 8)),
        "recurrent": (nn.Sequential(Recurrent(), nn.Linear(6, 6)), torch.randn(2, 9, 6)),
    }


@pytest.mark.parametrize("name", list(models()))
def test_no_stretch_is_sorted_twice(name, monkeypatch):
    torch.manual_seed(0)
    model, x = models()[name]
    flow = trace(model, x)
    made: Counter[object] = Counter()
    original = Piece.__init__

    def counted(self, graph, nodes, sources, targets, *, contexts=(), owned=()):
        original(self, graph, nodes, sources, targets, contexts=contexts, owned=owned)
        made[self.nodes, self.sources, self.targets, self.contexts, self.owned] += 1

    monkeypatch.setattr(Piece, "__init__", counted)
    identify(flow)
    assert made
    assert max(made.values()) == 1


def test_alike_blocks_have_the_step_sizes_of_their_own():
    steps = (0.1, 0.25, 0.25, 0.7)
    found = identify(trace(nn.Sequential(*[Residual(h) for h in steps]).double(), torch.randn(2, 6).double()))
    assert [round(record.step_size, 12) for record in found] == list(steps)
    assert {(record.name, record.evidence) for record in found} == {("forward Euler", "proven")}


def _coefficient(function) -> str:
    """The kind of the coefficient of x in a function of it and of tanh(x)."""
    x = torch.randn(2, 4, 4, dtype=torch.float64)
    flow = trace(Function(function), x, depth=lambda path, _: path == "", check=False)
    (source,), (target,) = flow.states[0].values, flow.states[-1].values
    piece = Piece(flow.recorded.graph, flow.recorded.graph.nodes, [source], [target])
    found = LinearCombination(piece, target).coefficient(source)
    return "none" if found is None else f"{found.kind} {found.value:.3g}"


class Function(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@pytest.mark.parametrize(
    ("function", "kind"),
    [
        (lambda x: (x.mT + torch.tanh(x).mT).mT, "scalar 1"),
        (lambda x: x.mT + torch.tanh(x), "moved 1"),
        (lambda x: torch.add(0.5 * x, x.mT, alpha=0.5) + torch.tanh(x), "mixed 1"),
        (lambda x: torch.add(torch.add(x, x.mT), x.mT, alpha=-1) + torch.tanh(x), "scalar 1"),
        (lambda x: torch.add(x + x.mT, x.flatten(1).view(-1, 4, 4), alpha=-1) + torch.tanh(x), "moved 1"),
        (lambda x: x.expand(2, 4, 4).mT.expand(2, 4, 4).mT + torch.tanh(x), "scalar 1"),
        (lambda x: x + x.mT + torch.tanh(x), "mixed 2"),
        (lambda x: 3 * x.mT.mT + torch.tanh(x), "scalar 3"),
    ],
)
def test_sums_along_the_way_of_a_state(function, kind):
    torch.manual_seed(0)
    assert _coefficient(function) == kind


class _Branches(nn.Module):
    """Two branches at one point, behind one norm or each behind its own."""

    def __init__(self, *, one_norm: bool) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(6) for _ in range(1 if one_norm else 2))
        self.f, self.g = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.f(self.norms[0](x))) + torch.sigmoid(self.g(self.norms[-1](x)))


@pytest.mark.parametrize(("one_norm", "said"), [(True, None), (False, False)])
def test_branches_behind_one_norm_are_not_said_to_share_nothing(one_norm, said):
    torch.manual_seed(0)
    blocks = nn.Sequential(*[_Branches(one_norm=one_norm) for _ in range(3)])
    records = identify(trace(blocks, torch.randn(2, 6)))
    assert [(r.name, r.shared_weights) for r in records] == [("forward Euler, parallel branches", said)] * 3
