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
