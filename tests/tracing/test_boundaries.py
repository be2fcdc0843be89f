from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from stabkit.errors import TraceError
from stabkit.tracing import trace


class Block(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.inner = nn.Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x).tanh()


class Net(nn.Module):
    """A stem, three residual blocks, a norm and a head."""

    def __init__(self, blocks: nn.Module | None = None) -> None:
        super().__init__()
        self.stem = nn.Linear(3, 4)
        self.blocks = blocks or nn.ModuleList(Block(4) for _ in range(3))
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


X = torch.randn(2, 3)


@pytest.mark.parametrize(
    ("depth", "expected"),
    [
        ("auto", ["stem", "blocks.0", "blocks.1", "blocks.2", "norm .. head"]),
        ("cuts", ["stem", "blocks.0", "blocks.1", "blocks.2", "norm", "head"]),
        ("modules", ["stem", "blocks.0.inner", "blocks.1.inner", "blocks.2.inner", "norm", "head"]),
        (["blocks.*"], ["input", "blocks.0", "blocks.1", "blocks.2", "output"]),
        (("blocks.1",), ["input", "blocks.1", "output"]),
        (["blocks.[02]"], ["input", "blocks.0", "blocks.2", "output"]),
        (lambda path, module: isinstance(module, Block), ["input", "blocks.0", "blocks.1", "blocks.2", "output"]),
        (lambda path, module: path in ("stem", "head"), ["stem", "head"]),
    ],
)
def test_depth_selects_where_steps_end(depth, expected):
    flow = trace(Net(), X, depth=depth)
    assert [step.name for step in flow.steps] == expected
    assert flow.chain_error < 1e-6


def test_every_operation_belongs_to_exactly_one_step():
    whole = trace(Net(), X, depth=["blocks.*"])
    cut = trace(Net(), X, depth="cuts")
    joined = [name for step in whole.steps for name in step.operations]
    assert joined == [name for step in cut.steps for name in step.operations]


@pytest.mark.parametrize("depth", ["layers", ["nowhere.*"], lambda path, module: False, []])
def test_a_depth_that_picks_nothing_is_an_error_that_lists_the_choices(depth):
    with pytest.raises(TraceError, match=r"depth=.*(blocks\.0|a list of module paths)"):
        trace(Net(), X, depth=depth)


def test_blocks_are_found_whatever_holds_them():
    class Numbered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer1, self.layer2, self.layer3 = (Block(3) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.layer3(self.layer2(self.layer1(x)))

    for blocks in (nn.Sequential(Block(4), nn.Sequential(Block(4), Block(4))), nn.ModuleList([Block(4)] * 3)):
        flow = trace(Net(blocks), X)
        assert sum(step.kind == "step" and step.module_class == "Block" for step in flow.steps) == 3
    assert [step.name for step in trace(Numbered(), X).steps] == ["layer1", "layer2", "layer3"]


def test_a_block_shared_by_all_layers_is_one_step_per_call():
    flow = trace(Net(nn.ModuleList([Block(4)] * 4)), X)
    assert [step.name for step in flow.steps[1:5]] == ["blocks.0#1", "blocks.0#2", "blocks.0#3", "blocks.0#4"]


def test_parallel_branches_are_one_step():
    class Inception(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.three = nn.Linear(4, 1), nn.Linear(4, 1), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.one(x), self.two(x).tanh(), self.three(x).sin()], 1)

    flow = trace(Net(nn.Sequential(*(Inception() for _ in range(3)))), X)
    assert [step.module_class for step in flow.steps] == ["Linear", "Inception", "Inception", "Inception", "LayerNorm"]
    assert all(len(state.values) == 1 for state in flow.states)


def test_a_ladder_has_tuple_states_between_its_blocks():
    class Momentum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(6))

        def forward(self, x: Tensor) -> Tensor:
            v = torch.zeros_like(x)
            for layer in self.layers:
                v = 0.9 * v + layer(x).tanh()
                x = x + v
            return x

    flow = trace(Momentum(), X)
    assert len(flow) == 6
    assert [len(state.values) for state in flow.states] == [1, 2, 2, 2, 2, 2, 1]


def test_functional_code_is_cut_between_its_repeats():
    weights = [torch.randn(3, 3) for _ in range(5)]

    def residual(x: Tensor) -> Tensor:
        for w in weights:
            x = x + (x @ w).tanh()
        return x

    flow = trace(residual, X)
    assert len(flow) == 5
    assert all(step.operations == ("Mm", "Tanh", "Add") for step in flow.steps)


def test_a_loop_of_cells_is_one_step_per_call():
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.GRUCell(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = x.new_zeros(x.shape[0], 4)
            for t in range(x.shape[1]):
                h = self.cell(x[:, t], h)
            return h

    flow = trace(Loop(), torch.randn(2, 6, 3))
    assert sum(step.module_path == "cell" for step in flow.steps) == 6
