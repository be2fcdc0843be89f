from __future__ import annotations

import math
import threading

import pytest
import torch
from torch import Tensor, nn

import stabkit
from stabkit.errors import StabkitError, TraceError
from stabkit.tracing import trace
from stabkit.tracing.recording.made_parameters import parameters_made

X = torch.randn(4, 3)


class Inner(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise ValueError("mat1 and mat2 do not fit")


@pytest.mark.parametrize(
    ("model", "inputs", "message"),
    [
        (nn.Linear(3, 2), (), "no tensor among the inputs"),
        (lambda text: text, ("hello",), "no tensor among the inputs"),
        (lambda x: x.argmax(1), (X,), r"no floating-point tensor \(found: torch.int64\)"),
        (lambda x: None, (X,), r"no floating-point tensor \(found: NoneType\)"),
        (lambda x: {"n": 3}, (X,), r"no floating-point tensor \(found: dict\)"),
        (lambda x: torch.ones(4, 3), (X,), "does not depend differentiably"),
        (lambda x: x.detach() * 2, (X,), "does not depend differentiably"),
        (lambda x: torch.from_numpy(x.detach().numpy() * 2), (X,), "does not depend differentiably"),
        (lambda x: x, (X,), "the output is the input itself"),
        (nn.Sequential(nn.Linear(3, 3), nn.ModuleDict({"head": Inner()})["head"]), (X,), r"module '1' \(Inner\)"),
        (nn.Sequential(nn.Linear(3, 5), nn.Linear(4, 2)), (X,), r"module '1' \(Linear\).*inputs of shape \(4, 3\)"),
        (nn.Linear(3, 2), (X, X, X), "takes 2 positional arguments but 4 were given"),
        (3, (X,), "model is a int; expected a torch.nn.Module or a function"),
        ({"weight": X}, (X,), "model is a dict"),
        (torch.nn.Linear, (X,), "model is|failed|no floating-point"),
    ],
)
def test_what_cannot_be_traced_is_an_error_that_says_why(model, inputs, message):
    with pytest.raises(TraceError, match=message):
        trace(model, *inputs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_dim": 2}, r"batch_dim=2, but the first input has shape \(4, 3\)"),
        ({"batch_dim": -3}, "batch_dim=-3"),
        ({"source": "nothing"}, r"source='nothing' is not an input .*'0'"),
        ({"target": "nothing"}, r"target='nothing' is not a tensor of the output"),
        ({"target": lambda out: 3}, "target returned int"),
        ({"depth": "all"}, "depth='all'"),
        ({"kwargs": {"unknown": 1}}, "unexpected keyword argument 'unknown'"),
    ],
)
def test_wrong_options_are_errors_that_name_the_option(options, message):
    with pytest.raises(TraceError, match=message):
        trace(nn.Linear(3, 2), X, **options)


def test_the_error_of_the_forward_pass_stays_attached():
    with pytest.raises(StabkitError) as caught:
        trace(nn.Sequential(Inner()), X)
    assert isinstance(caught.value.__cause__, ValueError)


def test_trace_stands_at_the_top_level():
    assert stabkit.trace is trace


@pytest.mark.parametrize("batch_dim", [0, -2])
def test_a_negative_batch_dimension_counts_from_the_end(batch_dim):
    assert trace(nn.Linear(3, 2), X, batch_dim=batch_dim).batch == 4


def test_keyword_inputs_are_followed():
    flow = trace(nn.MultiheadAttention(4, 2), kwargs=dict.fromkeys(("query", "key", "value"), torch.randn(3, 2, 4)))
    assert flow.source_name == "query"


def test_the_first_output_that_is_no_loss_is_the_target():
    def forward(x: Tensor) -> dict[str, Tensor]:
        return {"loss": x.square().mean(), "logits": x.sin(), "count": torch.tensor(3)}

    assert trace(forward, X).target_name == "logits"
    assert trace(forward, X, target="loss", batch_dim=None).target_name == "loss"


