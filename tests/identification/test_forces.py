"""Fields that are gradients taken inside the forward pass, whole or put together of parts, and forces that are kept."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from stabkit.identification import Identification, identify
from stabkit.tracing import trace

H = 0.1


class Energy(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(width, 12), nn.Tanh(), nn.Linear(12, 1))

    def slope(self, x: Tensor) -> Tensor:
        x = x if x.requires_grad else x.requires_grad_()
        return torch.autograd.grad(self.net(x).sum(), x, create_graph=True)[0]


class Hamiltonian(nn.Module):
    """A network for the energy, whose field is put together of the parts of its gradient; maybe with friction."""

    def __init__(self, friction: float, stages: int) -> None:
        super().__init__()
        self.energy, self.friction, self.stages = Energy(6), friction, stages

    def field(self, x: Tensor) -> Tensor:
        q, p = self.energy.slope(x).chunk(2, dim=1)
        return torch.cat([p, -q - self.friction * p if self.friction else -q], dim=1)

    def forward(self, x: Tensor) -> Tensor:
        f = self.field
        for _ in range(4):
            k1 = f(x)
            if self.stages == 2:
                x = x + H / 2 * (k1 + f(x + H * k1))
                continue
            k2 = f(x + H / 2 * k1)
            k3 = f(x + H / 2 * k2)
            x = x + H / 6 * (k1 + 2 * k2 + 2 * k3 + f(x + H * k3))
        return x


class KeptForce(nn.Module):
    """Velocity Verlet that evaluates its force once a step."""

    def __init__(self) -> None:
        super().__init__()
        self.energy = Energy(3)

    def forward(self, x: Tensor) -> Tensor:
        q, v = x.chunk(2, dim=1)
        a = -self.energy.slope(q)
        for _ in range(6):
            q = q + H * v + 0.5 * H * H * a
            new = -self.energy.slope(q)
            v = v + 0.5 * H * (a + new)
            a = new
        return torch.cat([q, v], dim=1)


def read(model: nn.Module) -> tuple[Identification, ...]:
    torch.manual_seed(0)
    return identify(trace(model.double(), torch.randn(3, 6, dtype=torch.float64)), checks=False)


@pytest.mark.parametrize(("stages", "name"), [(2, "heun2"), (4, "rk4")])
@pytest.mark.parametrize("friction", [0.0, 0.3])
def test_a_field_may_be_put_together_of_parts_of_a_gradient(friction: float, stages: int, name: str):
    found = read(Hamiltonian(friction, stages))
    assert [(r.name, r.evidence) for r in found] == [(name, "proven")] * 4
    assert [r.step_size for r in found] == pytest.approx([H] * 4)


def test_a_force_that_is_kept_for_the_next_step_is_the_one_at_its_beginning():
    found = [r for r in read(KeptForce()) if r.name == "stormer_verlet"]
    assert len(found) >= 3
    assert {r.evidence for r in found} == {"proven"}
    assert [r.step_size for r in found] == pytest.approx([H] * len(found))
