"""Stock models as they are made, and networks that learned, raise nothing; what is said of them holds no nonsense."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional

import stabkit
from stabkit.diagnosis import Thresholds, examine, measure
from stabkit.diagnosis.depth.findings import transient
from stabkit.diagnosis.finding import serious
from stabkit.tracing import trace
from tests.diagnosis.further_learners import TASKS as FURTHER
from tests.diagnosis.learners import TASKS
from tests.diagnosis.silence import MODES, alarms, named, row, stock
from tests.diagnosis.soundness import unsound
from tests.diagnosis.trained import trained

STOCK = stock()
FAST = [
    *("torch.nn: Transformer", "torch.nn: TransformerEncoder", "torch.nn: RNN", "torch.nn: GRU, bidirectional"),
    *("architectures: odeint, rk4", "architectures: reversible pairs in a loop", "architectures: U-Net"),
    *("transformers: bert", "transformers: longformer", "transformers: gpt2", "transformers: llama"),
    *("transformers: speech_to_text", "transformers: deit", "transformers: wav2vec2"),
    *("timm: test_vit", "timm: test_convnext", "timm: test_efficientnet", "torchvision: shufflenet_v2_x0_5"),
]
LEARNED = ["mlp tanh", "highway", "mixture of experts, best two", "fixed point", "normalising flow", "wine"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", FAST)
def test_a_stock_model_raises_nothing(name: str, mode: str):
    (subject,) = [each for each in STOCK if named(each) == name]
    said = row(subject, mode, 600)
    assert not said.error
    assert not alarms(vars(said))
    assert not said.unsound


@pytest.mark.zoo
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("subject", STOCK, ids=named)
def test_the_whole_zoo_raises_nothing(subject, mode: str):
    said = row(subject, mode, 60)
    if said.error.startswith("TimeUpError"):
        pytest.skip(said.error)
    assert not said.error
    assert not alarms(vars(said))
    assert not said.unsound


def quiet(name: str) -> None:
    task = (TASKS | FURTHER)[name]
    _, score, fresh, after = trained(task)
    assert score >= task.least
    assert {f.kind for f in fresh.findings if serious(f)} == ({task.fresh} if task.fresh else set())
    assert not [f for f in after.findings if serious(f)]
    assert not unsound(fresh)
    assert not unsound(after)


@pytest.mark.parametrize("name", LEARNED)
def test_a_network_that_learns_raises_nothing_fresh_or_trained(name: str):
    quiet(name)


@pytest.mark.zoo
@pytest.mark.parametrize("name", sorted((TASKS | FURTHER).keys() - LEARNED))
def test_every_kind_of_network_that_learns_raises_nothing(name: str):
    quiet(name)


@pytest.mark.parametrize(("units", "said"), [(3, False), (16, True)])
def test_a_few_flat_entries_are_chance(units: int, said: bool):
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(units, units), nn.Tanh()) for _ in range(4)]
    with torch.no_grad():
        blocks[2][0].bias.copy_(torch.tensor([9.0] * (units - 1) + [0.0]))  # all but one unit
    found = examine(trace(nn.Sequential(*blocks), torch.randn(2, units))).findings
    assert ("saturated" in {f.kind for f in found if serious(f)}) is said


def test_an_activation_of_one_number_is_no_layer_of_units():
    class Timed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f, self.rate = nn.Linear(4, 4), nn.Parameter(torch.tensor(0.3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(3):
                x = x + self.f(x) * torch.tanh(self.rate * x.mean())
            return x

    torch.manual_seed(0)
    flow = stabkit.trace(Timed(), torch.randn(2, 4), batch_dim=None)
    assert not [a for step in examine(flow).measurement.steps for a in step.activities]


class Solver(nn.Module):
    """Keeps its stages in memory that it sets aside first; what is there before they are written is anything."""

    def __init__(self, left: float, width: int = 6) -> None:
        super().__init__()
        self.f = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(4))
        self.left = left

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        stages = torch.full((*x.shape, 4), self.left)
        stages[..., 0] = self.f[0](x)
        for i in range(1, 4):
            stages[..., i] = self.f[i](x + 0.5 * stages[..., :i].sum(-1))
        return x + 0.1 * stages.sum(-1)


def test_memory_that_is_not_yet_written_is_no_large_state():
    torch.manual_seed(0)
    model, x = Solver(3e37), torch.randn(4, 6)
    assert any(bool((state.flatten() > 1e37).any()) for state in trace(model, x).states)
    assert not [f for f in examine(trace(model, x)).findings if serious(f)]
    large = nn.Sequential(*(nn.Linear(6, 6, bias=False) for _ in range(4)))
    for layer in large:
        nn.init.orthogonal_(layer.weight, 1.0)
    found = examine(trace(large, 1e36 * x)).findings
    assert "precision_loss" in {f.kind for f in found if serious(f)}


class Standardised(nn.Conv2d):
    """A convolution of standardised weights with a gain per channel, as in NFNets."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width, 3, padding=1)
        self.gain = nn.Parameter(torch.full((width, 1, 1, 1), 1.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = functional.layer_norm(self.weight, self.weight.shape[1:]) * (self.weight[0].numel() ** -0.5)
        return functional.conv2d(x, self.gain * weight, self.bias, padding=1)


def test_gains_that_start_alike_make_no_copies_of_units():
    torch.manual_seed(0)
    model = nn.Sequential(*(Standardised(8) for _ in range(4)))
    assert not [f for f in examine(trace(model, torch.randn(2, 8, 8, 8))).findings if serious(f)]
    with torch.no_grad():
        for parameter in model[1].parameters():
            parameter.fill_(0.1)
    model[1].forward = lambda x: nn.Conv2d.forward(model[1], x)
    found = examine(trace(model, torch.randn(2, 8, 8, 8))).findings
    assert "copied_units" in {f.kind for f in found if serious(f)}


def deep_batch_normed(depth: int = 70, width: int = 32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU()) for _ in range(depth))
    )