@pytest.mark.parametrize(("pack", "last"), [(list, True), (lambda xs: {"flow": xs}, True), (tuple, False)])
def test_of_a_list_of_refined_outputs_the_flow_ends_at_the_last(pack, last):
    """A network that refines its output gives out all of them; a tuple holds different things, the first is meant."""

    class Refined(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell, self.head = nn.GRUCell(3, 4), nn.Linear(4, 2)

        def forward(self, x):
            h, outs = torch.tanh(x @ torch.ones(3, 4)), []
            for _ in range(4):
                h = self.cell(x, h)
                outs.append(self.head(h))
            return pack(outs)

    flow = trace(Refined(), torch.randn(2, 3))
    cells = [step for step in flow.steps if step.name.startswith("cell")]
    assert len(cells) == (4 if last else 1)


def test_a_list_of_outputs_of_other_shapes_ends_at_its_first():
    class Pyramid(nn.Module):
        def __init__(self):
            super().__init__()
            self.fine, self.coarse = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x):
            y = torch.tanh(self.fine(x))
            return [y, self.coarse(y)]

    assert trace(Pyramid(), torch.randn(2, 3)).target_name == "0"


def test_a_scalar_loss_as_only_output_is_traced():
    flow = trace(lambda x: x.sin().square().mean(), X)
    assert flow.batch == 1
    assert flow.jacobian().shape == (1, 1, 12)


def test_lazy_modules_are_refused_and_stay_so():
    model = nn.Sequential(nn.LazyLinear(4), nn.Tanh(), nn.LazyLinear(2))
    before = torch.get_rng_state()
    with pytest.raises(TraceError, match=r"lazy modules .* call it once on a batch"):
        trace(model, X)
    assert nn.parameter.is_lazy(model[0].weight)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_same_seed_gives_the_same_dropout_whatever_the_random_state():
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5))
    first = trace(model, X, seed=1).states[-1].tensors[0]
    torch.rand(7)
    assert torch.equal(trace(model, X, seed=1).states[-1].tensors[0], first)
    assert not torch.equal(trace(model, X, seed=2).states[-1].tensors[0], first)


@pytest.mark.parametrize("batch", [0, 1])
def test_batches_of_one_and_of_none(batch):
    x = torch.randn(batch, 3)
    if batch == 0:
        with pytest.raises(TraceError, match=r"batch|empty|\(0, 3\)"):
            trace(nn.Linear(3, 2), x)
    else:
        assert trace(nn.Linear(3, 2), x).jacobian().shape == (1, 2, 3)


def test_inputs_with_nan_or_inf_are_traced():
    x = torch.tensor([[1.0, float("nan"), float("inf")], [1.0, 2.0, 3.0]])
    flow = trace(nn.Sequential(nn.Linear(3, 3), nn.Tanh()), x)
    assert flow.states[-1].tensors[0].isnan().any()


def test_an_input_without_dimensions_is_one_sample():
    flow = trace(lambda x: x.sin(), torch.tensor(2.0))
    assert flow.batch == 1
    torch.testing.assert_close(flow.jacobian().dense(), torch.tensor(2.0).cos().view(1, 1, 1))


@pytest.mark.parametrize("rows", [lambda x: x.sin()[:, :0], lambda x: x[x[:, 0] > 100].sin()])
def test_an_output_without_elements_is_an_error_that_says_so(rows):
    with pytest.raises(TraceError, match=r"empty|no elements"):
        trace(rows, X)


@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_a_sparse_input_is_an_error_that_says_what_to_pass():
    sparse = torch.eye(3).to_sparse_csr()
    with pytest.raises(TraceError, match=r"sparse layout.*to_dense"):
        trace(lambda a: torch.sparse.mm(a, torch.ones(3, 2)), sparse)


def test_a_backward_that_fails_is_an_error_that_names_where():
    class NoBackward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.exp()

        @staticmethod
        def backward(ctx, grad):
            raise ValueError("no derivative today")

    class Opaque(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return NoBackward.apply(x)

    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), Opaque(), nn.Linear(3, 2))
    with pytest.raises(TraceError, match=r"NoBackward|'2'") as caught:
        trace(model, X)
    assert "no derivative today" in str(caught.value)


def test_a_chain_of_nothing_finite_is_not_called_exact():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight.data.fill_(math.nan)
    flow = trace(model, torch.randn(3, 4))
    assert flow.chain_error is not None
    assert math.isnan(flow.chain_error)
    assert flow.passes_finite is False


def test_the_making_of_parameters_is_watched_here_and_left_as_it_was():
    kept, made = nn.Parameter.__dict__["__new__"], []
    with parameters_made(lambda _, parameter: made.append(tuple(parameter.shape))):
        elsewhere = threading.Thread(target=lambda: nn.Linear(5, 5))
        elsewhere.start()
        elsewhere.join()
        nn.Linear(3, 2)
    assert made == [(2, 3), (2,)]
    assert nn.Parameter.__dict__["__new__"] is kept
