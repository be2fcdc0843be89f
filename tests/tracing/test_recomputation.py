from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from stabkit.errors import TraceError
from stabkit.tracing import trace


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(0.3), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)


def deep(blocks: int = 6) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[Block(16) for _ in range(blocks)]).double()


X = torch.randn(3, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-14)  # where a tensor lies in memory may change its rounding


def saved(flow):
    return flow.steps[0].segment._prefetch.func.__self__


@pytest.mark.parametrize("training", [False, True])
def test_recomputed_derivatives_are_those_that_were_kept(training):
    model = deep().train(training)
    keep, again = (trace(model, X, memory=memory) for memory in ("keep", "recompute"))
    assert again.chain_error < 1e-14
    u = torch.randn(3, 16, 2, dtype=torch.float64)
    for a, b in zip(keep.steps, again.steps, strict=True):
        same(a.source.tensors[0], b.source.tensors[0])
        same(a.jacobian().T @ u, b.jacobian().T @ u)
        same(a.jacobian() @ u, b.jacobian() @ u)
    same(keep.jacobian(1, 4).dense(), again.jacobian(1, 4).dense())


def test_only_one_step_is_held_at_a_time():
    few, many = (trace(deep(blocks), X, memory="recompute") for blocks in (3, 12))
    for flow in (few, many):
        for step in flow.steps:
            step.vjp([torch.ones(3, 16, dtype=torch.float64)])
    assert 0 < saved(many).most_bytes <= 1.01 * saved(few).most_bytes


def test_embeddings_and_convolutions_and_views():
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.blocks = nn.Embedding(9, 16), deep(3)
            self.pool = nn.Conv1d(16, 4, 3, padding=1).double()

        def forward(self, tokens: Tensor) -> Tensor:
            h = self.blocks(self.embed(tokens).double()).transpose(1, 2)
            return torch.relu_(self.pool(h)).mean(-1)

    flow = trace(Words(), torch.randint(0, 9, (2, 5)), memory="recompute")
    assert flow.chain_error == 0.0
    assert all(state.tensors for state in flow.states)


def test_changed_inputs_do_not_matter_and_changed_weights_are_noticed():
    model, x = deep(), X.clone()
    flow = trace(model, x, memory="recompute")
    before = flow.jacobian().dense()
    x.zero_()
    assert torch.equal(flow.jacobian().dense(), before)
    with torch.no_grad():
        model[2].f[0].weight.mul_(2)
    with pytest.raises(TraceError, match="were changed after it was traced"):
        flow.jacobian().dense()


def test_a_model_that_takes_another_course_is_noticed():
    class Fickle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.calls, self.body = SimpleNamespace(count=0, lock=threading.Lock()), deep(4)

        def forward(self, x: Tensor) -> Tensor:
            self.calls.count += 1  # what other threads may work on does not come back
            return self.body(x) if self.calls.count < 2 else x * 2

    with pytest.raises((TraceError, KeyError), match=r"another course|memory"):
        trace(Fickle(), X, memory="recompute")


def test_an_unknown_way_of_memory_is_an_error():
    with pytest.raises(TraceError, match="memory='less'"):
        trace(deep(), X, memory="less")
