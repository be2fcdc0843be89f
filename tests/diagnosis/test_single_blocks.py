"""Faults of one block that no size of a weight shows, and faults that show elsewhere than where they are."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import stabkit
from stabkit.diagnosis import Diagnosis, Thresholds, apply, examine, measure
from stabkit.diagnosis.blocks.weight_faults import weight_faults
from stabkit.diagnosis.blocks.weights import log_rank, role_of
from tests.diagnosis import networks
from tests.diagnosis.confusion import serious


def first(diagnosis: Diagnosis) -> tuple[str, str]:
    found = serious(diagnosis)
    return (found[0].kind, found[0].module_path) if found else ("none", "")


def tanh_layers(depth: int = 8, width: int = 48, act: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(depth):
        linear = nn.Linear(width, width)
        nn.init.orthogonal_(linear.weight, 1.0 if act is nn.Tanh else math.sqrt(2.0))
        nn.init.zeros_(linear.bias)
        layers += [linear, act()]
    return nn.Sequential(*layers)


@pytest.mark.parametrize("place", [0, 4, 7])
@pytest.mark.parametrize("by", [10.0, -8.0])
def test_the_step_of_one_block_behind_norms_that_decays_over_depth(place, by):
    network = networks.residual(0, depth=8)
    block = network.blocks[place]
    network.model.get_submodule(block).scale *= by
    found = serious(examine(network.flow()))
    assert found[0].module_path == block
    assert found[0].steps == (place + 1,)


def test_a_dropped_skip_is_found_and_put_back():
    network = networks.residual(0, depth=8)
    block = network.model.get_submodule(network.blocks[4])
    block.forward = lambda x: block.scale * block.fc2(block.act(block.fc1(block.norm(x))))
    (found,) = serious(examine(network.flow()))
    assert (found.module_path, found.steps, found.numbers["missing"]) == (network.blocks[4], (5,), 1.0)
    assert "adds 1 branch less to a skip" in found.evidence
    assert apply(network.model, found) == 1
    assert not serious(examine(network.flow()))


@pytest.mark.parametrize("rank", [1, 3])
def test_a_matrix_that_lost_its_rank_is_found_and_drawn_anew(rank):
    network = networks.transformer(0, depth=6)
    name, weight = next((n, p) for n, p in network.model.named_parameters() if "3" in n and p.dim() == 2)
    with torch.no_grad():
        low = torch.randn(weight.shape[0], rank) @ torch.randn(rank, weight.shape[1])
        weight.copy_(low * weight.norm() / low.norm())
    found = serious(examine(network.flow()))
    assert [f.kind for f in found] == ["rank_collapse"]
    assert name.startswith(f"{found[0].module_path}.")
    assert name in found[0].remedy
    apply(network.model, found[0])
    assert not serious(examine(network.flow()))


def test_effective_ranks_do_not_depend_on_size_or_orientation():
    torch.manual_seed(0)
    W = torch.randn(300, 400)
    assert log_rank(1e-12 * W) == pytest.approx(log_rank(W), abs=1e-5)
    assert log_rank(W.T) == pytest.approx(log_rank(W), abs=1e-12)
    # estimated beyond a side of 256: E |W W^T|_F^2 = mn(m + n + 1), so the share is n / (m + n + 1)
    assert log_rank(W) == pytest.approx(math.log(400 / 701), abs=0.1)
    assert math.isnan(log_rank(torch.ones(1, 8)))


@pytest.mark.parametrize(("act", "kind"), [(nn.Tanh, "saturated"), (nn.SiLU, "vanishing"), (nn.ReLU, "dead")])
def test_a_bias_is_named_where_the_activation_behind_it_shows_it(act, kind):
    model, x = tanh_layers(act=act), torch.randn(8, 48)
    if act is nn.SiLU:
        for layer in model[::2]:
            layer.weight.data.mul_(1.2)
    model[6].bias.data.fill_(-10.0)
    diagnosis = examine(stabkit.trace(model, x))
    assert first(diagnosis) == (kind, "6")
    assert serious(diagnosis)[0].steps == (6, 7)
    assert "6.bias" in serious(diagnosis)[0].remedy
    apply(model, serious(diagnosis)[0])
    assert not serious(examine(stabkit.trace(model, x)))


def test_a_bias_in_front_of_a_batch_norm():
    torch.manual_seed(0)
    model = nn.Sequential(*[m for _ in range(6) for m in (nn.Linear(48, 48), nn.BatchNorm1d(48), nn.ReLU())])
    for layer in model[::3]:
        nn.init.kaiming_normal_(layer.weight)
        nn.init.zeros_(layer.bias)
    for _ in range(40):
        model(torch.randn(64, 48))  # statistics of before the bias went wrong
    model.eval()[6].bias.data.fill_(-10.0)
    assert first(examine(stabkit.trace(model, torch.randn(8, 48)))) == ("dead", "6")


def test_batch_norms_without_statistics_are_judged_with_those_of_the_batch():
    torch.manual_seed(0)
    model = nn.Sequential(*[m for _ in range(12) for m in (nn.Linear(24, 24), nn.BatchNorm1d(24), nn.Tanh())]).eval()
    for layer in model[::3]:
        layer.weight.data.mul_(0.5)  # far too small, which only a norm that normalises takes out
    x = torch.randn(64, 24)
    kept = {name: buffer.clone() for name, buffer in model.named_buffers()}
    diagnosis = examine(stabkit.trace(model, x))
    assert diagnosis.verdict.name in ("stable", "drift")
    assert not serious(diagnosis)
    assert all(torch.equal(buffer, kept[name]) for name, buffer in model.named_buffers())
    model(x)
    for norm in model[1::3]:
        norm.num_batches_tracked.fill_(1)  # statistics that were collected are believed, whatever they are
    assert examine(stabkit.trace(model, x)).verdict.name == "vanishing"
    few = nn.Sequential(*[nn.BatchNorm1d(4) for _ in range(3)]).eval()
    assert examine(stabkit.trace(few, torch.randn(1, 4))).verdict.name == "not judged"


class Branches(nn.Module):
    """Three layers that are alive at once: one step."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right, self.head = (nn.Linear(24, 24) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        return self.head((self.left(x).relu() * self.right(x).relu()) + self.left(x))


