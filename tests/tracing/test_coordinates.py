from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from stabkit.jacobians import coordinates
from stabkit.tracing import Flow, trace


def flow(x: torch.Tensor, **kwargs: object) -> Flow:
    return trace(lambda x: (2 * x).sin(), x, **kwargs)


def test_tokens_and_channels_are_indices_along_an_axis():
    state = flow(torch.randn(2, 3, 4)).states[0]
    numbered = torch.arange(12).view(3, 4)
    assert coordinates(state, dim=0, index=1).tolist() == numbered[1].tolist()
    assert coordinates(state, dim=-1, index=[0, 3]).tolist() == numbered[:, [0, 3]].flatten().tolist()
    assert coordinates(state, dim=1, index=slice(1, 3)).tolist() == numbered[:, 1:3].flatten().tolist()
    assert coordinates(state, dim=1, index=torch.tensor([True, False, False, True])).tolist() == [0, 3, 4, 7, 8, 11]


def test_a_token_is_the_same_whichever_axis_holds_the_batch():
    x = torch.randn(3, 2, 4, dtype=torch.float64)  # (tokens, batch, channels)
    step = trace(lambda x: x.cumsum(0), x, batch_dim=1).steps[0]
    token = step.jacobian().restrict(coordinates(step.target, dim=0, index=1), coordinates(step.source, dim=0, index=2))
    assert token.shape == (2, 4, 4)
    assert torch.equal(token.dense(), torch.zeros(2, 4, 4, dtype=torch.float64))  # the second does not see the third
    token = step.jacobian().restrict(coordinates(step.target, dim=0, index=2), coordinates(step.source, dim=0, index=1))
    assert torch.equal(token.dense(), torch.eye(4, dtype=torch.float64).expand(2, 4, 4))


def test_tensors_of_a_state_lie_one_after_the_other():
    class Cells(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.LSTMCell(3, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            state = None
            for t in range(4):
                state = self.cell(x[:, t], state)
            return state[0]

    state = trace(Cells(), torch.randn(2, 4, 3)).states[1]
    assert len(state.values) > 1
    second = coordinates(state, dim=-1, index=[0, -1], tensor=1)
    first = math.prod(state.sample_shapes[0])
    assert second.tolist() == [first, first + state.sample_shapes[1][-1] - 1]


def test_complex_entries_are_two_coordinates():
    states = trace(lambda x: torch.fft.irfft(torch.fft.rfft(x), n=6), torch.randn(2, 6), depth="cuts").states
    assert coordinates(states[1], dim=0, index=1).tolist() == [2, 3]


def test_bad_places_are_named():
    state = flow(torch.randn(2, 3, 4)).states[0]
    with pytest.raises(IndexError, match=r"dim=2, but one sample of the tensor has shape \(3, 4\)"):
        coordinates(state, dim=2, index=0)
    with pytest.raises(IndexError, match=r"tensor=1, but the state has 1 tensors"):
        coordinates(state, dim=0, index=0, tensor=1)
    with pytest.raises(IndexError, match=r"index reaches from 3 to 3; expected 0 to 2"):
        coordinates(state, dim=0, index=3)
