"""Fields are found by their use: what solves, guides or lies between cuts is one, and what is told was checked."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import mse_loss

from stabkit.identification import identify
from stabkit.tracing import trace


class Mass(nn.Module):
    """x' = M(x)^-1 f(x), with a matrix that no step size enters."""

    def __init__(self) -> None:
        super().__init__()
        self.m, self.b = nn.Linear(4, 16), nn.Linear(4, 4)

    def forward(self, x):
        root = self.m(x).view(-1, 4, 4)
        mass = root @ root.mT + torch.eye(4)
        return torch.linalg.solve(mass, torch.tanh(self.b(x)).unsqueeze(-1)).squeeze(-1)


class Steps(nn.Module):
    def __init__(self, step, field=None) -> None:
        super().__init__()
        self.step = step
        self.f = field or nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4))

    def forward(self, x):
        for _ in range(4):
            x = self.step(self.f, x)
        return x


def names(model, *x):
    return [r.name for r in identify(trace(model, *x))]


def euler(f, x):
    return x + 0.2 * f(x)


def midpoint(f, x):
    return x + 0.2 * f(x + 0.1 * f(x))


@pytest.mark.parametrize(("step", "name"), [(euler, "forward Euler"), (midpoint, "midpoint")])
def test_a_field_may_solve_a_linear_system(step, name):
    torch.manual_seed(0)
    found = identify(trace(Steps(step, Mass()), torch.randn(3, 4)))
    assert [r.name for r in found] == [name] * 4
    assert [r.step_size for r in found] == pytest.approx([0.2] * 4)
    assert all("steps 0 to 3 use the same weight matrices" in r.notes for r in found)


class Rosenbrock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Linear(4, 4)

    def forward(self, x):
        for _ in range(3):
            y = torch.tanh(self.w(x))
            jacobian = (1 - y.square()).unsqueeze(-1) * self.w.weight
            x = x + torch.linalg.solve(torch.eye(4) - 0.3 * jacobian, 0.3 * y)
        return x


def test_a_system_that_holds_the_step_is_no_field():
    torch.manual_seed(0)
    assert names(Rosenbrock(), torch.randn(2, 4)) == ["linearly implicit Euler (Rosenbrock)"] * 3


class Newton(nn.Module):
    """Backward Euler of tanh(w x) - x."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Linear(4, 4)

    def forward(self, x):
        for _ in range(3):
            y = x
            for _ in range(4):
                t = torch.tanh(self.w(y))
                jacobian = (1 - t.square()).unsqueeze(-1) * self.w.weight - torch.eye(4)
                y = y - torch.linalg.solve(torch.eye(4) - 0.5 * jacobian, y - x - 0.5 * (t - y))
            x = y
        return x


def test_an_equation_may_have_a_linear_part():
    torch.manual_seed(0)
    found = identify(trace(Newton(), torch.randn(2, 4)))
    assert [(r.name, pytest.approx(r.step_size)) for r in found[:2]] == [("backward_euler", 0.5)] * 2


def guided(f, x):
    def field(x):
        given, free = f(torch.cat([x, x])).chunk(2)
        return free + 2.0 * (given - free)

    return midpoint(field, x)


def test_both_halves_of_a_guided_field_are_one():
    torch.manual_seed(0)

    class Labelled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4))

        def forward(self, x):
            label = torch.arange(2.0).repeat_interleave(len(x) // 2)[:, None]
            return self.net(torch.cat([x, label], 1))

    assert names(Steps(guided, Labelled()), torch.randn(3, 4)) == ["midpoint"] * 4


@pytest.mark.parametrize(
    ("low", "high", "name"),
    [(0.0, 1.0, "projected Euler (0 <= x <= 1)"), (0.0, None, "projected Euler (ReLU)"), (-1.0, 1.0, None)],
)
def test_a_box_is_told_by_its_ends(low, high, name):
    torch.manual_seed(0)
    model = Steps(lambda f, x: torch.clamp(x + 0.1 * f(x), low, high))
    assert set(names(model, torch.rand(3, 4))) == {name or "projected Euler (-1 <= x <= 1)"}


def test_a_padded_state_is_no_part_of_it():
    torch.manual_seed(0)
    model = nn.Sequential(nn.ZeroPad1d((0, 2)), nn.Linear(6, 6))
    (first, *_) = identify(trace(model, torch.randn(3, 4), depth="modules"))
    assert first.notes == ("numbers that are not made of the state are put beside its entries",)


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))

    def forward(self, x):
        return torch.relu(x + self.f(x))


class Parallel(nn.Module):
    """Two branches of two widths, residual blocks in each and then an exchange, as in HRNet."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Linear(6, 4)
        self.a, self.b = (nn.ModuleList(nn.Sequential(Residual(n), Residual(n)) for _ in range(3)) for n in (6, 4))
        self.down = nn.ModuleList(nn.Linear(6, 4) for _ in range(3))
        self.up = nn.ModuleList(nn.Linear(4, 6) for _ in range(3))

    def forward(self, x):
        x, y = x, self.start(x)
        for a, b, down, up in zip(self.a, self.b, self.down, self.up, strict=True):
            x, y = a(x), b(y)
            x, y = torch.relu(x + up(y)), torch.relu(y + down(x))
        return torch.cat([x, y], 1)