@pytest.mark.parametrize("name", ["left", "right"])
def test_within_a_step_of_several_modules_the_one_with_the_weight_is_named(name):
    torch.manual_seed(0)
    model = Branches()
    model.get_submodule(name).weight.data.mul_(50.0)
    found = serious(examine(stabkit.trace(model, torch.randn(8, 24))))
    assert found[0].module_path == name
    model.get_submodule(name).weight.data.fill_(math.nan)
    found = serious(examine(stabkit.trace(model, torch.randn(8, 24), check=False)))
    assert (found[0].kind, found[0].module_path) == ("non_finite", name)


def test_a_sample_that_nothing_comes_back_to_is_zero_and_not_broken():
    model, x = tanh_layers(act=nn.ReLU), torch.randn(6, 48)
    with torch.no_grad():
        # every other sample reaches all units of this layer, the rest none
        signs = torch.tensor([1.0, -1.0]).repeat(3).unsqueeze(1).expand(6, 48)
        model[6].weight.copy_(torch.linalg.lstsq(model[:6](x), signs).solution.T)
    found = measure(stabkit.trace(model, x))
    silent = torch.isneginf(torch.from_numpy(found.log_gradients[0])).numpy()
    assert silent.tolist() == [False, True] * 12
    assert (found.growth[7][silent] == -math.inf).all()
    assert all(math.isfinite(value) for value in found.growth[:6].flatten())  # measured by new cotangents
    assert "non_finite" not in [f.kind for f in stabkit.diagnose(stabkit.trace(model, x))]


def test_a_loss_that_sees_one_sample_only():
    found = stabkit.diagnose(stabkit.trace(tanh_layers(), torch.randn(4, 48)), lambda out: out[0].sum())
    assert found == []


def test_an_overflow_is_blamed_on_the_weight_that_drives_it_there():
    model = tanh_layers(act=nn.ReLU)
    model[4].weight.data.mul_(2e3)
    model[8].weight.data.mul_(2.0)
    for layer in model[10:16:2]:
        layer.weight.data.mul_(2.5)
    flow = stabkit.trace(model.half(), 8 * torch.randn(4, 48).half(), check=False)
    (found,) = stabkit.diagnose(flow)
    assert (found.kind, found.module_path) == ("non_finite", "4")
    assert "multiply 4.weight by" in found.remedy


