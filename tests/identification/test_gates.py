from __future__ import annotations

import pytest
import torch
from torch import nn

from stabkit.identification import identify
from stabkit.tracing import trace

WIDTH = 12


class Cross(nn.Module):
    """Layers of a cross network in one loop: x0 times a function of x, added to x."""

    def __init__(self, layer, parts=2, depth=4):
        super().__init__()
        self.layer = layer
        self.columns = nn.ModuleList(
            [nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(depth)]) for _ in range(parts)]
        )

    def forward(self, x):
        x0 = x
        for row in zip(*self.columns, strict=True):
            x = self.layer(row, x, x0)
        return x


class Unrolled(nn.Module):
    """Rounds of a denoiser and of conjugate gradients for (1 + A^T A) u = y + D(x)."""

    def __init__(self, dot, warm=False):
        super().__init__()
        self.dot, self.warm = dot, warm
        self.denoise = nn.Linear(WIDTH, WIDTH)
        self.A = nn.Parameter(torch.randn(WIDTH, WIDTH) / WIDTH**0.5)

    def normal(self, p):
        return p @ self.A.T @ self.A + p

    def solve(self, b, u):
        r = b - self.normal(u)
        p, rr = r, self.dot(r, r)
        for _ in range(4):
            product = self.normal(p)
            alpha = rr / self.dot(p, product)
            u, r = u + alpha * p, r - alpha * product
            new = self.dot(r, r)
            p, rr = r + new / rr * p, new
        return u

    def forward(self, y):
        x = y
        for _ in range(3):
            b = y + torch.tanh(self.denoise(x))
            x = self.solve(b, x if self.warm else torch.zeros_like(b))
        return x


def as_one_step(model):
    """The reading of a model that is one step between two changes of space."""
    torch.manual_seed(0)
    whole = nn.Sequential(nn.Linear(5, WIDTH), model, nn.Linear(WIDTH, 2))
    return identify(trace(whole, torch.randn(3, 5)))[1]


def records(model, batch=3):
    torch.manual_seed(0)
    return identify(trace(model, torch.randn(batch, WIDTH)))


@pytest.mark.parametrize(
    "layer",
    [
        lambda row, x, x0: x0 * row[0](x) * torch.sigmoid(row[1](x)) + x,  # GDCN
        lambda row, x, x0: x + x0 * (row[0](x) + row[1].bias),  # DCN-v2
        lambda row, x, x0: x0 * (x @ row[0].weight[:, :1]) + row[0].bias + x,  # DCN
        lambda row, x, x0: torch.addcmul(x, x0, row[0](x)),
    ],
)
def test_a_product_of_the_state_with_what_grows_with_it_is_a_field(layer):
    record = as_one_step(Cross(layer))
    assert record.name == "Lie splitting (4 Euler steps, fields that read x_0 too)"
    assert record.evidence == "proven"


@pytest.mark.parametrize("bend", [torch.relu, nn.functional.softplus, nn.functional.silu, torch.square])
def test_a_factor_that_an_activation_lets_grow_is_no_gate(bend):
    layers = [Cross(lambda row, x, x0: x + x * bend(row[0](x)), depth=1) for _ in range(3)]
    assert {(r.name, r.evidence) for r in records(nn.Sequential(*layers))} == {("forward Euler", "proven")}


@pytest.mark.parametrize(
    "bend", [torch.sigmoid, torch.tanh, nn.functional.hardsigmoid, lambda x: torch.exp(-x.square())]
)
def test_a_factor_that_stays_bounded_is_a_gate(bend):
    layers = [Cross(lambda row, x, x0: x * bend(row[0](x)) + row[1](x), depth=1) for _ in range(3)]
    assert all(record.name.startswith("gated skip") for record in records(nn.Sequential(*layers)))


def test_several_gated_steps_are_told_from_one():
    record = as_one_step(Cross(lambda row, x, x0: x * torch.sigmoid(row[0](x)) + row[1](x), depth=3))
    assert record.name.startswith("Lie splitting (3 gated steps")
    assert record.evidence == "measured"


def test_a_skip_that_may_hide_in_a_product_is_not_denied():
    model = nn.Sequential(*(Cross(lambda row, x, x0: x * (1 + row[0](x)) + row[1](torch.tanh(x)), depth=1),) * 3)
    assert {record.evidence for record in records(model)} == {"unknown"}


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize(
    "dot",
    [
        lambda a, b: (a * b).sum(-1, keepdim=True).clamp(min=1e-12),
        lambda a, b: torch.dot(a.flatten(), b.flatten()),
        lambda a, b: torch.einsum("bi,bi->b", a, b)[:, None],
        lambda a, b: torch.view_as_real((torch.complex(a, a).conj() * torch.complex(b, b)).sum(-1, keepdim=True))[
            ..., 0
        ],
    ],
)
def test_the_numbers_of_an_inner_solver_are_no_gates(dot, warm):
    found = records(Unrolled(dot, warm))
    assert all("gate" not in record.name for record in found)
    assert {record.name for record in found if record.evidence != "proven"} == {"iterative solver inside"}
    assert {record.name for record in found if record.evidence == "proven"} <= {"fork", "join"}


def test_a_gate_of_a_similarity_stays_a_gate():
    def layer(row, x, x0):
        y = torch.tanh(row[0](x))
        gate = torch.sigmoid(torch.cosine_similarity(x, y, dim=-1))[:, None]
        return gate * x + (1 - gate) * y

    assert all(r.name.startswith("gated Euler") for r in records(nn.Sequential(*(Cross(layer, depth=1),) * 2)))


class Wide(nn.Module):
    """A gate of the state, and another number of the same gate before the branch (Kusupati et al. 2018)."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.around = nn.Linear(3, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x):
        h = x.new_zeros(len(x), WIDTH)
        for t in range(x.shape[1]):
            both = self.into(x[:, t]) + self.around(h)
            z = torch.sigmoid(both + 1)
            h = (0.7 * (1 - z) + 0.02) * torch.tanh(both) + z * h
        return h


def test_the_mean_of_a_gate_before_a_branch_is_not_told_as_its_number():
    torch.manual_seed(0)
    found = identify(trace(Wide(), torch.randn(2, 9, 3)), checks=False)[3]
    assert found.name.startswith("gated skip (mean a = ")
    assert found.convention == "h: the mean of what multiplies the branch, which depends on the state"


class Slots(nn.Module):
    """A cell with gates, and a residual branch behind it (Locatello et al. 2020)."""

    def __init__(self) -> None:
        super().__init__()
        self.gates, self.norm, self.f = nn.GRUCell(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        x = self.gates(torch.tanh(x), x)
        return x + torch.relu(self.f(self.norm(x)))


def test_a_step_without_a_gate_beside_one_with_a_gate_is_not_said_to_have_one():
    torch.manual_seed(0)
    slots = Slots()
    for found in identify(trace(nn.Sequential(slots, slots, slots), torch.randn(2, WIDTH)), checks=False):
        assert found.name.startswith("Lie splitting (2 steps, 1 gated")
        assert "each with a gate" not in found.system
