from __future__ import annotations

import pytest
import torch
from torch import nn

from stabkit.identification import identify
from stabkit.identification.steps.implicit import fixed_point
from stabkit.tracing import trace

from .recurrent_models import Equilibrium


class FewSteps(Equilibrium):
    """Stops long before the fixed point."""

    def forward(self, x):
        x = self.stem(x)
        z = torch.zeros_like(x)
        with torch.no_grad():
            for _ in range(7):
                z = torch.tanh(0.3 * self.inner(z) + self.inject(x))
        return torch.tanh(0.3 * self.inner(z) + self.inject(x))


def traced(model):
    torch.manual_seed(0)
    return trace(model.double(), torch.randn(2, 4, dtype=torch.float64))


def test_the_residual_is_that_of_the_equation():
    torch.manual_seed(1)
    model = FewSteps().double()
    flow = traced(model)
    x, z = model.stem(flow.states[0].tensors[0]), torch.zeros(2, 6, dtype=torch.float64)
    with torch.no_grad():
        for _ in range(7):
            before, z = z, torch.tanh(0.3 * model.inner(z) + model.inject(x))
    found = fixed_point(flow)
    assert found.iterations == 8
    assert found.residual == pytest.approx(float((z - before).norm() / z.norm()), rel=1e-10)


def test_the_contraction_is_the_spectral_radius_at_the_fixed_point():
    torch.manual_seed(0)
    model = Equilibrium().double()
    flow = trace(model, torch.randn(1, 4, dtype=torch.float64))
    z = flow.states[-1].tensors[0]
    J = torch.diag(1 - z[0] ** 2) @ (0.3 * model.inner.weight.detach())
    found = fixed_point(flow)
    assert found.residual < 1e-14
    assert found.contraction == pytest.approx(float(torch.linalg.eigvals(J).abs().max()), rel=0.25)


def test_the_model_comes_back_as_it_was():
    model = Equilibrium()
    flow = traced(model)
    hooks = [len(m._forward_hooks) for m in model.modules()]
    fixed_point(flow)
    assert [len(m._forward_hooks) for m in model.modules()] == hooks
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_repeated_calls_that_do_not_settle_are_unknown():
    class Wanders(Equilibrium):
        def forward(self, x):
            x = self.stem(x)
            z = torch.zeros_like(x)
            with torch.no_grad():
                for _ in range(9):
                    z = 3 * torch.sin(9 * self.inner(z) + self.inject(x))
            return torch.tanh(0.3 * self.inner(z) + self.inject(x))

    assert identify(traced(Wanders()))[-1].name == "unknown"


def test_a_network_without_iterations_has_no_fixed_point():
    assert fixed_point(trace(nn.Sequential(nn.Linear(3, 3), nn.Tanh()), torch.randn(2, 3))) is None


def tanh_field(width: int = 6) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 12), nn.Tanh(), nn.Linear(12, width))


class Iterated(nn.Module):
    """Rounds of one-leg theta methods by fixed-point iteration, or of chains of stages with other numbers."""

    def __init__(self, numbers, by_slope=False):
        super().__init__()
        self.net, self.numbers, self.by_slope = tanh_field(), numbers, by_slope

    def forward(self, x):
        for _ in range(3):
            x = self.slopes(x) if self.by_slope else self.states(x)
        return x

    def slopes(self, x):
        k = self.net(x)
        for number in self.numbers[:-1]:
            k = self.net(x + 0.1 * number * k)
        return x + 0.1 * self.numbers[-1] * k

    def states(self, x):
        z = x
        for number in self.numbers:
            z = x + 0.1 * self.net((1 - number) * x + number * z)
        return z


CHAINS = [
    (Iterated([0.5] * 6 + [1], by_slope=True), "implicit_midpoint (by 6 fixed-point iterations)"),
    (Iterated([0.5] * 6), "implicit_midpoint (by 5 fixed-point iterations)"),
    (Iterated([0.7] * 6), "one-leg theta method, theta = 0.7 (by 5 fixed-point iterations)"),
    (Iterated([1.0] * 6 + [1], by_slope=True), "backward_euler (by 6 fixed-point iterations)"),
    (Iterated([1 / 4, 1 / 6, 3 / 8, 1 / 2, 1], by_slope=True), "unnamed Runge-Kutta (5 stages, order 2)"),
]


@pytest.mark.parametrize(("model", "name"), CHAINS)
def test_where_the_field_of_an_iteration_is_taken_tells_which_method_it_solves(model, name):
    torch.manual_seed(0)
    found = identify(trace(model.double(), torch.randn(3, 6, dtype=torch.float64)), checks=False)
    assert {record.name for record in found} == {name}
    assert [record.step_size for record in found] == pytest.approx([0.1] * 3)
    assert {record.evidence == "proven" for record in found} == {not name.startswith("unnamed")}


