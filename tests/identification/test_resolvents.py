"""Splittings by resolvents and reflections, transitions of Hamiltonian Monte Carlo, and adaptive moments as layers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import stabkit
from stabkit.identification import Identification

WIDTH, ROUNDS = 6, 5


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 9), nn.Tanh(), nn.Linear(9, WIDTH))


class Rounds(nn.Module):
    """Rounds of a step of three networks."""

    def __init__(self, step: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.f, self.g, self.h, self.step = mlp(), mlp(), mlp(), step

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(ROUNDS):
            x = self.step(self, x)
        return x


def read(model: nn.Module) -> tuple[Identification, ...]:
    torch.manual_seed(0)
    return stabkit.identify(stabkit.trace(model.double(), torch.randn(3, WIDTH, dtype=torch.float64)), checks=False)


def douglas_rachford(m: nn.Module, z: Tensor) -> Tensor:
    y = m.g(z)
    return z + m.f(2 * y - z) - y


def relaxed(m: nn.Module, z: Tensor) -> Tensor:
    y = m.g(z)
    return z + 0.7 * (m.f(2 * y - z) - y)


def averaged_reflections(m: nn.Module, z: Tensor) -> Tensor:
    r = 2 * m.g(z) - z
    return torch.lerp(z, 2 * m.f(r) - r, 0.5)


def davis_yin(m: nn.Module, z: Tensor) -> Tensor:
    y = m.g(z)
    return z + m.f(2 * y - z - 0.3 * m.h(y)) - y


def no_reflection(m: nn.Module, z: Tensor) -> Tensor:
    y = m.g(z)
    return z + m.f(1.5 * y - z) - y


@pytest.mark.parametrize(
    ("step", "name"),
    [
        (douglas_rachford, "Douglas-Rachford splitting"),
        (relaxed, "Douglas-Rachford splitting (relaxation 0.7)"),
        (averaged_reflections, "Douglas-Rachford splitting"),
        (davis_yin, "Davis-Yin splitting"),
        (no_reflection, "unnamed (2 stages of different fields)"),
    ],
)
def test_the_second_resolvent_at_a_reflection_tells_the_splitting(step, name):
    found = read(Rounds(step))
    assert {r.name for r in found} == {name}
    assert len(found) == ROUNDS


def test_two_reflections_in_one_step_are_that_of_peaceman_and_rachford():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f, self.g = mlp(), mlp()

        def forward(self, z: Tensor) -> Tensor:
            z = 2 * self.g(z) - z
            return 2 * self.f(z) - z

    torch.manual_seed(0)
    model = nn.Sequential(Twice(), Twice(), Twice()).double()
    found = stabkit.identify(
        stabkit.trace(model, torch.randn(3, WIDTH, dtype=torch.float64), depth=["0", "1", "2"]), checks=False
    )
    assert {r.name for r in found} == {"Peaceman-Rachford splitting"}


def hamiltonian(m: nn.Module, q: Tensor) -> Tensor:
    p = torch.randn_like(q) - 0.05 * m.f(q)
    for i in range(4):
        q = q + 0.1 * p
        if i < 3:
            p = p - 0.1 * m.f(q)
    return q


def test_a_transition_of_hamiltonian_monte_carlo_is_so_many_steps_of_verlet():
    found = read(Rounds(hamiltonian))
    assert {r.name.partition(" (")[0] for r in found} == {"4 steps of stormer_verlet"}
    assert [r.step_size for r in found] == pytest.approx([0.1] * ROUNDS)


class TotalVariation(nn.Module):
    """Chambolle and Pock 2011 for images: differences by a kernel, and its adjoint by the same kernel transposed."""

    def __init__(self) -> None:
        super().__init__()
        kernel = torch.zeros(2, 1, 3, 3)
        kernel[:, 0, 1, 1], kernel[0, 0, 1, 2], kernel[1, 0, 2, 1] = -1, 1, 1
        self.register_buffer("kernel", kernel)

    def forward(self, y: Tensor) -> Tensor:
        x = ahead = y
        p = torch.zeros(len(y), 2, *y.shape[2:], dtype=y.dtype)
        for _ in range(6):
            p = (p + 0.3 * nn.functional.conv2d(ahead, self.kernel, padding=1)).clamp(-0.2, 0.2)
            old, x = x, (x - 0.3 * nn.functional.conv_transpose2d(p, self.kernel, padding=1) + 0.3 * y) / 1.3
            ahead = 2 * x - old
        return x


def test_a_kernel_and_its_transpose_are_two_fields():
    torch.manual_seed(0)
    flow = stabkit.trace(TotalVariation().double(), torch.randn(2, 1, 6, 6, dtype=torch.float64))
    found = [r for r in stabkit.identify(flow, checks=False) if r.step_size is not None]
    assert len(found) >= 5
    assert all(r.name.startswith("primal-dual hybrid gradient (Chambolle-Pock, theta = 1)") for r in found)


class InnerLoop(nn.Module):
    """Steps of gradient descent on fast weights, whose gradient is an outer product with the input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        w, target = self.weight.expand(len(x), 3, WIDTH), torch.tanh(x[:, :3])
        for _ in range(ROUNDS):
            error = torch.einsum("bkd,bd->bk", w, x) - target
            w = w - 0.1 * error[:, :, None] * x[:, None]
        return torch.einsum("bkd,bd->bk", w, x)