def test_streams_that_are_added_to_each_other_are_no_end():
    torch.manual_seed(0)
    found = names(Parallel(), torch.randn(3, 6))
    assert "no branch" not in found
    assert found[0] == "fork"
    assert found.count("join") <= 1
    assert sum("2 coupled states" in name or "2 states" in name for name in found) >= 2


class Collected(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = (nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4)) for _ in range(2))

    def forward(self, x):
        v, kept = 0.5 * x, []
        for _ in range(5):
            v = v + 0.1 * self.f(x)
            x = x + 0.2 * self.g(v)
            v = v + 0.1 * self.f(x)
            kept.append(x)
        return torch.stack(kept, 1)


def test_outputs_that_are_kept_are_no_states_of_the_last_step():
    torch.manual_seed(0)
    assert names(Collected(), torch.randn(3, 4))[1:] == ["stormer_verlet"] * 5


class Split(nn.Module):
    """Symplectic Euler of one tensor, cut into two in every block."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4)) for _ in range(4)])

    def forward(self, x):
        z = torch.cat([x, torch.zeros_like(x)], -1)
        for f in self.blocks:
            x, v = z.chunk(2, -1)
            v = v + 0.2 * f(x)
            z = torch.cat([x + 0.2 * v, v], -1)
        return z.chunk(2, -1)[0]


def test_a_joined_state_may_be_cut_at_once():
    torch.manual_seed(0)
    assert "symplectic Euler (position, velocity)" in names(Split(), torch.randn(3, 4))


class Bent(nn.Module):
    """A field with a residual inside of it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 4), nn.Linear(4, 4)

    def forward(self, x):
        return torch.tanh(self.c(x + self.b(torch.relu(self.a(x)))))


class Kicked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = Bent()

    def forward(self, x):
        v = 0.5 * x
        for _ in range(5):
            v = v + 0.2 * self.f(x)
            x = x + 0.2 * v
        return x


def test_a_residual_inside_a_field_belongs_to_it():
    torch.manual_seed(0)
    assert names(Steps(euler, Bent()), torch.randn(3, 4)) == ["forward Euler"] * 4
    assert "symplectic Euler (position, velocity)" in names(Kicked(), torch.randn(3, 4))


class Downhill(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.k = nn.Parameter(torch.randn(6, 4) / 2)

    def forward(self, x):
        return -(torch.relu(x @ self.k.T) @ self.k)


def test_a_minus_in_front_of_a_field_is_its_own():
    torch.manual_seed(0)
    found = identify(trace(Steps(midpoint, Downhill()), torch.randn(3, 4)))
    assert [(r.name, pytest.approx(r.step_size)) for r in found] == [("midpoint", 0.2)] * 4


class Inner(nn.Module):
    """Gradient steps on weights of its own."""

    def __init__(self, *, copied: bool) -> None:
        super().__init__()
        self.head, self.copied = nn.Linear(3, 2), copied

    def forward(self, x, y, query):
        own = dict(self.head.named_parameters())
        if self.copied:
            own = {name: p.clone() for name, p in own.items()}
        for _ in range(4):
            loss = mse_loss(functional_call(self.head, own, (x,)), y)
            slopes = torch.autograd.grad(loss, list(own.values()), create_graph=True)
            own = {name: p - 0.05 * g for (name, p), g in zip(own.items(), slopes, strict=True)}
        return functional_call(self.head, own, (query,))


@pytest.mark.parametrize("copied", [False, True])
def test_derivatives_by_own_parameters_are_traced(copied):
    torch.manual_seed(0)
    model = Inner(copied=copied)
    flags = [p.requires_grad for p in model.parameters()]
    found = names(model, torch.randn(5, 3), torch.randn(5, 2), torch.randn(4, 3))
    assert "forward Euler of 2 coupled states" in found
    assert [p.requires_grad for p in model.parameters()] == flags