def test_growth_through_batch_norms_is_judged_once_they_have_statistics_of_their_own():
    model, x = deep_batch_normed(), torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    training = examine(trace(model.train(), x))
    assert training.verdict.name == "drift"
    assert "that of batch norms" in training.verdict.summary
    assert not [f for f in training.findings if serious(f)]
    with torch.no_grad():
        for _ in range(60):
            model(x)
    model.eval()[35][1].running_var.mul_(1e-8)  # statistics that are not those of what comes
    assert [f.kind for f in examine(trace(model, x)).findings if serious(f)]


class Mixer(nn.Module):
    """A block of ConvMixer (Trockman and Kolter, 2022): batch norms behind a depthwise and a pointwise convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.f = nn.Sequential(depthwise, nn.GELU(), nn.BatchNorm2d(width))
        self.g = nn.Sequential(nn.Conv2d(width, width, 1), nn.GELU(), nn.BatchNorm2d(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.g(x + self.f(x))


def test_neighbours_that_batch_norms_part_are_no_chaos():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 64, 1), *(Mixer(64) for _ in range(24)))
    found = examine(trace(model.eval(), torch.randn(4, 3, 6, 6)))  # with the statistics of this batch
    assert found.verdict.growth > Thresholds().stable
    assert not [f for f in found.findings if serious(f)]


def test_statistics_of_two_values_judge_nothing():
    model = deep_batch_normed(12)
    said = examine(trace(model.train(), torch.randn(2, 32)))
    assert said.verdict.name == "not judged"
    assert "at least 8 values per channel" in said.verdict.summary
    assert examine(trace(model.train(), torch.randn(16, 32))).verdict.name != "not judged"
    model[6][0].weight.data.mul_(50.0)  # which needs no statistics to be seen
    for mode in (True, False):
        found = [f for f in examine(trace(model.train(mode), torch.randn(2, 32))).findings if serious(f)]
        assert [f.module_path for f in found] == ["6"]


class Residual(nn.Module):
    """x + f(norm(x)), with a norm or without."""

    def __init__(self, width: int, norm: bool = True) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width) if norm else nn.Identity()
        self.f = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.f(self.norm(x))


@pytest.mark.parametrize("scale", [1.0, 20.0])
def test_a_norm_that_would_change_nothing_is_not_missed(scale: float):
    """The first block behind a norm needs none of its own, unless something makes its input large."""
    torch.manual_seed(0)
    stem = nn.LayerNorm(32)
    stem.weight.data.fill_(scale)
    model = nn.Sequential(stem, *(Residual(32, norm=i > 0) for i in range(7)))
    found = [f for f in examine(trace(model, torch.randn(8, 32))).findings if serious(f)]
    assert bool(found) is (scale > 1.0)


class Scaled(nn.Module):
    """A residual block whose branch ends in a scale, under a name of its own."""

    def __init__(self, width: int, name: str) -> None:
        super().__init__()
        self.f, self.name = nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width)), name
        self.g = nn.Sequential(nn.Linear(width, 16), nn.ReLU(), nn.Linear(16, width))
        self.add_module(name, nn.LayerNorm(width))
        nn.init.zeros_(self.get_submodule(name).weight)
        for layer in (self.g[0], self.g[2]):
            nn.init.zeros_(layer.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.get_submodule(self.name)(self.f(x))
        return x + self.g(h)


def test_branches_that_start_at_zero_are_known_whatever_they_are_called():
    torch.manual_seed(0)
    model = nn.Sequential(*(Scaled(16, name) for name in ("last", "final", "end")))
    found = examine(trace(model, torch.randn(4, 16))).findings
    assert {f.kind for f in found} == {"dead"}
    assert not [f for f in found if serious(f)]


def test_growth_that_passes_is_none_where_every_step_changes_its_space():
    """Norms of states of different sizes have no common unit: DenseNet, whose blocks all widen their state."""
    torch.manual_seed(0)
    widths = (8, 64, 512, 2048, 512, 64, 8)
    model = nn.Sequential(*(nn.Linear(a, b, bias=False) for a, b in itertools.pairwise(widths)))
    for layer in model:
        nn.init.normal_(layer.weight, std=layer.out_features**-0.5)  # keeps the size of entries, not of norms
    found = examine(trace(model, torch.randn(8, widths[0])))
    last = len(found.measurement.steps) - 1
    assert transient(found.measurement, (0, last), found.verdict.growth, Thresholds()) is not None
    assert found.verdict.name == "not judged"
    assert not found.findings


@pytest.mark.parametrize(("last", "said"), [(1.0, True), (0.01, False)])
def test_growth_that_passes_is_held_against_the_change_over_the_whole(last: float, said: bool):
    """Twenty times as large within a stretch that keeps its size, or beside one that falls to a hundredth."""
    model = nn.Sequential(*(nn.Linear(16, 16, bias=False) for _ in range(8)))
    for layer, size in zip(model, (last, 1.0, 0.05, 1.0, 1.0, 4.5, 4.5, 1.0), strict=True):
        nn.init.orthogonal_(layer.weight, size)
    flow = trace(model, torch.randn(8, 16, generator=torch.Generator().manual_seed(0)))
    measured = measure(flow)
    total = float(measured.growth.sum(0).mean())
    assert (transient(measured, (0, 7), total, Thresholds()) is not None) is said
