from __future__ import annotations

import math
from dataclasses import FrozenInstanceError

import pytest
import torch
from torch import Tensor, nn

import stabkit
from stabkit.diagnosis import FINDINGS, Thresholds, examine
from tests.diagnosis import networks
from tests.diagnosis.cases import LOCAL, biased, rotations, scaled
from tests.diagnosis.confusion import serious


def told(diagnosis: object) -> list[tuple[str, str, tuple[int, ...], str]]:
    return [(f.kind, f.severity, f.steps, f.module_path) for f in serious(diagnosis)]


def faulty(name: str) -> networks.Network:
    return next(case for case in LOCAL if case.name == name).build(0)[0]


def test_findings_are_frozen_records_of_known_kinds():
    found = stabkit.diagnose(faulty("mlp weight x20").flow())
    assert found[0].kind in FINDINGS
    assert found[0].numbers["weight_deviation:5.fc.weight"] == pytest.approx(math.log(20), abs=0.1)
    assert 0.9 < found[0].confidence <= 1.0
    with pytest.raises(FrozenInstanceError):
        found[0].kind = "fine"


@pytest.mark.parametrize("name", ["mlp weight x0.05", "residual branch x20", "transformer qkv x20"])
def test_the_order_of_the_batch_changes_nothing(name):
    network = faulty(name)
    order = torch.randperm(len(network.inputs[0]), generator=torch.Generator().manual_seed(3))
    shuffled = stabkit.trace(network.model, network.inputs[0][order])
    assert told(examine(network.flow())) == told(examine(shuffled))


@pytest.mark.parametrize("name", ["mlp weight x20", "residual branch zero", "cnn weight x20", "transformer ffn x20"])
@pytest.mark.parametrize("healthy", [False, True])
def test_bfloat16_finds_what_float32_finds(name, healthy):
    network = faulty(name)
    if healthy:
        network = next(case for case in LOCAL if case.name == name).make(0)
    inputs = tuple(x.bfloat16() if x.is_floating_point() else x for x in network.inputs)
    single = examine(network.flow())
    half = examine(stabkit.trace(network.model.bfloat16(), *inputs))
    assert told(half) == told(single)
    assert half.verdict.name == single.verdict.name
    assert half.verdict.growth == pytest.approx(single.verdict.growth, abs=0.1)


def test_a_fault_out_of_range_is_explained_by_its_block_alone():
    network = networks.mlp(0)
    scaled(1e5)(network, "4")
    diagnosis = examine(network.flow())
    assert diagnosis.verdict.name == "exploding"
    assert told(diagnosis) == [("exploding", "critical", (4,), "4")]


def test_a_power_law_is_no_explosion():
    class Blend(nn.Module):
        """x + f(x) / depth: log growth goes with the log of depth."""

        def __init__(self, gain: float) -> None:
            super().__init__()
            self.f, self.gain = nn.Linear(8, 8, bias=False), gain
            nn.init.eye_(self.f.weight)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.gain * self.f(x)

    depth = 60
    power = nn.Sequential(*[Blend((1 + 1 / (i + 0.5)) ** 2 - 1) for i in range(depth)])
    steady = nn.Sequential(*[Blend(math.exp(9.4 / depth) - 1) for i in range(depth)])
    x = torch.randn(4, 8)
    first, second = examine(stabkit.trace(power, x)), examine(stabkit.trace(steady, x))
    assert min(first.verdict.growth, second.verdict.growth) > math.log(1e3)
    assert (first.verdict.name, second.verdict.name) == ("drift", "exploding")
    assert "power of depth" in first.verdict.summary
    assert not [f for f in first.findings if f.kind == "exploding" and len(f.steps) > 1]


def test_a_step_too_large_for_euler_is_told_from_a_system_that_grows():
    turning = examine(rotations(0.9)(0).flow())
    assert "unstable_step" in [finding.kind for finding in turning.findings]
    torch.manual_seed(0)
    growing = nn.Sequential(*[networks.Residual(16, nn.ReLU(), False, 1.0) for _ in range(20)])
    with torch.no_grad():
        for block in growing:
            block.fc1.weight.copy_(torch.eye(16))
            block.fc2.weight.copy_(0.6 * torch.eye(16))
            block.fc1.bias.fill_(5.0)
            block.fc2.bias.fill_(0.0)
    diagnosis = examine(stabkit.trace(growing, torch.rand(4, 16)))
    assert [finding.kind for finding in diagnosis.findings] == ["exploding"]


