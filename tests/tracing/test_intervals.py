from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from stabkit.tracing.graph.frontiers import Frontiers
from stabkit.tracing.graph.graph import Graph
from stabkit.tracing.graph.intervals import Intervals
from stabkit.tracing.graph.values import value_of
from stabkit.tracing.recording.inputs import non_leaf
from stabkit.tracing.recording.recorder import Recording, recording_calls


def intervals(model: nn.Module, *shape: int) -> Intervals:
    x = non_leaf(torch.randn(*shape))
    recording = Recording()
    model.requires_grad_(False)
    with recording_calls(model, recording):
        out = model(x)
    graph = Graph([value_of(x)], [value_of(out)])
    return Intervals(graph, Frontiers(graph), recording.calls)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(self.a(x).tanh())


MODEL = nn.Sequential(nn.Linear(3, 3), nn.Sequential(Residual(), Residual()), nn.Identity(), nn.Tanh())


def test_calls_are_intervals_of_positions():
    found = intervals(MODEL, 2, 3)
    spans = {call.path: (call.start, call.stop) for call in found.calls}
    assert spans == {
        "": (0, 10),
        "0": (0, 1),
        "1": (1, 9),
        "1.0": (1, 5),
        "1.0.a": (1, 2),
        "1.0.b": (3, 4),
        "1.1": (5, 9),
        "1.1.a": (5, 6),
        "1.1.b": (7, 8),
        "3": (9, 10),
    }  # nn.Identity holds no operation


def test_calls_form_a_forest_and_containers_are_opened():
    found = intervals(MODEL, 2, 3)
    (root,) = found.children(None)
    assert [call.path for call in found.children(root)] == ["0", "1", "3"]
    assert [call.path for call in found.items(root)] == ["0", "1.0", "1.1", "3"]
    by_path = {call.path: call for call in found.calls}
    assert found.parent(by_path["1.0.a"]) is by_path["1.0"]
    assert found.is_leaf(by_path["0"])
    assert found.is_container(by_path["1"])
    assert not found.is_container(by_path["1.0"])
    assert by_path["1.0.a"].pattern == by_path["1.1.a"].pattern == "#.#.a"


def test_width_tells_branches_from_plain_layers():
    found = intervals(MODEL, 2, 3)
    assert found.width.tolist() == [1, 1, 2, 2, 2, 1, 2, 2, 2, 1, 1]
    assert found.is_wide(1, 5)
    assert not found.is_wide(0, 1)
    assert found.wide_regions(0, 10) == [(1, 5), (5, 9)]
    by_path = {call.path: call for call in found.calls}
    assert found.is_narrow_to_narrow(by_path["1.0"])
    assert not found.is_narrow_to_narrow(by_path["1.0.a"])  # it ends beside its skip


def test_weights_and_operations_between_positions():
    found = intervals(MODEL, 2, 3)
    assert found.operations(1, 5) == {"Addmm": 2, "Tanh": 1, "Add": 1}
    assert found.has_weights(0, 1)
    assert not found.has_weights(9, 10)
    assert not found.has_convolutions
    assert intervals(nn.Conv1d(2, 2, 1), 1, 2, 3).has_convolutions


@pytest.mark.parametrize("n_blocks", [2, 4])
def test_what_all_blocks_read_and_none_makes_does_not_count_as_width(n_blocks):
    class CrossBlock(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.cross = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor, context: Tensor) -> Tensor:
            return x + self.inner(x).tanh() + self.cross(context)

    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Linear(3, 3)
            self.blocks = nn.ModuleList(CrossBlock() for _ in range(n_blocks))

        def forward(self, x: Tensor) -> Tensor:
            context = self.encoder(x)
            for block in self.blocks:
                x = block(x, context)
            return x

    found = intervals(Decoder(), 2, 3)
    starts = [call.start for call in found.calls if isinstance(call.module, CrossBlock)]
    assert found.width[starts].tolist() == [1] * n_blocks


def test_nothing_inside_a_norm_counts_as_wide():
    class RMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)

    assert intervals(nn.Sequential(nn.Linear(3, 3), RMSNorm()), 2, 3).width.max() == 1
