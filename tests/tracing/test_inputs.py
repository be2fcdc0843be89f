from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.functional import jacobian

from stabkit.tracing import trace
from stabkit.tracing.recording.inputs import non_leaf, prepare


def test_a_tensor_passed_twice_stays_one_tensor():
    x = torch.randn(2, 3)
    prepared = prepare((x, [x]), {"again": x})
    assert prepared.args[0] is prepared.args[1][0] is prepared.kwargs["again"]
    assert [source.name for source in prepared.sources] == ["0"]
    dense = trace(torch.mul, x, x).jacobian().dense()
    torch.testing.assert_close(dense, torch.diag_embed(2 * x))


def test_names_of_sources_follow_the_arguments():
    prepared = prepare((torch.ones(1), {"a": torch.ones(1)}, torch.tensor([1])), {"mask": torch.ones(1)})
    assert [source.name for source in prepared.sources] == ["0", "1.a", "mask"]
    assert len(prepared.integers) == 1


def test_a_source_may_be_written_in_place_and_is_a_copy():
    x = torch.ones(2)
    copy = non_leaf(x)
    copy.mul_(2)
    assert x.tolist() == [1, 1]
    assert not copy.is_leaf


class Tokens(nn.Module):
    """Embedding, written in place as many models do, and two residual blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def run(self, h: Tensor) -> Tensor:
        h.mul_(2)
        for block in self.blocks:
            h = h + block(h).tanh()
        return h

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        return self.run(self.embed(tokens)) * mask.unsqueeze(-1).double()


def test_integer_inputs_start_at_their_embedding():
    torch.manual_seed(0)
    model, tokens = Tokens().double(), torch.randint(10, (2, 3))
    flow = trace(model, tokens, torch.ones(2, 3, dtype=torch.bool))
    assert flow.source_name == "embed"
    embedded = model.embed(tokens).detach()
    assert torch.equal(flow.states[0].tensors[0], embedded)
    truth = jacobian(lambda h: model.run(h.clone()).flatten(), embedded[1]).flatten(1)
    torch.testing.assert_close(flow.jacobian().dense()[1], truth, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "lookup",
    [
        lambda table, t: table[t],
        lambda table, t: table.index_select(0, t.flatten()).view(*t.shape, -1),
        lambda table, t: table.gather(0, t.reshape(-1, 1).expand(-1, 4)).view(*t.shape, -1),
        lambda table, t: nn.functional.embedding_bag(t, table).unsqueeze(1),
        lambda table, t: nn.functional.one_hot(t, 10).to(table.dtype) @ table,
    ],
    ids=["index", "index_select", "gather", "embedding_bag", "one-hot"],
)
def test_floats_made_from_integers_are_where_depth_starts(lookup):
    table = torch.randn(10, 4, dtype=torch.float64)
    tokens = torch.randint(10, (2, 3))
    flow = trace(lambda t: lookup(table, t).sin().cumsum(-1), tokens, depth="cuts")
    assert len(flow) >= 2
    assert flow.batch == 2
    assert flow.chain_error == 0
    assert torch.equal(flow.states[-1].tensors[0], lookup(table, tokens).sin().cumsum(-1))


def test_a_cast_of_integers_is_a_source_only_when_there_is_no_other():
    weight = torch.randn(3, 2)
    flow = trace(lambda pixels: (pixels.float() / 255) @ weight, torch.randint(255, (4, 3)))
    assert any("makes floats of it" in note for note in flow.notes)
    torch.testing.assert_close(flow.jacobian().dense(), (weight.T / 255).expand(4, -1, -1))


def test_one_of_several_float_inputs_is_followed_and_the_others_are_listed():
    def forward(short: Tensor, long: Tensor) -> Tensor:
        return short.sin() + long.sin().cos().tanh()

    x, y = torch.randn(2, 3), torch.randn(2, 3)
    flow = trace(forward, x, y)
    assert (flow.source_name, flow.side_inputs) == ("1", ("0",))
    assert trace(forward, x, y, source="0").side_inputs == ("1",)
    torch.testing.assert_close(trace(forward, x, y, source="0").jacobian().dense(), torch.diag_embed(x.cos()))
    assert trace(forward, x, kwargs={"long": y}).source_name == "long"


class Conditioned(nn.Module):
    """A signal that passes blocks, each of which lets an embedding of a condition in."""

    def __init__(self, wide: int) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.embed = nn.ModuleList(nn.Linear(wide, 6) for _ in range(4))
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))

    def forward(self, signal: Tensor, condition: Tensor) -> Tensor:
        x = self.first(signal)
        for embed, block in zip(self.embed, self.blocks, strict=True):
            x = x + torch.tanh(block(x + embed(condition)))
        return x


@pytest.mark.parametrize("wide", [3, 9, 60])
def test_depth_is_counted_from_what_enters_once_and_not_from_a_larger_condition(wide):
    flow = trace(Conditioned(wide), torch.randn(2, 4), torch.randn(2, wide))
    assert (flow.source_name, flow.side_inputs) == ("0", ("1",))
    assert sum(step.kind == "step" for step in flow.steps) == 4
