"""Sums over neighbours that nothing divides are named, and not the weights behind them."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import stabkit
from stabkit.diagnosis.depth.summing_operations import divided, summing_operations
from stabkit.diagnosis.finding import serious
from stabkit.diagnosis.measurement import measure
from stabkit.diagnosis.remedies.outer_causes import outer_causes
from stabkit.diagnosis.remedies.short_training import short_training
from stabkit.diagnosis.remedies.usual_training import RATES, adam, left_after

NODES, DEGREE = 50, 36
X = torch.randn(NODES, 8, generator=torch.Generator().manual_seed(1))
Y = torch.randint(0, 3, (NODES,), generator=torch.Generator().manual_seed(2))


def adjacency() -> Tensor:
    """Every node with the 36 nearest on a ring."""
    near = (torch.arange(NODES)[:, None] - torch.arange(NODES)) % NODES
    return ((near <= DEGREE // 2) | (near > NODES - DEGREE // 2)).float()


A = adjacency()
TARGET, SOURCE = A.nonzero().T

Gather = Callable[[Tensor], Tensor]
SUMS: dict[str, Gather] = {
    "matmul": lambda h: A @ h,
    "einsum": lambda h: torch.einsum("ij,jk->ik", A, h),
    "sparse_mm": lambda h: torch.sparse.mm(A.to_sparse(), h),
    "index_add": lambda h: torch.zeros_like(h).index_add(0, TARGET, h[SOURCE]),
    "index_add_": lambda h: torch.zeros_like(h).index_add_(0, TARGET, h[SOURCE]),
    "scatter_add": lambda h: torch.zeros_like(h).scatter_add(0, TARGET[:, None].expand(-1, h.shape[1]), h[SOURCE]),
    "sum": lambda h: h + h.sum(0, keepdim=True),
}


class Graph(nn.Module):
    """Layers that gather from neighbours."""

    def __init__(self, gather: Gather, residual: bool = True, gain: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head = nn.Linear(8, 32), nn.Linear(32, 3)
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(4))
        self.gather, self.residual = gather, residual
        for layer in self.layers:
            layer.weight.data.mul_(gain)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        for layer in self.layers:
            made = torch.relu(layer(self.gather(h)))
            h = h + made if self.residual else made
        return self.head(h)


def loss(out: Tensor) -> Tensor:
    return functional.cross_entropy(out, Y)


def found(model: nn.Module, with_loss: bool = True) -> list[stabkit.Finding]:
    flow = stabkit.trace(model, X)
    return stabkit.diagnose(flow.following(loss), loss) if with_loss else stabkit.diagnose(flow)


@pytest.mark.parametrize("name", SUMS)
def test_the_sum_is_named_with_its_terms(name):
    told = [f for f in found(Graph(SUMS[name])) if serious(f) and f.kind != "mixed_samples"]
    first = told[0]
    assert first.kind == "exploding"
    terms = NODES if name == "sum" else DEGREE
    assert f"what makes it grow is {name.rstrip('_')} in the code of the model (test_summing" in first.evidence
    assert f"which runs 4 times and sums over {terms} terms on average, and divides by nothing" in first.evidence
    assert "growth +" in first.evidence
    assert (
        "take the mean" in first.remedy
        if name == "sum"
        else "divide the sum by the number of its terms" in first.remedy
    )
    assert not first.actions  # no weight is to blame


def test_it_is_named_without_a_loss_and_in_the_module_that_runs_it():
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(32, 32)

        def forward(self, h: Tensor, edges: Tensor) -> Tensor:
            return h + torch.relu(self.linear(edges @ h))

    class Given(nn.Module):
        """A network that is given the adjacency beside its states."""

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.layers = nn.Linear(8, 32), nn.ModuleList(Layer() for _ in range(4))

        def forward(self, x: Tensor, edges: Tensor) -> Tensor:
            h = self.first(x)
            for layer in self.layers:
                h = layer(h, edges)
            return h

    told = [f for f in stabkit.diagnose(stabkit.trace(Given(), X, A)) if serious(f)]
    assert (told[0].kind, told[0].module_path) == ("exploding", "layers.0")
    assert "what makes it grow is matmul in layers.0" in told[0].evidence


@pytest.mark.parametrize(
    "gather",
    [
        lambda h: (A / A.sum(1, keepdim=True)) @ h,
        lambda h: (A @ h) / A.sum(1, keepdim=True),
        lambda h: torch.zeros_like(h).index_add(0, TARGET, h[SOURCE] / DEGREE),
        lambda h: h.sum(0, keepdim=True) / NODES + h,
        lambda h: torch.softmax(h @ h.T, 1) @ h,
    ],
)
def test_what_is_divided_is_no_sum_to_name(gather):
    assert not [f for f in found(Graph(gather)) if "what makes it grow" in f.evidence]


def test_weights_that_are_too_large_are_to_blame_themselves():
    model = Graph(lambda h: (A / A.sum(1, keepdim=True)) @ h, residual=False, gain=20.0)
    told = found(model)
    (first,) = [f for f in told if serious(f)]
    assert (first.kind, len(first.actions)) == ("exploding", 6)
    assert "all 6 matrices were started large" in first.evidence
    assert not [f for f in told if "what makes it grow" in f.evidence]


def test_a_cure_that_adam_speaks_for_is_told_with_steps_of_adam(monkeypatch):
    """Where plain SGD gains nothing by it."""
    monkeypatch.setattr("stabkit.diagnosis.examination.helps", lambda *_: False)
    model = Graph(SUMS["matmul"])
    flow = stabkit.trace(model, X)
    told = next(f for f in stabkit.diagnose(flow, loss) if "what makes it grow" in f.evidence)
    (within,) = [cause.within for cause in outer_causes(flow, measure(flow, loss))]
    updates = [adam(rate) for rate in RATES]
    left = left_after(flow.forward_pass, loss, updates), left_after(flow.forward_pass, loss, updates, within=within)
    with divided(summing_operations(flow.forward_pass))(), torch.no_grad():
        begins = float(loss(model(X)))
    first = float(loss(model(X)).detach())
    said = f"from {first:.3g} to {left[0] * first:.3g} as it is, from {begins:.3g} to {left[1] * begins:.3g} treated"
    assert f"20 steps of Adam take the loss {said}" in re.sub(r" \(rate 0.0?01\)", "", told.evidence)
    assert "plain SGD" not in told.evidence


@pytest.mark.parametrize("name", ["matmul", "index_add", "scatter_add", "sum"])
def test_divided_sums_are_means(name):
    model = Graph(SUMS[name])
    flow = stabkit.trace(model, X)
    sums = summing_operations(flow.forward_pass)
    assert [each.name for each in sums] == [name]
    means = {"sum": lambda h: h + h.mean(0, keepdim=True)}.get(name, lambda h: (A / DEGREE) @ h)
    with divided(sums)():
        treated = model(X)
    assert torch.allclose(treated, Graph(means)(X), atol=1e-4)
    assert short_training(flow, loss, within=divided(sums)).last < short_training(flow, loss).last


class Repelled(nn.Module):
    """Points that move along their differences by what a layer makes of the squares of these, summed over points."""

    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.pairs = nn.ModuleList(
            [nn.Sequential(nn.Linear(1, 16), nn.SiLU(), nn.Linear(16, 1)) for _ in range(layers)]
        )

    def forward(self, x: Tensor) -> Tensor:
        for pair in self.pairs:
            apart = x[:, :, None] - x[:, None]
            x = x + (apart * pair(apart.square().mean(-1, keepdim=True))).sum(2)
        return x


def test_a_mean_that_leaves_the_loss_out_of_reach_is_no_remedy():
    """All is finite with a mean, and no usual step brings the loss down from there."""
    x = 3 * torch.randn(4, 20, 3, generator=torch.Generator().manual_seed(1))
    target = torch.randn(4, 20, 3, generator=torch.Generator().manual_seed(2))
    flow = stabkit.trace(Repelled(), x, check=False)
    found = stabkit.diagnose(flow, lambda out: (out - target).square().mean())
    assert [f.kind for f in found if serious(f)] == ["non_finite"]
    assert "take the mean" not in found[0].remedy


class Twice(nn.Module):
    """Sums over neighbours, in two lines."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.other = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        x = torch.relu(adjacency @ self.one(x))
        return torch.relu(self.other(adjacency @ x))


