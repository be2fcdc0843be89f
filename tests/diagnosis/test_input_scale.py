"""The size of the input, and the slope of an activation, are named where they are the cause."""

from __future__ import annotations

import itertools
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

import stabkit
from stabkit.diagnosis import Diagnosis, examine
from stabkit.diagnosis.inputs.sizes import large_inputs


def network(act: type[nn.Module], depth: int = 3, gain: float = 1.0) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(depth):
        linear = nn.Linear(16, 16)
        nn.init.orthogonal_(linear.weight, gain)
        layers += [linear, act()]
    return nn.Sequential(*layers, nn.Linear(16, 3))


def inputs() -> Tensor:
    return torch.rand(16, 16, generator=torch.Generator().manual_seed(1))


def said(model: nn.Module, x: Tensor) -> Diagnosis:
    return examine(stabkit.trace(model, x), probes=1)


# a division of the input that was tried as the remedy and helped is carried out by apply and treat, too
@pytest.mark.parametrize(("act", "actions"), [(nn.Tanh, ["scale_input"]), (nn.Sigmoid, [])])
def test_pixels_from_0_to_255_are_named_as_the_cause(act, actions):
    found = [f for f in said(network(act), 255 * inputs()).findings if "input_size" in f.numbers]
    assert [(f.kind, [action["action"] for action in f.actions]) for f in found] == [("saturated", actions)]
    assert "the input has the size 1" in found[0].evidence
    size = float((255 * inputs()).square().mean().sqrt())
    assert f"divide the input where the data are read by {size:.3g}, its root mean square" in found[0].remedy


