from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from stabkit.tracing import trace
from stabkit.tracing.recording.recorder import Recording, clock, recording_calls


def test_the_clock_counts_the_nodes_of_this_thread():
    x = torch.ones(1, requires_grad=True)
    before = clock()
    y = x.sin()
    assert y.grad_fn._sequence_nr() == before
    assert clock() == before + 1


def test_module_calls_are_nested_intervals_on_the_clock():
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Tanh(), nn.Linear(2, 2)))
    recording = Recording()
    with recording_calls(model, recording):
        model(torch.ones(1, 2))
    assert [call.path for call in recording.calls] == ["", "0", "1", "1.0", "1.1"]
    assert [call.parent for call in recording.calls] == [-1, 0, 0, 2, 2]
    assert all(call.finished and call.start < call.stop for call in recording.calls)
    assert recording.path_at(recording.calls[3].start) == "1.0"
    model(torch.ones(1, 2))
    assert len(recording.calls) == 5  # the hooks are gone


def test_a_call_that_raises_stays_unfinished_and_its_callers_go_on():
    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise ValueError

    class Catches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fails, self.works = Fails(), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            try:
                return self.fails(x)
            except ValueError:
                return self.works(x)

    recording = Recording()
    model = Catches()
    with recording_calls(model, recording):
        model(torch.ones(1, 2))
    assert [(c.path, c.finished) for c in recording.calls] == [("", True), ("fails", False), ("works", True)]


@pytest.mark.parametrize(
    "write",
    [
        lambda h: h.mul_(2),
        lambda h: h.__setitem__((slice(None), 0), 7.0),
        lambda h: h.view(-1)[1:3].zero_(),
        lambda h: torch.add(h.detach(), 1, out=h.detach()),
        lambda h: h.t_().t_(),
    ],
    ids=["mul_", "setitem", "view", "out=", "transpose"],
)
def test_states_hold_their_values_from_before_an_in_place_write(write):
    def forward(x: Tensor) -> Tensor:
        h = x + 1
        kept = h.cumsum(1)
        write(h)
        return kept + h

    x = torch.zeros(2, 3)
    flow = trace(forward, x, depth="cuts")
    before = flow.states[1].tensors[0]
    assert before.tolist() == [[1, 1, 1], [1, 1, 1]]
    assert torch.equal(flow.states[-1].tensors[0], forward(x))


def test_every_state_of_a_flow_holds_what_an_ordinary_call_computes():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 4), nn.Sigmoid(), nn.Linear(4, 2))
    x = torch.randn(5, 3)
    flow = trace(model, x)
    for state, stop in zip(flow.states, [0, 1, 2, 3, 4, 5], strict=True):
        torch.testing.assert_close(state.tensors[0], model[:stop](x).detach(), rtol=0, atol=0)
    assert torch.equal(flow.states[1].flatten(), model[:1](x).detach())
