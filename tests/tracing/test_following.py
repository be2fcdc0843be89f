"""A flow leads to all outputs that a loss reads."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from stabkit.errors import TraceError
from stabkit.tracing import Flow, trace


class Autoencoder(nn.Module):
    """A variational one: what it decodes is made of the mean and the variance that it returns too."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh())
        self.mean, self.log_variance = nn.Linear(16, 3), nn.Linear(16, 3)
        self.decoder = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 10))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden = self.encoder(x)
        mean, log_variance = self.mean(hidden), self.log_variance(hidden)
        return self.decoder(mean + torch.randn_like(mean) * (0.5 * log_variance).exp()), mean, log_variance


class Flows(nn.Module):
    """Affine couplings that return their log-determinant, one number a sample."""

    def __init__(self) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 4)) for _ in range(3))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        logarithm = torch.zeros(len(x), dtype=x.dtype)
        for net in self.nets:
            fixed, moved = x.chunk(2, 1)
            shift, scale = net(fixed).chunk(2, 1)
            x, logarithm = torch.cat([moved * scale.exp() + shift, fixed], 1), logarithm + scale.sum(1)
        return {"z": x, "logarithm": logarithm}


class Towers(nn.Module):
    """Two inputs that one encoder turns into two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4))

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return self.encoder(a), self.encoder(b)


X = torch.randn(6, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def elbo(output: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    decoded, mean, log_variance = output
    prior = 1 + log_variance - mean.square() - log_variance.exp()
    return (decoded - X).square().sum(1).mean() - 0.5 * prior.sum(1).mean()


def likelihood(output: dict[str, Tensor]) -> Tensor:
    return (0.5 * output["z"].square().sum(1) - output["logarithm"]).mean()


def pulled(flow: Flow, loss) -> Tensor:
    cotangents = flow.cotangent(loss)
    for step in reversed(flow.steps):
        cotangents = step.vjp(cotangents)
    return cotangents[0]


def gradient(model: nn.Module, loss, x: Tensor) -> Tensor:
    torch.manual_seed(0)
    x = x.clone().requires_grad_(True)
    return torch.autograd.grad(loss(model(x)), x)[0]


@pytest.mark.parametrize(
    ("model", "loss", "x", "names"),
    [(Autoencoder, elbo, X, "0, 1, 2"), (Flows, likelihood, X[:, :4].contiguous(), "z, logarithm")],
)
def test_the_gradient_of_the_loss_passes_through_the_outputs_together(model, loss, x, names):
    torch.manual_seed(0)
    net = model().double()
    plain = trace(net, x)
    with pytest.raises(TraceError, match="following"):
        plain.cotangent(loss)
    flow = plain.following(loss)
    assert flow.target_name == names
    assert flow.batch == len(x)
    assert names in flow.notes[-1]
    assert flow.chain_error < 1e-12
    torch.testing.assert_close(pulled(flow, loss), gradient(net, loss, x), rtol=1e-10, atol=1e-12)
    assert flow.following(loss) is flow
    assert flow.again().target_name == names


def test_a_loss_of_the_one_output_that_is_followed_changes_nothing():
    flow = trace(Autoencoder().double(), X)
    assert flow.following(lambda out: out[0].sum()) is flow


def test_a_loss_of_another_output_leads_to_that():
    flow = trace(Flows().double(), X[:, :4].contiguous()).following(lambda out: out["logarithm"].sum())
    assert flow.target_name == "logarithm"
    assert "the output that the loss reads" in flow.notes[-1]


def test_outputs_of_another_input_are_held_fixed():
    flow = trace(Towers().double(), X[:, :4], X[:, 4:8]).following(lambda out: (out[0] - out[1]).square().sum())
    assert (flow.source_name, flow.side_inputs, flow.target_name) == ("0", ("1",), "0")


def test_what_the_model_does_not_return_cannot_be_followed():
    model = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 4)).double()
    kept: list[Tensor] = []
    model[0].register_forward_hook(lambda _m, _a, out: kept.append(out))

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.model(x), x.sum(1)

    flow = trace(Pair(), X)
    with pytest.raises(TraceError, match="the loss failed on the model's output"):  # the list is what it was before
        flow.following(lambda out: out[0].sum() + out[1].sum() + kept[-1].square().sum())


@pytest.mark.parametrize("memory", ["keep", "recompute"])
@pytest.mark.parametrize("depth", ["auto", "cuts"])
def test_every_state_on_the_way_to_a_loss_has_its_numbers(memory, depth):
    flow = trace(Autoencoder().double(), X, target=elbo, memory=memory, depth=depth)
    assert flow.target_name == "target"
    assert all(bool(state.flatten().isfinite().all()) for state in flow.states)
    assert [step.target.index for step in flow.steps] == [after.index for _, after in pairwise(flow.states)]


def test_several_outputs_by_their_paths():
    flow = trace(Autoencoder().double(), X, target=["0", "1"])
    assert [tuple(tensor.shape) for tensor in flow.states[-1].tensors] == [(6, 10), (6, 3)]
    with pytest.raises(TraceError, match="'3' is not a tensor of the output"):
        trace(Autoencoder().double(), X, target=["0", "3"])