def test_the_remedy_names_every_sum_that_was_divided_when_it_was_tried():
    x = torch.randn(40, 16, generator=torch.Generator().manual_seed(1))
    flow = stabkit.trace(Twice(), x, torch.ones(40, 40), check=False, batch_dim=None)
    (remedy,) = outer_causes(flow, measure(flow))
    assert remedy.text.count("divide the sum by the number of its terms") == 2


class OfData(nn.Module):
    """Raw data times a weight, in each of the ways in which it is written without a layer."""

    def __init__(self, made: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.w, self.made = nn.Parameter(torch.randn(8, 3)), made

    def forward(self, x: Tensor) -> Tensor:
        return 10 * x @ self.made(self.w)


WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "parameter": lambda w: w,
    "view": lambda w: w.T[:2].T,
    "masked": lambda w: w * (torch.arange(3) < 2),
    "softplus": functional.softplus,
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_data_times_a_weight_are_no_sum_of_states(name):
    assert summing_operations(stabkit.trace(OfData(WEIGHTS[name]), X).forward_pass) == []


def test_data_times_a_scale_for_each_feature_are_a_state():
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(8))

        def forward(self, x: Tensor) -> Tensor:
            return A @ ((x + 1) * self.scale)

    assert [each.name for each in summing_operations(stabkit.trace(Scaled(), X).forward_pass)] == ["matmul"]


def test_the_trained_product_of_the_same_line_is_left_as_it_is():
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.v = nn.Linear(8, 32), nn.Parameter(torch.randn(32, 3) / 32**0.5)

        def forward(self, x: Tensor) -> Tensor:
            return A @ self.first(x) @ self.v

    model = Both()
    sums = summing_operations(stabkit.trace(model, X).forward_pass)
    assert len(sums) == 1
    with divided(sums)():
        treated = model(X)
    assert torch.allclose(treated, model(X) / DEGREE, atol=1e-5)