class NewtonMidpoint(nn.Module):
    """Newton's method for z = x + h f((x + z) / 2), its Jacobian taken at the middle."""

    def __init__(self):
        super().__init__()
        self.net = tanh_field()

    def forward(self, x):
        z, eye = x, torch.eye(6, dtype=x.dtype)
        for _ in range(4):
            residual = z - x - 0.1 * self.net((x + z) / 2)
            middle = (x + z) / 2
            slope = 1 - torch.tanh(self.net[0](middle)) ** 2
            jacobian = torch.einsum("ij,bj,jk->bik", self.net[2].weight, slope, self.net[0].weight)
            z = z - torch.linalg.solve(eye - 0.05 * jacobian, residual.unsqueeze(-1)).squeeze(-1)
        return z


def test_arguments_of_the_jacobian_hide_no_equation():
    torch.manual_seed(0)
    model = nn.Sequential(*[NewtonMidpoint()] * 3).double()
    found = identify(trace(model, torch.randn(3, 6, dtype=torch.float64)), checks=False)
    assert [record.name for record in found] == ["implicit_midpoint"] * 3


class Rounds(nn.Module):
    """Rounds that are steps of their own: no module holds all of them."""

    def __init__(self, rule, tied=True):
        super().__init__()
        torch.manual_seed(0)
        self.f = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 8), nn.ELU(), nn.Linear(8, 6)) for _ in range(1 if tied else 7)
        )
        self.rule = rule

    def forward(self, y):
        z = y
        for k in range(7):
            z = self.rule(self.f[k % len(self.f)], y, z)
        return z


@pytest.mark.parametrize(
    ("rule", "system"),
    [(lambda f, y, z: y - f(z), "z = y - f(z)"), (lambda f, y, z: y + 0.3 * f(z), "z = y + 0.3 f(z)")],
)
def test_rounds_of_a_fixed_point_iteration_that_are_cut(rule, system):
    found = identify(trace(Rounds(rule).double(), torch.randn(4, 6).double()))
    assert {(r.name, r.evidence) for r in found[1:]} == {("plain (fixed-point iteration)", "proven")}
    assert all(r.system.startswith(system) for r in found[1:])


@pytest.mark.parametrize(
    ("rule", "tied"),
    [
        (lambda f, y, z: y + f(z), False),
        (lambda f, y, z: z + f(z), True),
        (lambda f, y, z: f(z + y), True),
        (lambda f, y, z: 0.5 * y + f(z), True),
        (lambda f, y, z: z + f(z) + y, True),
    ],
)
def test_rounds_of_other_maps_are_no_fixed_point_iteration(rule, tied):
    found = identify(trace(Rounds(rule, tied).double(), torch.randn(4, 6).double()))
    assert not any("fixed-point" in r.name for r in found)


class Cell(nn.Module):
    """The f of an equilibrium as a module of its own."""

    def __init__(self, width: int = 6):
        super().__init__()
        self.inner, self.inject = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, z, x):
        return torch.tanh(0.3 * self.inner(z) + self.inject(x))


class Solver(nn.Module):
    """Plain, damped and accelerated iterations for one equilibrium, and the call that puts it on the graph."""

    def __init__(self, how: str):
        super().__init__()
        self.f, self.how = Cell(), how

    def forward(self, x):
        with torch.no_grad():
            z = self.solve(x)
        return self.f(z, x)

    def solve(self, x):
        z = torch.zeros_like(x)
        if self.how != "accelerated":
            share = 1.0 if self.how == "plain" else 0.6
            for _ in range(9):
                z = z + share * (self.f(z, x) - z)
            return z
        before, out = z, self.f(z, x)
        z, old = out, out
        for _ in range(6):
            out = self.f(z, x)
            r, s = out - z, old - before
            a = ((r * (r - s)).sum(-1) / (r - s).square().sum(-1).clamp(min=1e-30)).unsqueeze(-1)
            before, z, old = z, out - a * (out - old), out
        return z


@pytest.mark.parametrize(("how", "said"), [("plain", "contracting by"), ("damped", "contracting by"),
                                           ("accelerated", "an accelerated iteration")])  # fmt: skip
def test_what_an_iteration_contracts_by_is_no_property_of_f_where_it_is_accelerated(how, said):
    torch.manual_seed(0)
    model = Solver(how).double()
    x = torch.randn(3, 6, dtype=torch.float64)
    flow = trace(model, x)
    found, record = fixed_point(flow), identify(flow)[0]
    with torch.no_grad():
        z = model.solve(x)
        residual = float((model.f(z, x) - z).norm() / z.norm())
    assert found.plain == (how != "accelerated")
    assert said in record.notes[0]
    assert ("contracting" in record.notes[0]) == (how != "accelerated")
    assert found.residual == pytest.approx(residual, rel=1e-6)
    assert residual > 0