def test_an_outer_product_with_the_input_is_no_step_size():
    found = [r for r in read(InnerLoop()) if r.name == "forward Euler"]
    assert len(found) >= ROUNDS - 1
    assert not any("h(c)" in r.convention for r in found)


class Adam(nn.Module):
    """Kingma and Ba 2015 as layers of a network; without the squares a look-alike."""

    def __init__(self, *, lerp: bool, squares: bool = True) -> None:
        super().__init__()
        self.f, self.lerp, self.squares = mlp(), lerp, squares

    def forward(self, x: Tensor) -> Tensor:
        m, v = torch.zeros_like(x), torch.zeros_like(x)
        for k in range(1, ROUNDS + 2):
            g = self.f(x)
            of_size = g * g if self.squares else torch.tanh(g)
            if self.lerp:
                m, v = torch.lerp(m, g, 0.1), 0.99 * v + 0.01 * of_size
            else:
                m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * of_size
            x = x - 0.05 * (m / (1 - 0.9**k)) / ((v / (1 - 0.99**k)).abs().sqrt() + 1e-8)
        return x


@pytest.mark.parametrize("lerp", [True, False])
def test_two_moments_make_steps_of_adam(lerp):
    found = [r for r in read(Adam(lerp=lerp)) if r.name not in ("fork", "join")]
    assert len(found) >= ROUNDS - 1
    assert {r.name for r in found} == {"adaptive momentum (Adam type, beta = 0.9 and 0.99)"}
    assert {r.evidence for r in found} == {"measured"}
    assert {r.step_size for r in found} == {None}


def test_a_mean_of_something_else_is_no_second_moment():
    assert not any("Adam" in r.name for r in read(Adam(lerp=False, squares=False)))


class Growing(nn.Module):
    """Nesterov's steps with a momentum that grows: what the last one begins with is one tensor, y = x + m (x - x_0)."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, x: Tensor) -> Tensor:
        old = x
        for k in range(ROUNDS + 1):
            y = x + k / (k + 3) * (x - old)
            old, x = x, y - 0.1 * self.net(y)
        return x


def test_the_last_step_is_whole_where_one_tensor_carries_all_within_it():
    last = read(Growing())[-1]
    assert last.name == f"Nesterov momentum (gamma = {ROUNDS / (ROUNDS + 3):.3g})"


class Anderson(nn.Module):
    """A fixed point with a memory of two values, which begins at zero in a function of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, x: Tensor) -> Tensor:
        z, f = torch.zeros_like(x), torch.tanh(self.net(torch.zeros_like(x)) + x)
        new, value = f, torch.tanh(self.net(f) + x)
        for _ in range(ROUNDS):
            r = value - new - (f - z)
            theta = ((value - new) * r).sum(-1, keepdim=True) / (r * r).sum(-1, keepdim=True)
            z, f, new = new, value, value - theta * (value - f)
            value = torch.tanh(self.net(new) + x)
        return value


def test_the_beginning_of_an_iteration_whose_rounds_have_no_name_is_no_step_of_its_input():
    found = read(Anderson())
    assert not any("Euler" in r.name for r in found)
