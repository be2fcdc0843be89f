from __future__ import annotations

import torch
from torch import Tensor, nn

from stabkit.tracing import trace
from stabkit.tracing.graph.values import operation
from stabkit.tracing.products.site_plan import arithmetic, plan_sites
from stabkit.tracing.products.site_products import fill_by_sites
from stabkit.tracing.products.step_products import Products
from tests.operators.test_dense import Attention, truth


def recorded(model: nn.Module, x: Tensor, **kwargs: object) -> Products:
    found = trace(model.eval().double(), x.double(), **kwargs).jacobian().origin
    assert found is not None
    return found.products


def test_cuts_lie_at_the_projections():
    torch.manual_seed(0)
    products = recorded(Attention(16, 2, causal=True), torch.randn(2, 6, 16))
    plan = plan_sites(products)
    assert plan is not None
    assert plan.right is not None
    assert [operation(node) for node in plan.left.nodes].count("NativeLayerNorm") == 1
    assert [operation(node) for node in plan.right.nodes].count("NativeLayerNorm") == 1
    assert not {"NativeLayerNorm", "Addmm"} & {operation(node) for node in plan.middle.nodes}
    assert [part.value for part in plan.carried] == list(products.segment.source)
    assert arithmetic(plan, products.segment) < 1


def test_without_a_local_start_the_middle_reaches_the_source():
    class Summed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.out(x.cumsum(1).tanh())

    torch.manual_seed(0)
    model, x = Summed(), torch.randn(2, 5, 8)
    products = recorded(model, x)
    plan = plan_sites(products)
    assert plan is not None
    assert plan.right is None
    out = torch.zeros(2, 40, 40, dtype=torch.float64)
    words = fill_by_sites(plan, products.source, out, 7)
    torch.testing.assert_close(out, truth(model, x.double()), rtol=1e-12, atol=1e-12)
    assert words == "one block for each of 5 sites before a middle of 40 products"


def test_states_used_in_the_middle_as_well_are_added():
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.value, self.out = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.value(x).tanh().cumsum(1) * x)

    torch.manual_seed(0)
    model, x = Gated(), torch.randn(2, 5, 8)
    products = recorded(model, x)
    plan = plan_sites(products)
    assert plan is not None
    assert plan.right is not None
    out = torch.zeros(2, 40, 40, dtype=torch.float64)
    fill_by_sites(plan, products.source, out, 3)
    torch.testing.assert_close(out, truth(model, x.double()), rtol=1e-12, atol=1e-12)


def test_nothing_is_planned_where_no_sites_stay_apart():
    torch.manual_seed(0)
    mixing = nn.Sequential(nn.Linear(8, 8), nn.Flatten(), nn.Linear(40, 40), nn.Unflatten(1, (5, 8)))
    assert plan_sites(recorded(mixing, torch.randn(2, 5, 8), batch_dim=0)) is None
    assert plan_sites(recorded(nn.Conv1d(5, 5, 3, padding=1), torch.randn(2, 5, 8))) is None
