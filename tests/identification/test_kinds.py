"""Kinds of steps in idioms that no rule was written for: folded streams, states that are fed again, gains of norms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from stabkit.identification import identify
from stabkit.tracing import trace

D, N = 8, 3


class Streams(nn.Module):
    """Residual streams that a matrix mixes, folded into the axis of samples or of channels."""

    def __init__(self, fold: str) -> None:
        super().__init__()
        self.fold = fold
        self.f = nn.Sequential(nn.LayerNorm(D), nn.Linear(D, D), nn.Tanh())
        self.mix = nn.Parameter(torch.eye(N) + 0.2 * torch.randn(N, N))
        self.read, self.write = nn.Parameter(torch.rand(N)), nn.Parameter(torch.rand(N))

    def forward(self, x: Tensor) -> Tensor:
        streams = {
            "samples, slow": lambda: x.unflatten(0, (N, -1)),
            "samples, fast": lambda: x.unflatten(0, (-1, N)).transpose(0, 1),
            "channels": lambda: torch.stack(x.chunk(N, dim=-1)),
        }[self.fold]()
        y = self.f(torch.tensordot(self.read, streams, dims=1))
        new = torch.tensordot(self.mix, streams, dims=1) + self.write.view(-1, *[1] * y.dim()) * y
        if self.fold == "channels":
            return torch.cat(list(new), dim=-1)
        return (new if self.fold.endswith("slow") else new.transpose(0, 1)).flatten(0, 1)


@pytest.mark.parametrize("fold", ["samples, slow", "samples, fast", "channels"])
def test_streams_are_found_wherever_they_are_folded(fold):
    torch.manual_seed(0)
    model = nn.Sequential(*(Streams(fold) for _ in range(3))).double()
    shape = (2, 4, N * D) if fold == "channels" else (2 * N, 4, D)
    found = identify(trace(model, torch.randn(*shape, dtype=torch.float64)))[1]
    assert found.name.startswith("general linear method of 3")
    np.testing.assert_allclose(found.method.V, model[1].mix.detach().numpy(), atol=1e-10)


class Mixed(nn.Module):
    """A residual that is turned around by a matrix: no skip, and not a map without one either."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D))
        self.turn = nn.Linear(D, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.turn(x + self.f(x))


def test_that_a_residual_behind_a_matrix_is_plain_is_not_proven():
    torch.manual_seed(0)
    found = identify(trace(nn.Sequential(Mixed(), Mixed(), Mixed()), torch.randn(2, D)))[1]
    assert (found.name, found.evidence) == ("plain", "measured")


class Fed(nn.Module):
    """Blocks that read the first state again."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D)) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        first = x = functional.normalize(x, dim=-1)
        for f in self.blocks:
            x = torch.add(0.8 * x, first, alpha=0.2) if self.how == "mixed in" else x + 0.2 * first
            x = x + f(x)
        return functional.normalize(x, dim=-1)


@pytest.mark.parametrize(("how", "a"), [("mixed in", 0.8), ("added", 1.0)])
def test_blocks_that_read_the_first_state_again_are_steps_of_their_own(how, a):
    torch.manual_seed(0)
    records = identify(trace(Fed(how).double(), torch.randn(2, D, dtype=torch.float64)))
    assert all(len(record.steps) == 1 for record in records)
    assert records[len(records) // 2].skip == pytest.approx(a)


class Peri(nn.Module):
    """A branch that ends in a norm with a gain for each channel."""

    def __init__(self, norm: str) -> None:
        super().__init__()
        self.norm, self.f = norm, nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D))
        self.gain = nn.Parameter(1 + 0.3 * torch.randn(D))

    def forward(self, x: Tensor) -> Tensor:
        y = self.f(x)
        if self.norm == "by hand":
            y = self.gain * (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-6))
        elif self.norm == "centred":
            y = y - y.mean(-1, keepdim=True)
            y = y / (y.var(-1, keepdim=True) + 1e-6).sqrt() * (2 - self.gain)
        else:
            y = functional.rms_norm(y, (D,), self.gain)
        return x + 0.5 * y


@pytest.mark.parametrize("norm", ["by hand", "centred", "fused"])
def test_the_gain_of_a_norm_belongs_to_the_field(norm):
    torch.manual_seed(0)
    found = identify(trace(nn.Sequential(*(Peri(norm) for _ in range(3))), torch.randn(2, 4, D)))[1]
    assert (found.name, found.evidence) == ("forward Euler", "proven")
    assert found.step_size == pytest.approx(0.5)


class Sphere(nn.Module):
    """A relaxed step between two points of a sphere, in several spellings."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.f = how, nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D))

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "lerp":
            new = torch.lerp(functional.normalize(x, dim=-1), functional.normalize(self.f(x), dim=-1), 0.25)
            return functional.normalize(new, dim=-1)
        unit = x / x.norm(dim=-1, keepdim=True)
        new = 0.75 * unit + self.f(x).mul(0.25)
        return new / new.norm(dim=-1, keepdim=True)


@pytest.mark.parametrize("how", ["lerp", "by hand"])
def test_a_step_between_normalised_states_is_retracted(how):
    torch.manual_seed(0)
    found = identify(trace(nn.Sequential(*(Sphere(how) for _ in range(3))).double(), torch.randn(2, D).double()))[1]
    assert found.name == "projected Euler (post-norm)"
    assert found.step_size == pytest.approx(0.25)
    assert found.method.V[0, 0] == pytest.approx(0.75)


class Solved(nn.Module):
    """A solver loop around a field whose weights are made anew by every call, with its first state as a source."""

    def __init__(self, method: str) -> None:
        super().__init__()
        self.method = method
        self.weight = nn.Parameter(torch.randn(D, D) / 4)

    def field(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ (self.weight.detach() - self.weight.detach().T))

    def forward(self, x: Tensor) -> Tensor:
        if self.method == "implicit":
            new = x
            for _ in range(5):
                new = x + 0.1 * self.field(new)
            return new
        return x + 0.1 * self.field(x + 0.05 * self.field(x))


@pytest.mark.parametrize(
    ("method", "name"), [("implicit", "backward_euler (by 4 fixed-point iterations)"), ("midpoint", "midpoint")]
)
def test_weights_that_are_made_anew_are_the_same_field(method, name):
    torch.manual_seed(0)
    found = identify(trace(nn.Sequential(*(Solved(method) for _ in range(3))).double(), torch.randn(2, D).double()))[1]
    assert (found.name, found.step_size) == (name, pytest.approx(0.1))


class Sourced(nn.Module):
    """A solver whose field reads the first state too, and whose calls depth selection may cut anywhere."""

    def __init__(self, order: int) -> None:
        super().__init__()
        self.order, self.f, self.out = order, Driven(), nn.Linear(D, 2)
        self.inp = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        self.f.source = x.clone()
        for _ in range(4):
            k1 = self.f(x)
            k2 = self.f(x + 0.05 * k1)
            if self.order == 3:
                x = x + 0.1 / 6 * torch.stack([k1, 4 * k2, self.f(x + 0.2 * k2 - 0.1 * k1)]).sum(0)
                continue
            k3 = self.f(x + 0.05 * k2)
            x = x + (k1 + 2 * k2 + 2 * k3 + self.f(x + 0.1 * k3)) * (0.1 / 6)
        return self.out(x)


class Driven(nn.Module):
    """A field with a source."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D))
        self.source = torch.zeros(D)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) + 0.2 * self.source


@pytest.mark.parametrize(("order", "name"), [(3, "kutta3"), (4, "rk4")])
def test_a_solver_with_a_source_is_read_step_by_step(order, name):
    torch.manual_seed(0)
    records = identify(trace(Sourced(order).double(), torch.randn(3, D).double()))
    assert [record.name for record in records].count(name) >= 3
