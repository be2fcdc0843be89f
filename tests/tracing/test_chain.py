from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stabkit
from stabkit.errors import TraceError
from stabkit.tracing import trace
from stabkit.tracing.cutting import chain_check


def test_batch_norm_in_training_mode_makes_the_whole_batch_one_state():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).double()
    x = torch.randn(5, 3, dtype=torch.float64)
    flow = trace(model, x)
    assert flow.batch == 1
    assert any("influence each other" in note for note in flow.notes)
    truth = torch.autograd.functional.jacobian(lambda x: model(x).flatten(), x).reshape(1, 10, 15)
    torch.testing.assert_close(flow.jacobian().dense(), truth, rtol=1e-11, atol=1e-11)
    independent = trace(model.eval(), x)
    assert (independent.batch, independent.notes) == (5, ())


def shifted(x: Tensor) -> Tensor:
    y = x.clone()
    y[1:] += x[:-1].cos()
    return y


def one_pair(x: Tensor) -> Tensor:
    y = x.clone()
    y[2] += x[3].sin()
    return y


@pytest.mark.parametrize(
    "couple",
    [
        lambda x: x - x.mean(0),
        lambda x: x + x.flip(0).tanh(),
        lambda x: torch.softmax(x @ x.T, -1) @ x,
        lambda x: x / x.norm(),
        lambda x: x.cumsum(0),
        lambda x: x[[0, 0, 0, 0]],
        shifted,
        one_pair,
    ],
    ids=["mean", "flip", "attention", "norm", "cumsum", "gather", "shift", "pair"],
)
def test_samples_that_see_each_other_are_found_out(couple):
    flow = trace(lambda x: couple(x.sin()).cos(), torch.randn(4, 3, dtype=torch.float64))
    assert flow.batch == 1
    assert any("influence each other" in note for note in flow.notes)