def test_branches_that_extinguish_the_state_are_overdamped():
    torch.manual_seed(0)

    class Sink(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.Linear(12, 12, bias=False)
            self.f.weight.data = -0.9 * torch.eye(12) + 0.02 * torch.randn(12, 12)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.f(x)

    diagnosis = examine(stabkit.trace(nn.Sequential(*[Sink() for _ in range(8)]), torch.randn(4, 12)))
    assert diagnosis.verdict.name == "vanishing"
    assert {"vanishing", "overdamped"} == {finding.kind for finding in diagnosis.findings}


def test_gradients_that_no_loss_scale_brings_into_half_precision():
    torch.manual_seed(0)
    layers = [nn.Linear(12, 12, bias=False) for _ in range(24)]
    for layer in layers:
        nn.init.orthogonal_(layer.weight, gain=0.5)
    model = nn.Sequential(*layers)
    x = torch.randn(4, 12)
    single = {f.kind for f in examine(stabkit.trace(model, x)).findings}
    half = {f.kind for f in examine(stabkit.trace(model.half(), x.half())).findings}
    assert half - single == {"precision_loss"}


def test_chaos_needs_expansion_bounds_and_parting():
    kinds = {}
    for gain in (0.8, 1.0, 2.5):
        diagnosis = examine(networks.recurrent(0, width=64, steps=60, gain=gain).flow())
        kinds[gain] = (diagnosis.verdict.name, "chaotic" in [f.kind for f in diagnosis.findings])
    assert kinds[2.5] == ("chaotic", True)
    assert not kinds[0.8][1]
    assert not kinds[1.0][1]


def test_layers_may_be_chaotic_only_in_number():
    found = {}
    for depth in (12, 26):
        network = networks.mlp(0, width=96, depth=depth, act=nn.Tanh)
        for block in network.blocks:
            network.model.get_submodule(block).fc.weight.data.mul_(2.2)
        found[depth] = [f.kind for f in examine(network.flow()).findings]
    assert "chaotic" in found[26]
    assert "chaotic" not in found[12]


def test_tokens_that_become_one_are_a_collapse():
    uniform = nn.Sequential()
    for index in range(4):
        uniform.add_module(str(index), Averaging())
    diagnosis = examine(stabkit.trace(uniform, torch.randn(3, 6, 8)))
    assert "rank_collapse" in [finding.kind for finding in diagnosis.findings]


class Averaging(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Linear(8, 8, bias=False)
        nn.init.orthogonal_(self.value.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.value(0.05 * x + 0.95 * x.mean(1, keepdim=True))


def test_infinite_derivatives_of_finite_states_are_found():
    class Root(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + (0 * x).square().sqrt()

    model = nn.Sequential(nn.Linear(4, 4), Root(), nn.Linear(4, 4))
    diagnosis = examine(stabkit.trace(model, torch.randn(6, 4)), lambda out: out.sum())
    assert diagnosis.verdict.name == "non-finite"
    assert diagnosis.findings[0].module_path == "1"


def test_a_loss_in_other_units_or_none_agree_on_dead_layers():
    network = networks.mlp(2)
    biased(-10.0)(network, "6")
    flow = network.flow()
    answers = [told(examine(flow, loss)) for loss in (None, lambda out: 1e6 * (out - 1).square().sum())]
    assert answers[0] == answers[1] == [("dead", "critical", (6,), "6")]


def test_every_threshold_is_printed():
    limits = Thresholds().to_dict()
    assert {"stable", "explosion", "rate_law", "outlier", "dead", "saturated", "collapsed", "homogeneous"} <= set(
        limits
    )
    assert all(math.isfinite(value) for value in limits.values())


def test_health_of_untrained_library_models():
    torchvision = pytest.importorskip("torchvision")
    for training in (False, True):
        torch.manual_seed(0)
        model = torchvision.models.resnet18().train(training)
        assert not serious(examine(stabkit.trace(model, torch.randn(4, 3, 32, 32)), probes=1))


def test_an_input_that_is_not_finite_is_named_and_no_step_is_blamed():
    x = torch.ones(3, 4)
    x[1, 2] = math.nan
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    found = examine(stabkit.trace(model, x))
    assert found.verdict.name == "non-finite"
    (finding,) = found.findings
    assert (finding.kind, finding.severity) == ("non_finite", "critical")
    assert "before the first step" in finding.evidence
    assert "sample 1 of 3" in finding.evidence
    assert "look at the data" in finding.remedy


def test_of_layers_that_tie_the_first_is_named_whatever_the_units_of_the_loss():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(16, 16, bias=False) for _ in range(10)))
    for layer in model:
        nn.init.orthogonal_(layer.weight, 3.0)
    flow = stabkit.trace(model, torch.randn(6, 16))
    for units in (1e-6, 1.0, 1e6, 3.7):

        def loss(out: torch.Tensor, units: float = units) -> torch.Tensor:
            return units * out.square().mean()

        (found,) = (f for f in examine(flow, loss).findings if f.severity == "critical")
        assert found.module_path == flow.steps[found.steps[0]].module_path