class Several(nn.Module):
    """An image with another of its size, a time for each sample, and a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.time = nn.Linear(16, 8), nn.Linear(16, 8), nn.Linear(1, 8)

    def forward(self, x: Tensor, other: Tensor, t: Tensor, *, mask: Tensor) -> Tensor:
        return torch.tanh(self.first(x) + self.second(other) * mask + self.time(t[:, None]))


def test_only_data_that_are_too_large_are_divided_each_by_its_own_size():
    x, other, t, mask = 255 * inputs(), 100 * inputs().flip(0), 1000 * torch.rand(16), torch.ones(16, 8)
    flow = stabkit.trace(Several(), x, other, t, kwargs={"mask": mask})
    sizes = large_inputs(flow)
    own = {name: float(data.square().mean().sqrt()) for name, data in (("0", x), ("1", other))}
    assert dict(sizes.by_name) == pytest.approx(own)
    assert sizes.size == pytest.approx(own[flow.source_name])
    call = sizes.divided(flow.forward_pass)
    assert [float(each.square().mean().sqrt()) for each in call.inputs[:2]] == pytest.approx([1.0, 1.0])
    assert call.inputs[2] is t
    assert call.kwargs["mask"] is mask
    assert all(f"{name!r} by {size:.3g}" in sizes.remedy for name, size in own.items())
    assert large_inputs(stabkit.trace(Several(), x / 255, other / 100, t, kwargs={"mask": mask})) is None


def test_weights_that_saturate_by_themselves_are_not_blamed_on_the_input():
    model = network(nn.Tanh)
    model[0].weight.data.mul_(300)
    assert not [f for f in said(model, inputs()).findings if "input_size" in f.numbers]
    assert not [f for f in said(network(nn.Tanh), inputs()).findings if "input_size" in f.numbers]


def test_a_sigmoid_that_makes_gradients_vanish_is_named_with_its_bound():
    found = said(network(nn.Sigmoid, depth=12), inputs()).findings
    assert any("sigmoid' <= 1/4" in f.evidence and f.kind == "vanishing" for f in found)
    assert not any("<=" in f.evidence for f in said(network(nn.ReLU, depth=12, gain=0.4), inputs()).findings)


@pytest.mark.parametrize("size", [1.0, 5000.0])
def test_an_input_that_saturates_a_late_tanh_through_relus_is_named(size):
    torch.manual_seed(0)
    layers = [m for _ in range(3) for m in (nn.Linear(16, 16), nn.ReLU())]
    model = nn.Sequential(*layers, nn.Linear(16, 3), nn.Tanh())
    found = [f for f in said(model, size * inputs()).findings if "input_size" in f.numbers]
    assert [f.kind for f in found] == (["saturated"] if size > 1 else [])
    assert all("divide the input where the data are read by" in f.remedy for f in found)


class Residual(nn.Module):
    """An equation for what a network makes of the time, which it is given."""

    def __init__(self, inside: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.inside = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 1)), inside

    def forward(self, t: Tensor) -> Tensor:
        t = t.clone().requires_grad_()
        u = self.net(t / self.inside - float(self.inside > 1))
        (slope,) = torch.autograd.grad(u.sum(), t, create_graph=True)
        return torch.cat([slope + 0.1 * u, u[:1] - 1])


@pytest.mark.parametrize("start", [0.0, 1980.0])
def test_inputs_of_which_derivatives_are_taken_are_scaled_inside_of_the_network(start):
    times = torch.linspace(start, start + 1000, 64)[:, None]
    told = [f for f in said(Residual(), times).findings if "input_size" in f.numbers]
    assert len(told) == 1
    assert "inside of the network, in front of its first layer" in told[0].remedy
    assert "where the data are read:" not in told[0].remedy


def test_inputs_that_are_scaled_inside_raise_nothing():
    times = torch.linspace(0, 100, 64)[:, None]
    assert not [f for f in said(Residual(50.0), times).findings if "input_size" in f.numbers]


def rows_behind(first: nn.Module, seed: int, act: type[nn.Module] = nn.ReLU) -> list[stabkit.Finding]:
    """What is said of gradients that vanish, of raw numbers from 0 to 255 behind a first layer."""
    torch.manual_seed(seed)
    layers = [m for _ in range(5) for m in (nn.Linear(64, 64), act())]
    model = nn.Sequential(first, nn.Linear(16, 64), act(), *layers, nn.Linear(64, 10))
    x, y = (255 * torch.rand(64, 16)).round(), torch.randint(10, (64,))
    found = stabkit.analyze(model, x, loss=lambda out: nn.functional.cross_entropy(out, y), spectrum="none").findings
    return [f for f in found if f.kind == "vanishing"]


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("norm", [lambda: nn.LayerNorm(16), lambda: nn.BatchNorm1d(16)])
def test_what_a_norm_of_the_input_takes_out_of_the_gradient_is_a_unit_and_no_fault(norm, seed):
    assert {f.severity for f in rows_behind(norm(), seed)} <= {"info"}


def test_a_gradient_that_vanishes_behind_a_norm_of_the_input_is_told():
    (told,) = rows_behind(nn.BatchNorm1d(16), 2, nn.Sigmoid)
    assert told.severity == "critical"
    assert "a norm takes out" not in told.evidence


def test_rows_of_norm_one_that_a_model_has_learnt_from_raise_nothing():
    torch.manual_seed(0)
    y = torch.randint(4, (128,))
    counts = torch.poisson(0.3 + 3.0 * nn.functional.one_hot(y, 4).repeat_interleave(100, 1))
    x = nn.functional.normalize(counts, dim=1)
    model = nn.Sequential(nn.Linear(400, 32), nn.ReLU(), nn.Linear(32, 4))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)

    def loss(out: Tensor) -> Tensor:
        return nn.functional.cross_entropy(out, y, label_smoothing=0.1)

    for _ in range(150):
        optimizer.zero_grad()
        loss(model(x)).backward()
        optimizer.step()
    assert float((model(x).argmax(1) == y).float().mean()) == 1.0
    found = stabkit.analyze(model, x, loss=loss, spectrum="none").findings
    assert [f for f in found if f.kind == "input_scale"] == []


class Convolutions(nn.Module):
    """A network of products with a normalised adjacency."""

    def __init__(self, adjacency: Tensor, sizes: list[int]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.adjacency = nn.Buffer(adjacency)
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in pairwise(sizes))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = nn.functional.dropout(torch.relu(self.adjacency @ layer(x)), 0.5, self.training)
        return self.adjacency @ self.layers[-1](x)


def papers() -> tuple[Tensor, Tensor, Tensor]:
    """A normalised adjacency, rows of words that sum to 1, and labels."""
    generator, y = torch.Generator().manual_seed(0), torch.arange(160) % 4
    edges = (torch.rand(160, 160, generator=generator) < torch.where(y[:, None] == y, 0.08, 0.006)).float().triu(1)
    edges = edges + edges.T + torch.eye(160)
    degrees = edges.sum(1).rsqrt()
    words = (torch.rand(160, 500, generator=generator) < 0.01 + 0.05 * (torch.arange(500) % 4 == y[:, None])).float()
    words[:, 0] = 1.0
    return degrees[:, None] * edges * degrees, words / words.sum(1, keepdim=True), y


@pytest.mark.parametrize(("rate", "severity"), [(None, "info"), (1e-2, "info"), (1e-4, "warning")])
def test_sparse_rows_of_which_a_model_learns_after_a_slow_start_are_a_fact(rate: float | None, severity: str):
    adjacency, x, y = papers()
    model = Convolutions(adjacency, [500, 16, 4])
    found = stabkit.analyze(
        model,
        x,
        loss=lambda out: nn.functional.cross_entropy(out[:40], y[:40]),
        optimizer=None if rate is None else torch.optim.Adam(model.parameters(), rate, weight_decay=5e-4),
        spectrum="none",
    ).findings
    told = [f for f in found if f.kind == "input_scale"]
    assert {f.severity for f in told} == {severity}
    assert all(("begins slowly, and learns" in f.evidence) == (severity == "info") for f in told)


def test_large_features_that_saturate_a_tanh_and_are_learnt_from_are_a_fact():
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(96) % 4
    x = 30 * (torch.randn(96, 64, generator=generator) + torch.randn(4, 64, generator=generator)[y])
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 4))
    found = stabkit.analyze(model, x, loss=lambda out: nn.functional.cross_entropy(out, y), spectrum="none").findings
    told = [f for f in found if "input_size" in f.numbers]
    assert [(f.kind, f.severity) for f in told] == [("saturated", "info")]
    assert "learns" in told[0].evidence


def test_pixels_that_leave_nothing_for_the_first_layer_are_a_warning_though_the_rest_learns_by_heart():
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (32, 64), generator=generator).float()
    y = torch.arange(32) % 10
    torch.manual_seed(0)
    widths = (64, 16, 16, 16)
    hidden = [part for a, b in itertools.pairwise(widths) for part in (nn.Linear(a, b), nn.Tanh())]
    model = nn.Sequential(*hidden, nn.Linear(16, 10))
    for layer in model[::2]:
        nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
    report = stabkit.analyze(model, x, loss=lambda out: nn.functional.cross_entropy(out, y), spectrum="none")
    told = [f for f in report.findings if "input_size" in f.numbers]
    assert [(f.kind, f.severity) for f in told] == [("saturated", "warning")]
    assert "standardise" in told[0].remedy or "divide" in told[0].remedy
