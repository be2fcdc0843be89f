from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import stabkit
from stabkit.errors import StabkitError
from stabkit.growth import parameter_gradients
from stabkit.tracing import FlowLike, iterate, trace


def halving() -> FlowLike:
    return iterate(lambda x: x / 2, torch.randn(3, 4, dtype=torch.float64), 5)


def layers() -> FlowLike:
    torch.manual_seed(0)
    return trace(nn.Sequential(*[nn.Linear(4, 4) for _ in range(5)]).double(), torch.randn(3, 4, dtype=torch.float64))


ANALYZERS: list[Callable[[Any], Any]] = [
    stabkit.attribute,
    stabkit.diagnose,
    stabkit.finite_time_exponents,
    stabkit.gradient_profile,
    stabkit.identify,
    stabkit.lyapunov_spectrum,
]


@pytest.mark.parametrize("analyze", ANALYZERS, ids=lambda analyze: analyze.__name__)
@pytest.mark.parametrize("given", [nn.Linear(2, 2), 3, torch.ones(2)], ids=["module", "number", "tensor"])
def test_analyzers_say_what_they_were_given_and_how_to_make_a_flow(analyze, given):
    with pytest.raises(
        StabkitError, match=rf"flow(=3)? is an? {type(given).__name__}; expected .*stabkit\.trace\(model, x\)"
    ):
        analyze(given)


@pytest.mark.parametrize("analyze", [stabkit.attribute, lambda flow: parameter_gradients(flow, torch.sum)])
def test_what_needs_recorded_operations_refuses_iterated_maps(analyze):
    with pytest.raises(
        StabkitError, match=r"reads the operations of a traced forward pass.*stabkit\.trace\(model, x\)"
    ):
        analyze(halving())


@pytest.mark.parametrize("make", [halving, layers])
def test_flows_over_depth_and_over_time_answer_alike(make):
    flow = make()
    assert len(flow) == len(flow.steps) == len(flow.states) - 1 == 5
    assert [step.index for step in flow.steps] == list(range(5))
    assert {step.kind for step in flow.steps} == {"step"}
    assert set(flow.sizes) == {4}
    assert flow.dtype == torch.float64
    flat = list(flow.flat_states())
    for index, state in enumerate(flow.states):
        assert state.index == index
        assert state.shapes == ((3, 4),)
        assert state.sample_shapes == ((4,),)
        assert flow.space_at(index).size == state.size == 4
        assert torch.equal(state.flatten(), flat[index])
    (cotangent,) = flow.cotangent(seed=1)
    pulled = [cotangent]
    for step in reversed(flow.steps):
        assert step.jacobian().shape == (3, 4, 4)
        pulled = step.vjp(pulled)
    torch.testing.assert_close(flow.jacobian().rmatvec(cotangent), pulled[0])
    carried = cotangent.unsqueeze(-1)
    for piece in flow.tangents(1, adjoint=True):
        if piece.dense is not None:
            for J in piece.dense.flip(0):
                carried = J.mT @ carried
        elif piece.multiply is not None:
            carried = piece.multiply(carried)
    torch.testing.assert_close(carried.squeeze(-1), pulled[0])
