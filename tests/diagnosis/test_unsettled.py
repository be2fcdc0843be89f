"""A fixed point that is wanted and not reached is said, with a cell that contracts as its remedy."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import stabkit
from stabkit.diagnosis import Finding, apply, examine


class Affine(nn.Module):
    """act(W z + U x)."""

    def __init__(self, gain: float, act: nn.Module, layer: type[nn.Module] = nn.Linear) -> None:
        super().__init__()
        torch.manual_seed(0)
        options = {} if layer is nn.Linear else {"kernel_size": 3, "padding": 1}
        self.state, self.source, self.act = layer(12, 12, **options), layer(5, 12, **options), act
        nn.init.orthogonal_(self.state.weight, gain)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return self.act(self.state(z) + self.source(x))


class TwoLayers(nn.Module):
    """W2 relu(W1 z) + U x, of which no matrix is square."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.source = nn.Linear(12, 20), nn.Linear(20, 12), nn.Linear(5, 12)
        nn.init.orthogonal_(self.up.weight, gain)
        nn.init.orthogonal_(self.down.weight, gain)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(z))) + self.source(x)


class Equilibrium(nn.Module):
    """A cell iterated without gradient, damped or not, and called once with it."""

    def __init__(self, cell: nn.Module, calls: int = 40, damping: float = 0.0) -> None:
        super().__init__()
        self.cell, self.head, self.calls, self.damping = cell, nn.LazyLinear(2), calls, damping

    def forward(self, x: Tensor) -> Tensor:
        z = x.new_zeros(len(x), 12, *x.shape[2:])
        with torch.no_grad():
            for _ in range(self.calls):
                z = self.damping * z + (1 - self.damping) * self.cell(z, x)
        return self.head(self.cell(z, x).flatten(1))


def said(model: nn.Module, x: Tensor) -> list[Finding]:
    found = examine(stabkit.trace(model, x, check=False)).findings
    return [finding for finding in found if finding.kind == "no_fixed_point"]


def batch(cell: nn.Module) -> Tensor:
    images = any(isinstance(module, nn.Conv2d) for module in cell.modules())
    return torch.randn(*((4, 5, 6, 6) if images else (6, 5)), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("damping", [0.0, 0.3])
@pytest.mark.parametrize(
    "make",
    [
        lambda: Affine(1.9, nn.ReLU()),
        lambda: Affine(3.0, nn.Tanh()),
        lambda: Affine(2.5, nn.ReLU(), nn.Conv2d),
        lambda: TwoLayers(1.9),
    ],
    ids=["relu", "tanh", "convolution", "two layers"],
)
def test_an_expansive_cell_reaches_no_fixed_point_until_it_contracts(make, damping):
    cell = make()
    model, x = Equilibrium(cell, damping=damping), batch(cell)
    model(x)
    (found,) = said(model, x)
    assert (found.severity, found.module_path) == ("warning", "cell")
    assert found.numbers["residual"] > 0.01
    assert found.numbers["stretch"] > 0.99
    assert "tried on a copy" in found.evidence
    apply(model, found)
    assert said(model, x) == []


@pytest.mark.parametrize(
    ("gain", "calls"),
    [(0.7, 40), (0.7, 9), (0.95, 12), (1.9, 5)],
    ids=["settled", "soon", "still falling", "few calls"],
)
def test_an_iteration_that_settles_or_still_falls_is_left_alone(gain, calls):
    model, x = Equilibrium(Affine(gain, nn.ReLU()), calls), batch(nn.Identity())
    model(x)
    assert said(model, x) == []


class Anderson(Equilibrium):
    """The iteration by Anderson's method, of the two last residuals, as batches of equilibrium models are solved."""

    def forward(self, x: Tensor) -> Tensor:
        z = x.new_zeros(len(x), 12, *x.shape[2:])
        with torch.no_grad():
            f = self.cell(z, x)
            before, z = (z, f), f
            for _ in range(self.calls):
                f = self.cell(z, x)
                new, old = f - z, before[1] - before[0]
                share = (new * (new - old)).sum((1, 2, 3)) / (new - old).square().sum((1, 2, 3)).clamp_min(1e-12)
                before, z = (z, f), f - share.clamp(-1, 1)[:, None, None, None] * (f - before[1])
        return self.head(self.cell(z, x).flatten(1))


def test_a_solver_that_combines_its_states_is_judged_as_well():
    model = Anderson(Affine(4.0, nn.Tanh(), nn.Conv2d))
    x = batch(model.cell)
    model(x)
    (found,) = said(model, x)
    assert found.numbers["residual"] > 0.01
    settled = Anderson(Affine(0.5, nn.Tanh(), nn.Conv2d))
    settled(x)
    assert said(settled, x) == []


@pytest.mark.parametrize("act", [torch.relu, torch.tanh])
def test_a_layer_that_is_part_of_the_map_is_not_taken_for_it(act):
    class Outside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.inner, self.head = nn.Linear(12, 12), nn.Linear(12, 2)

        def forward(self, x: Tensor) -> Tensor:
            z = torch.zeros_like(x)
            with torch.no_grad():
                for _ in range(30):
                    z = act(self.inner(z) + x)
            return self.head(act(self.inner(z) + x))

    assert said(Outside(), torch.randn(4, 12, generator=torch.Generator().manual_seed(1))) == []


def test_a_cell_that_reads_another_piece_each_time_is_not_iterated_to_a_fixed_point():
    class Warmed(nn.Module):
        """The state after a warm-up over the sequence, without gradient."""

        def __init__(self) -> None:
            super().__init__()
            self.cell, self.head = Affine(1.9, nn.Tanh()), nn.Linear(12, 2)

        def forward(self, x: Tensor) -> Tensor:
            z = x.new_zeros(len(x), 12)
            with torch.no_grad():
                for t in range(x.shape[1] - 1):
                    z = self.cell(z, x[:, t])
            return self.head(self.cell(z, x[:, -1]))

    assert said(Warmed(), torch.randn(4, 20, 5, generator=torch.Generator().manual_seed(1))) == []


class ImplicitSteps(nn.Module):
    """Midpoint steps z = x + h f((x + z) / 2), each solved by plain iteration: f itself has no fixed point there."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.field, self.head = nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 12)), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            with torch.no_grad():
                z = x
                for _ in range(12):
                    z = x + 0.5 * self.field((x + z) / 2)
            x = x + 0.5 * self.field((x + z) / 2)
        return self.head(x)


def test_a_field_whose_steps_are_solved_is_no_fixed_point_that_is_missed():
    assert said(ImplicitSteps(), torch.randn(6, 12)) == []