def test_what_underflows_is_no_dead_unit():
    model = tanh_layers(depth=12, act=nn.ReLU)
    for layer in model[::2]:
        layer.weight.data.mul_(0.2)
    found = stabkit.diagnose(stabkit.trace(model.half(), torch.randn(4, 48).half(), check=False))
    assert {f.kind for f in found} == {"vanishing", "precision_loss"}
    lost = next(f for f in found if f.kind == "precision_loss")
    assert "less than 6.1e-05, the smallest normal number of float16" in lost.evidence
    assert len(lost.steps) > 3


def test_a_stretch_goes_before_what_the_dtype_cannot_hold():
    model = tanh_layers(depth=16)
    for layer in model[::2]:
        layer.weight.data.mul_(1e-6)
    diagnosis = examine(stabkit.trace(model, torch.randn(4, 48)))
    (found,) = serious(diagnosis)
    assert (found.kind, found.steps) == ("vanishing", tuple(range(32)))
    (lost,) = (f for f in diagnosis.findings if "range" in f.numbers)
    assert "it is gone with the remedy of vanishing" in lost.evidence
    assert 1 <= len(lost.steps) < 20  # those whose gradients are out of reach of the rest, not all


def test_chaos_from_the_zero_state_of_a_recurrent_network():
    torch.manual_seed(0)
    cell = nn.RNN(8, 96)
    nn.init.normal_(cell.weight_hh_l0, 0.0, 3.0 / math.sqrt(96))
    diagnosis = examine(stabkit.recurrent_flow(cell, 0.1 * torch.randn(50, 4, 8)))
    assert diagnosis.verdict.name == "chaotic"
    assert diagnosis.findings[0].kind == "chaotic"


def test_layers_of_a_block_are_compared_with_the_same_layers_of_others():
    assert role_of("blocks.3.mlp.0.weight") != role_of("blocks.3.mlp.2.weight")
    assert role_of("0.weight") == role_of("2.weight")


class Stencil(nn.Module):
    """A reaction on a grid beside a Laplacian whose stencil is held fixed: 1 / dx^2 is large and meant to be."""

    def __init__(self, fixed: bool) -> None:
        super().__init__()
        self.laplace = nn.Conv1d(1, 1, 3, padding=1, padding_mode="circular", bias=False)
        self.laplace.weight = nn.Parameter(torch.tensor([[[400.0, -800.0, 400.0]]]), requires_grad=not fixed)
        self.lift, self.drop = nn.Conv1d(1, 4, 1), nn.Conv1d(4, 1, 1)

    def forward(self, u: Tensor) -> Tensor:
        return u + 0.5e-3 * self.laplace(u) + 0.01 * self.drop(torch.tanh(self.lift(u)))


@pytest.mark.parametrize("fixed", [True, False])
def test_a_stencil_that_is_held_fixed_has_no_size_to_expect(fixed):
    torch.manual_seed(0)
    head = [nn.Conv1d(1, 1, 1) for _ in range(4)]
    model = nn.Sequential(*head, *[Stencil(fixed) for _ in range(1)], nn.Conv1d(1, 1, 1)).double()
    flow = stabkit.trace(model, torch.randn(3, 1, 24, dtype=torch.float64))
    steps = measure(flow).steps
    named = {fault.weight.path for fault in weight_faults(steps, Thresholds())}
    assert ("4.laplace.weight" in named) != fixed


class Sine(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sin(x)


@pytest.mark.parametrize("steps", [0, 400])
@pytest.mark.parametrize("frequency", [10.0, 15.0])
def test_a_large_first_weight_that_a_network_learns_with_is_a_fact(frequency: float, steps: int):
    x = torch.linspace(-1, 1, 200)[:, None]
    y = torch.sin(frequency * x)

    def loss(out: torch.Tensor) -> torch.Tensor:
        return nn.functional.mse_loss(out, y)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 32), Sine(), nn.Linear(32, 32), Sine(), nn.Linear(32, 1))
    with torch.no_grad():
        model[0].weight.mul_(15.0)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model(x)).backward()
        optimizer.step()
    found = stabkit.analyze(model, x, loss=loss, spectrum="none").findings
    (told,) = (f for f in found if f.kind == "exploding")
    assert all(f.severity == "info" for f in found)
    assert ("far more is left with what takes it away" in told.evidence) == bool(steps)
    assert ("end no lower" in told.evidence) == (not steps)
