from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from stabkit.errors import TraceError
from stabkit.tracing import trace

MODEL = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
X = torch.randn(5, 3, dtype=torch.float64)


def test_states_and_steps_form_a_chain():
    flow = trace(MODEL, X)
    assert len(flow) == len(flow.steps) == len(flow.states) - 1 == 3
    for index, step in enumerate(flow.steps):
        assert step.index == index
        assert step.source is flow.states[index]
        assert step.target is flow.states[index + 1]
    assert [state.index for state in flow.states] == [0, 1, 2, 3]
    assert flow.states[0].sample_shapes == ((3,),)
    assert [state.size for state in flow.states] == [3, 4, 4, 2]


def test_the_summary_shows_every_step_with_its_kind_and_shapes():
    text = repr(trace(MODEL, X))
    assert text.splitlines()[0] == "Flow of Sequential: 3 steps, batch 5"
    assert "0: [(3,)] -> [(4,)]" in text


def test_a_state_knows_its_data_in_flat_coordinates():
    flow = trace(MODEL, X)
    assert torch.equal(flow.states[0].flatten(), X)
    assert torch.equal(flow.states[-1].flatten(), MODEL(X).detach())
    assert not any(tensor.requires_grad for state in flow.states for tensor in state.tensors)


@pytest.mark.parametrize(("start", "stop"), [(0, 0), (2, 1), (-1, 2), (0, 4), (3, None)])
def test_a_jacobian_between_states_out_of_order_is_refused(start, stop):
    with pytest.raises(IndexError, match=f"start={start}, stop=.*<= 3"):
        trace(MODEL, X).jacobian(start, stop)


def test_the_cotangent_of_a_loss_is_its_gradient_at_the_output():
    flow = trace(MODEL, X)
    (found,) = flow.cotangent(lambda out: out.square().sum())
    torch.testing.assert_close(found, 2 * MODEL(X).detach())
    first, again, other = flow.cotangent(seed=1), flow.cotangent(seed=1), flow.cotangent(seed=2)
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda out: out, r"loss returned shape \(5, 2\); expected a scalar"),
        (lambda out: 3.0, "loss returned float; expected a scalar"),
        (lambda out: None, "loss returned NoneType"),
        (lambda out: torch.zeros(()), "does not depend on the model's output"),
        (lambda out: out.detach().sum(), "does not depend on the model's output"),
    ],
)
def test_a_loss_that_is_no_differentiable_scalar_is_refused(loss, message):
    with pytest.raises(TraceError, match=message):
        trace(MODEL, X).cotangent(loss)


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.body(x).tanh()
        return {"a": self.a(h), "b": self.b(h)}


def test_a_loss_that_reads_another_output_is_refused():
    flow = trace(TwoHeads(), torch.randn(2, 3), target="a")
    assert flow.cotangent(lambda out: out["a"].sum())[0].tolist() == [[1, 1], [1, 1]]
    with pytest.raises(TraceError, match="the loss does not depend on 'a'"):
        flow.cotangent(lambda out: out["b"].sum())
    with pytest.raises(TraceError, match=r"around 'a'.*flow\.following\(loss\)"):
        flow.cotangent(lambda out: out["a"].sum() + out["b"].sum())


def test_the_loss_itself_may_be_the_target():
    flow = trace(TwoHeads(), torch.randn(2, 3), target=lambda out: (out["a"] * out["b"]).sum(1))
    assert flow.states[-1].shapes == ((2,),)
    assert flow.chain_error < 1e-6
