from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from stabkit.errors import TraceError
from stabkit.growth import gradient_profile
from stabkit.tracing import trace


def linear(*sizes: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(a, b).double() for a, b in itertools.pairwise(sizes)])


X = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_growth_of_scaled_orthogonal_layers_is_the_log_of_the_scale():
    model = linear(6, 6, 6, 6)
    for layer, scale in zip(model, (0.5, 2.0, 3.0), strict=True):
        nn.init.orthogonal_(layer.weight, gain=scale)
    profile = gradient_profile(trace(model, torch.randn(3, 6, dtype=torch.float64)))
    expected = torch.tensor([0.5, 2.0, 3.0], dtype=torch.float64).log().unsqueeze(1).expand(3, 3)
    torch.testing.assert_close(profile.log_growth, expected, rtol=0, atol=1e-12)


def test_norms_are_those_of_autograd():
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    states = [X.clone().requires_grad_()]
    for layer in model:
        states.append(layer(states[-1]))
    grads = torch.autograd.grad(states[-1].square().sum(), states)
    profile = gradient_profile(trace(model, X), lambda out: out.square().sum())
    torch.testing.assert_close(profile.gradient_norms, torch.stack([g.norm(dim=1) for g in grads]))
    torch.testing.assert_close(profile.state_norms, torch.stack([s.detach().norm(dim=1) for s in states]))


def test_growth_sums_to_the_ratio_of_the_ends():
    profile = gradient_profile(trace(linear(4, 7, 3, 5), X))
    ends = profile.gradient_norms[0].log() - profile.gradient_norms[-1].log()
    torch.testing.assert_close(profile.log_growth.sum(0), ends, rtol=0, atol=1e-12)
    torch.testing.assert_close(profile.total_growth, ends, rtol=0, atol=1e-12)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_growth_does_not_depend_on_the_scale_of_the_loss(scale):
    flow = trace(linear(4, 7, 3), X)
    plain, scaled = (gradient_profile(flow, lambda out, c=c: c * out.square().sum()) for c in (1.0, scale))
    torch.testing.assert_close(plain.log_growth, scaled.log_growth, rtol=0, atol=1e-12)


def test_shuffling_the_batch_shuffles_the_growth():
    model, order = linear(4, 7, 3), torch.tensor([3, 0, 4, 1, 2])
    loss = lambda out: out.square().sum()  # noqa: E731
    straight, shuffled = gradient_profile(trace(model, X), loss), gradient_profile(trace(model, X[order]), loss)
    torch.testing.assert_close(straight.log_growth[:, order], shuffled.log_growth)


def test_seeds_are_explicit():
    flow = trace(linear(4, 3, 2), X)
    first, again, other = (gradient_profile(flow, seed=seed).log_growth for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_head_of_zeros_is_said_and_the_rest_is_still_measured():
    model = linear(4, 4, 4, 2)
    nn.init.zeros_(model[2].weight)
    profile = gradient_profile(trace(model, X))
    assert profile.restarts == (2,)
    assert (profile.log_growth[2] == -math.inf).all()
    assert profile.log_growth[:2].isfinite().all()


def test_a_loss_that_does_not_reach_the_input_has_no_growth_to_speak_of():
    profile = gradient_profile(trace(linear(4, 3, 2), X), lambda out: (out * 0).sum())
    assert profile.log_growth.isnan().all()


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda out: out, "expected a scalar"),
        (lambda out: 3.0, "returned float"),
        (lambda out: out.detach().sum(), "does not depend on the model's output"),
    ],
)
def test_what_is_no_loss_is_an_error(loss, message):
    with pytest.raises(TraceError, match=message):
        gradient_profile(trace(linear(4, 3), X), loss)


def test_a_loss_that_reads_another_output_is_refused():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = self.body(x)
            return self.head(h), h

    flow = trace(Two().double(), X)
    with pytest.raises(TraceError, match="around '0'"):
        gradient_profile(flow, lambda out: out[0].sum() + out[1].square().sum())
    assert gradient_profile(flow, lambda out: out[0].square().sum()).log_growth.isfinite().all()