class Oscillators(nn.Module):
    """A loop over time-major data of which the last state is read."""

    def __init__(self) -> None:
        super().__init__()
        self.force, self.head = nn.Linear(3 + 8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = z = x.new_zeros(x.shape[1], 8)
        for now in x:
            z = z + 0.1 * (torch.tanh(self.force(torch.cat([now, y], 1))) - y)
            y = y + 0.1 * z
        return self.head(y)


class Last(nn.Module):
    """A recurrent layer over time-major tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.rnn, self.head = nn.Embedding(9, 6), nn.GRU(6, 6), nn.Linear(6, 9)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(self.embed(x))[0]).flatten(0, 1)


@pytest.mark.parametrize(
    ("model", "x"),
    [
        (Oscillators(), torch.randn(5, 2, 3)),
        (Last(), torch.randint(0, 9, (5, 2))),
        (nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 2, enable_nested_tensor=False).eval(),
         torch.randn(5, 2, 8)),
    ],
    ids=["loop", "layer", "attention"],
)  # fmt: skip
def test_of_times_along_the_first_axis_it_is_told_which_one_counts_samples(model: nn.Module, x: Tensor):
    notes = trace(model, x).notes
    assert not any("influence each other" in note for note in notes)
    assert any("pass batch_dim=1" in note for note in notes)
    told = trace(model, x, batch_dim=1)
    assert (told.batch, told.notes) == (2, ())


def test_that_samples_meet_is_said_where_it_was_measured():
    met = trace(lambda x: torch.einsum("bqd,pkd->bqk", x, x).tanh() @ x.mean(0), torch.randn(4, 3, 5))
    pooled = trace(lambda x: x.sin().mean(0).cos(), torch.randn(5, 3))
    assert [note for note in met.notes if "influence each other" in note]
    assert pooled.notes == ("not every state has an axis that counts 5 samples, so the whole batch is one state",)


def test_the_batch_is_that_of_the_source():
    flow = trace(lambda b, a: a.sin().cos() * b.sum(), torch.randn(7), torch.randn(4, 3))
    assert (flow.source_name, flow.batch, flow.notes) == ("1", 4, ())


def test_samples_folded_into_windows_stay_apart():
    def windows(x: Tensor) -> Tensor:
        return x.view(4, 2, 3, 5).flatten(0, 1).softmax(1).view(4, 6, 5)

    flow = trace(windows, torch.randn(4, 6, 5, dtype=torch.float64), depth="cuts")
    assert flow.batch == 4
    assert not flow.notes
    assert flow.states[2].shapes == ((8, 3, 5),)
    assert flow.states[2].sample_shapes == ((2, 3, 5),)


def test_the_whole_batch_is_one_state_when_asked():
    flow = trace(nn.Linear(3, 2), torch.randn(4, 3), batch_dim=None)
    assert (flow.batch, flow.notes) == (1, ())
    assert flow.jacobian().shape == (1, 8, 12)


def test_a_head_initialised_at_zero_is_named_and_the_rest_still_checked():
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3), nn.Linear(3, 2)).double()
    nn.init.zeros_(model[3].weight)
    flow = trace(model, torch.randn(2, 3, dtype=torch.float64))
    assert flow.notes == (
        "no gradient passes back through 3: its Jacobian is zero at this input, where 3.weight is all zeros",
    )
    assert flow.chain_error == 0
    assert not flow.jacobian().dense().any()
    assert flow.jacobian(0, 3).dense().any()


def test_units_that_are_off_are_no_weights_of_zeros():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2)).double()
    nn.init.constant_(model[2].bias, -100.0)
    nn.init.zeros_(model[4].bias)
    flow = trace(model, torch.randn(2, 3, dtype=torch.float64))
    (note,) = flow.notes
    assert note.endswith("its Jacobian is zero at this input")


def deep(scale: float, dtype: torch.dtype, depth: int = 60) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(4, 4, bias=False) for _ in range(depth)]
    for layer in layers:
        nn.init.orthogonal_(layer.weight, gain=scale)
    return nn.Sequential(*layers).to(dtype)


@pytest.mark.parametrize("scale", [1e-2, 1e2], ids=["vanishing", "exploding"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_samples_stay_apart_where_gradients_leave_the_range_of_a_float(scale, dtype):
    # 1e-120 in all: an earlier check took the rounding of subnormal numbers for a mixing of samples
    flow = trace(deep(scale, dtype), torch.zeros(3, 4, dtype=dtype))
    assert (flow.batch, flow.notes) == (3, ())


def test_samples_that_see_each_other_are_found_out_behind_vanishing_gradients():
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Tanh(), deep(1e-2, torch.float32))
    flow = trace(model, torch.randn(3, 4), depth=["0", "1", "2.*"])
    assert flow.batch == 1
    assert any("influence each other" in note for note in flow.notes)


def test_the_chain_equals_the_vjp_of_the_untraced_model():
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 3).double().eval()
    x = torch.randn(2, 4, 8, dtype=torch.float64, requires_grad=True)
    flow = trace(model, x)
    cotangent = torch.randn(2, 4, 8, dtype=torch.float64)
    (truth,) = torch.autograd.grad(model(x), x, cotangent)
    cotangents = [cotangent]
    for step in reversed(flow.steps):
        cotangents = step.vjp(cotangents)
    torch.testing.assert_close(cotangents[0], truth, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("register", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_a_module_hook_of_the_way_back_does_not_run_and_is_named(register):
    def double(_module, *grads):
        return tuple(2 * grad for grad in grads[0])

    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))
    getattr(model[1], register)(double)
    flow = trace(model, torch.randn(2, 3))
    assert "backward hooks do not run here: those of 1" in flow.notes
    plain = flow.jacobian().dense()
    for hooks in (model[1]._backward_hooks, model[1]._backward_pre_hooks):
        hooks.clear()
    torch.testing.assert_close(trace(model, flow.states[0].tensors[0]).jacobian().dense(), plain)


def test_a_chain_that_is_not_exact_is_refused(monkeypatch):
    # a node whose hand-applied formula is off by a tenth of a per mille
    from stabkit.tracing.products import node_derivatives

    def slightly_wrong(node, cotangents, active):
        return node_derivatives.call_node(node, cotangents) * 1.0001

    monkeypatch.setitem(node_derivatives._OVERRIDES, "TanhBackward0", slightly_wrong)
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh()).double()
    x = torch.randn(2, 3, dtype=torch.float64)
    with pytest.raises(TraceError, match=r"differs from the model's own by 1\.0e-04"):
        trace(model, x)
    assert trace(model, x, check=False).chain_error is None


def test_a_check_that_starts_anew_asks_the_engine_for_few_states_more_than_once(monkeypatch: pytest.MonkeyPatch):
    asked: list[int] = []
    plain = chain_check.engine_vjp

    def engine(target: Any, source: Any, cotangents: Any) -> Any:
        asked.append(len(source))
        return plain(target, source, cotangents)

    monkeypatch.setattr(chain_check, "engine_vjp", engine)
    layers = [nn.Linear(4, 4) for _ in range(200)]  # each takes a gradient down by a hundred times
    for layer in layers:
        nn.init.orthogonal_(layer.weight, gain=0.01)
    stabkit.trace(nn.Sequential(*layers), torch.randn(2, 4))
    assert len(asked) > 10  # new starts
    assert sum(asked) < 200 + 3 * 200  # where all are asked for at each, 2,000 and more
