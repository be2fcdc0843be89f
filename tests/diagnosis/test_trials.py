"""A finding is a hypothesis that an intervention confirms; these are the interventions and what is told of them."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import stabkit
from stabkit.analysis.records import untried_notes
from stabkit.diagnosis import Finding, Thresholds, apply, examine, judge, treat
from stabkit.diagnosis.finding import serious as serious_one
from stabkit.diagnosis.finding import sound
from stabkit.diagnosis.remedies.applying import carried_out, once
from stabkit.diagnosis.remedies.short_training import short_training
from tests.diagnosis import networks
from tests.diagnosis.cases import biased, scaled, shears
from tests.diagnosis.confusion import serious


def deep(act: type[nn.Module], depth: int = 12) -> nn.Sequential:
    torch.manual_seed(1)
    layers = [layer for _ in range(depth) for layer in (nn.Linear(32, 32), act())]
    return nn.Sequential(nn.Linear(16, 32), act(), *layers, nn.Linear(32, 4))


def classify(count: int = 16) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(count, 16, generator=generator), torch.randint(0, 4, (count,), generator=generator)
    return x, lambda out: nn.functional.cross_entropy(out, y)


def snapshot(model: nn.Module) -> dict[str, tuple[int, int]]:
    state = [*model.named_parameters(remove_duplicate=False), *model.named_modules(remove_duplicate=False)]
    return {f"{type(held).__name__} {name}": (id(held), getattr(held, "_version", 0)) for name, held in state}


def test_a_remedy_says_what_it_changed_and_the_model_stays_as_it_is():
    network = networks.mlp(0)
    scaled(20.0)(network, "5")
    before = snapshot(network.model)
    flow = network.flow()
    (found,) = serious(examine(flow))
    assert "tried on a copy: gain of 5" in found.evidence
    assert snapshot(network.model) == before
    assert flow.steps[5].jacobian().dense().isfinite().all()  # the recorded graph is as good as before


def test_a_remedy_that_helps_nothing_is_not_told(monkeypatch):
    network = networks.mlp(0)
    scaled(20.0)(network, "5")
    useless = Finding("exploding", "warning", (5,), "5", 0.9, "odd", "multiply", "", actions=(
        {"action": "scale", "parameter": "5.fc.weight", "factor": 2.0},))  # fmt: skip
    monkeypatch.setattr("stabkit.diagnosis.suspects.local_findings", lambda *_: [useless])
    (found,) = serious(examine(network.flow()))
    assert found.actions == ()
    assert "multiply" not in found.remedy


def test_suspects_beyond_the_trials_are_listed_and_told_without_being_tried():
    network = networks.mlp(0)
    for block, by in (("2", 20.0), ("7", 0.05)):
        scaled(by)(network, block)
    found = examine(network.flow(), trials=1)
    assert len(found.untried) == 1
    assert len(serious(found)) == 2
    (left,) = found.untried
    assert all(
        "none was tried" in f.remedy and not f.actions for f in found.findings if f.module_path == left.module_path
    )
    assert "no remedy tried" in untried_notes(found)[0]
    assert left.module_path in untried_notes(found)[0]
    assert not examine(network.flow()).untried


def test_findings_of_one_cause_are_one_finding():
    model, (x, loss) = deep(nn.Sigmoid), classify()
    diagnosis = examine(stabkit.trace(model, x), loss)
    (found,) = serious(diagnosis)
    assert found.kind == "vanishing"
    assert "13 sigmoid activations pass at most 0.25 of a gradient each" in found.evidence
    others = [f for f in diagnosis.findings if f is not found]
    assert others
    assert all("gone with the remedy of vanishing" in f.evidence for f in others)


@pytest.mark.parametrize("with_loss", [False, True])
def test_the_remedy_of_saturating_layers_is_one_that_trains(with_loss):
    model, (x, loss) = deep(nn.Sigmoid), classify()
    done = treat(model, x, loss=loss if with_loss else None)
    assert done.silent
    assert isinstance(model[1], nn.Sigmoid)  # the copy is treated, and nothing else
    stuck, trains = (short_training(stabkit.trace(m, x), loss) for m in (model, done.model))
    assert stuck is not None
    assert trains is not None
    if with_loss:
        assert trains.last < stuck.last - 0.02


def test_skips_go_round_the_activation_too():
    model = deep(nn.Tanh)
    for layer in model[2:-1:2]:
        layer.weight.data.mul_(0.1)
    action = {"action": "add_skip", "module": "2", "through": "3"}
    x = torch.randn(3, 16)
    with carried_out(model, [action]):
        inner = model[1](model[0](x))
        assert torch.equal(model[:4](x), inner + torch.tanh(model[2].branch[0](inner)))
    assert isinstance(model[2], nn.Linear)
    assert isinstance(model[3], nn.Tanh)
    assert list(dict(model.named_parameters()))[2] == "2.weight"


class Spread(nn.Module):
    """What neighbours are, through a matrix."""

    def __init__(self, width: int, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.act = nn.Linear(width, width), act

    def forward(self, x: Tensor, graph: Tensor) -> Tensor:
        return self.act(graph @ self.layer(x))


class Spreading(nn.Module):
    def __init__(self, depth: int, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(12, 32), nn.Linear(32, 4)
        self.layers = nn.ModuleList(Spread(32, act) for _ in range(depth))

    def forward(self, x: Tensor, graph: Tensor) -> Tensor:
        x = self.first(x).relu()
        for layer in self.layers:
            x = layer(x, graph)
        return self.last(x)


@pytest.mark.parametrize(("act", "depth"), [(torch.relu, 24), (lambda x: 1.5 * x.relu(), 24)])
def test_skips_that_make_a_loss_begin_far_too_high_are_told_with_a_weight_of_the_branch(act, depth):
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(60) % 4
    close = (torch.rand(60, 60, generator=generator) < (y[:, None] == y) * 0.2 + 0.02).float()
    graph = ((close + close.T) > 0).float().fill_diagonal_(1.0)
    graph = graph / graph.sum(1, keepdim=True)
    x = torch.randn(4, 12, generator=generator)[y] + torch.randn(60, 12, generator=generator)
    loss = lambda out: nn.functional.cross_entropy(out, y)  # noqa: E731
    torch.manual_seed(1)
    model = Spreading(depth, act)
    found = examine(stabkit.trace(model, x, graph), loss).findings
    (told,) = [f for f in found if f.kind == "vanishing" and serious_one(f)]
    assert "x + 0.2 f(x, ...)" in told.remedy
    assert {action["factor"] for action in told.actions} == {0.2}
    apply(model, told)
    begun, plain = (short_training(stabkit.trace(m, x, graph), loss) for m in (model, Spreading(depth, act)))
    assert begun is not None
    assert plain is not None
    assert begun.first < 2 * plain.first
    assert begun.last < 0.5 * plain.last


def test_skips_of_full_strength_are_told_where_they_train():
    x, loss = classify(64)
    found = examine(stabkit.trace(deep(nn.Sigmoid), x), loss).findings
    (told,) = [f for f in found if f.kind == "vanishing" and serious_one(f)]
    assert not any("factor" in action for action in told.actions if action["action"] == "add_skip")


def test_one_weight_has_one_remedy():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    halve = [{"action": "scale", "parameter": f"{i}.weight", "factor": 0.5} for i in (0, 1)]
    assert once(model, halve) == (halve[0],)
    assert once(model, [halve[0], halve[1] | {"factor": 3.0}]) is None


def test_a_field_that_all_steps_share_is_no_peer_of_itself():
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 16), nn.Linear(16, 4)
            self.a.weight.data.mul_(40)
            self.b.weight.data.mul_(40)

        def forward(self, z: Tensor) -> Tensor:
            for _ in range(12):
                z = z + 0.1 * self.b(torch.tanh(self.a(z)))
            return z

    torch.manual_seed(0)
    found = serious(examine(stabkit.trace(Shared(), torch.randn(4, 4))))
    assert [f.kind for f in found] == ["saturated"]
    assert [action["parameter"] for action in found[0].actions] == ["a.weight"]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_gain_of_a_relu_network_over_time_counts_the_relu(seed):
    torch.manual_seed(seed)
    x = torch.randn(60, 4, 3)
    cell = nn.RNN(3, 24, nonlinearity="relu")
    cell.weight_hh_l0.data = torch.linalg.qr(torch.randn(24, 24))[0] * 2.0
    diagnosis = examine(stabkit.recurrent_flow(cell, x))
    (found,) = serious(diagnosis)
    stabkit.diagnosis.apply(cell, found)
    after = examine(stabkit.recurrent_flow(cell, x))
    assert not serious(after)
    assert abs(after.verdict.growth) < abs(diagnosis.verdict.growth)


class Coupling(nn.Module):
    """(a, b exp(s(a)) + t(a)), with a scale that nothing bounds."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 8))
        self.net[2].weight.data.mul_(40.0)

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1)
        s, t = self.net(a).chunk(2, 1)
        return torch.cat([b * s.exp() + t, a], 1)


def test_an_exponential_without_a_bound_is_brought_to_a_small_argument_in_all_blocks():
    torch.manual_seed(0)
    model, x = nn.Sequential(*[Coupling() for _ in range(6)]), 3 * torch.randn(16, 8)
    (found,) = serious(examine(stabkit.trace(model, x, check=False)))
    assert found.kind == "non_finite"
    assert "5 like it in other blocks" in found.remedy
    assert "tried on a copy" in found.evidence
    stabkit.diagnosis.apply(model, found)
    assert model(x).isfinite().all()


def test_a_network_that_a_step_has_killed_starts_again():
    torch.manual_seed(0)
    layers = [layer for _ in range(3) for layer in (nn.Linear(16, 16), nn.ReLU())]
    model, (x, loss) = nn.Sequential(*layers, nn.Linear(16, 4)), classify()
    with torch.no_grad():
        for layer in layers[::2]:
            layer.weight.mul_(-1e4)
            layer.bias.fill_(-1e6)
        model[6].weight.mul_(1e4)
    (found,) = serious(examine(stabkit.trace(model, x, check=False), loss))
    assert found.kind == "dead"
    assert "draw the weights of all 4 layers anew" in found.remedy
    stabkit.diagnosis.apply(model, found)
    assert not serious(examine(stabkit.trace(model, x, check=False), loss))


def test_what_else_is_found_in_a_stretch_may_be_its_cause():
    class Field(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 16), nn.Linear(16, 4)
            for layer in (self.a, self.b):
                layer.weight.data.mul_(60.0)

        def forward(self, z: Tensor) -> Tensor:
            for _ in range(12):
                z = z + 0.1 * self.b(torch.tanh(self.a(z)))
            return z

    torch.manual_seed(0)
    diagnosis = examine(stabkit.trace(Field(), torch.randn(8, 4), check=False))
    assert serious(diagnosis)
    assert all(f.actions and "tried on a copy" in f.evidence for f in serious(diagnosis))
    assert not any(f.actions for f in diagnosis.findings if f.severity == "info")


def test_a_bound_on_one_number_is_no_activation():
    class Bounded(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x / x.norm().clamp_min(1.0)

    assert not examine(stabkit.trace(nn.Sequential(nn.Linear(8, 8), Bounded()), torch.randn(1, 8))).findings


def test_memory_that_nobody_has_written_is_no_state_of_any_size():
    class Solver(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            stages = torch.empty(2, *x.shape).index_fill_(0, torch.tensor([1]), 0.0)
            kept = torch.empty_like(x)
            assert not kept.any()
            return x + stages.sum()

    stabkit.trace(nn.Sequential(nn.Linear(8, 8), Solver()), torch.randn(2, 8), check=False)


# ---------------------------------------------------------------- what is never told


@pytest.mark.parametrize("factor", [1.0, 0.99, math.inf, math.nan, 0.0])
def test_no_remedy_multiplies_by_one_or_by_what_is_no_number(factor):
    odd = Finding("exploding", "warning", (0,), "a", 0.9, "", "multiply", "", {"x": math.inf}, (
        {"action": "scale", "parameter": "a.weight", "factor": factor},))  # fmt: skip
    told = sound(odd)
    assert told is not None
    assert (told.actions, told.numbers) == ((), {})
    assert "multiply" not in told.remedy


@pytest.mark.parametrize("confidence", [0.0, 0.3, math.nan])
def test_what_is_more_likely_wrong_than_right_is_not_told(confidence):
    assert sound(Finding("dead", "warning", (0,), "a", confidence, "", "", "")) is None


@pytest.mark.parametrize(
    ("kinds", "name"),
    [(["transition"] * 4, "not judged"), (["transition", "step"], "not judged"), (["step"] * 2, "stable")],
)
def test_growth_without_blocks_is_not_judged(kinds, name):
    verdict = judge(np.zeros((len(kinds), 3)), kinds, Thresholds())
    assert verdict.name == name


# ---------------------------------------------------------------- what is no fault


def heads(width: int) -> nn.Module:
    """Layers of one size before a head onto very many outputs, all with entries of one size."""
    torch.manual_seed(0)
    layers = [nn.Linear(64, 64) for _ in range(6)]
    model = nn.Sequential(*layers, nn.Linear(64, width))
    for layer in model:
        nn.init.normal_(layer.weight, 0, 0.125)
    return model


def test_the_shape_of_a_head_is_not_held_against_it():
    assert not serious(examine(stabkit.trace(heads(8000), torch.randn(4, 64))))


def test_branches_and_heads_that_start_at_zero_are_told_as_what_they_are():
    torch.manual_seed(0)
    network = networks.residual(0)
    for block in network.blocks:
        nn.init.zeros_(network.model.get_submodule(block).fc2.weight)
    nn.init.zeros_(network.model.head.weight)
    diagnosis = examine(network.flow(), lambda out: (out - 1).square().sum())
    assert not serious(diagnosis)
    biased(-10.0)(network, network.blocks[3])
    scaled(20.0, 0)(network, network.blocks[5])
    assert examine(network.flow()).verdict.name in ("stable", "drift")


def test_layer_scale_is_told_by_name():
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gamma, self.f = nn.Parameter(1e-5 * torch.ones(16)), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return 1e-6 * x + self.gamma * self.f(x)

    torch.manual_seed(0)
    diagnosis = examine(stabkit.trace(nn.Sequential(*[Scaled() for _ in range(6)]), torch.randn(4, 16)))
    assert not serious(diagnosis)
    assert any("LayerScale of 1e-05" in f.evidence for f in diagnosis.findings)


def test_depth_is_counted_from_the_image_and_not_from_the_time_that_conditions_it():
    class Conditioned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.time = nn.Sequential(nn.Linear(1, 8), nn.SiLU(), nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 8))
            self.blocks = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))
            self.stem = nn.Conv2d(1, 8, 3, padding=1)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            e, h = self.time(t)[:, :, None, None], self.stem(x)
            for block in self.blocks:
                h = h + block(torch.relu(h + e))
            return h

    assert stabkit.trace(Conditioned(), torch.randn(2, 1, 8, 8), torch.rand(2, 1)).source_name == "0"


def test_an_input_far_from_unit_scale_is_brought_to_it():
    torch.manual_seed(0)
    model = nn.Sequential(*[layer for _ in range(4) for layer in (nn.Linear(16, 16), nn.Tanh())])
    for layer in model[::2]:
        nn.init.normal_(layer.weight, 0, 0.25)
    x = torch.randn(32, 16)
    assert not serious(examine(stabkit.trace(model, x)))
    (found,) = serious(examine(stabkit.trace(model, 120 * x)))
    assert (found.kind, found.module_path) == ("saturated", "1")
    assert "divide the input where the data are read by 11" in found.remedy
    assert treat(model, 120 * x).silent


def test_what_passes_and_is_not_taken_away_by_anything_is_no_warning(monkeypatch):
    flow = shears(20.0)(0).flow()
    assert [f.kind for f in serious(examine(flow))] == ["transient_growth"]
    monkeypatch.setattr("stabkit.diagnosis.examination.candidates", lambda *_: [])
    diagnosis = examine(flow)
    assert not serious(diagnosis)
    assert diagnosis.verdict.name != "transient growth"


def test_dead_layers_are_drawn_anew_biases_and_all():
    torch.manual_seed(0)
    model = nn.Sequential(*[layer for _ in range(4) for layer in (nn.Linear(32, 32), nn.ReLU())], nn.Linear(32, 4))
    for layer in model[:-1:2]:
        layer.bias.data.fill_(-200.0)  # as after one step with a rate far too high
        layer.weight.data.mul_(20.0)
    x = torch.rand(32, 32)
    before = examine(stabkit.trace(model, x))
    (found,) = serious(before)
    assert found.kind == "dead"
    assert {action["action"] for action in found.actions} == {"redraw", "fill"}
    assert treat(model, x).silent


class LongSkip(nn.Module):
    """Residual blocks without a norm inside one long skip, so that the first and the last block change the space."""

    def __init__(self, layer: Callable[[int, int], nn.Module], depth: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head, self.tail = layer(2, 12), layer(12, 2)
        blocks = [nn.Sequential(layer(12, 12), nn.ReLU(), layer(12, 12)) for _ in range(depth)]
        for matrix in (part for block in blocks for part in block if not isinstance(part, nn.ReLU)):
            nn.init.kaiming_normal_(matrix.weight)
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        start = x = self.head(x)
        for block in self.blocks:
            x = x + block(x)
        return self.tail(start + x)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [(nn.Linear, (8, 2)), (lambda n, m: nn.Conv2d(n, m, 3, padding=1), (4, 2, 6, 6))],
    ids=["linear", "convolutions"],
)
@pytest.mark.parametrize("loss", [None, lambda out: out.abs().mean()], ids=["no loss", "loss"])
def test_what_is_done_to_every_branch_is_done_to_those_at_the_ends_of_a_long_skip(layer, shape, loss):
    model = LongSkip(layer, 24)
    flow = stabkit.trace(model, torch.randn(*shape, generator=torch.Generator().manual_seed(1)))
    (found,) = serious(examine(flow, loss))
    assert found.kind == "exploding"
    assert len(found.steps) < 24
    assert len(found.actions) == 24
    assert "tried on a copy" in found.evidence
    apply(model, found)
    assert serious(examine(flow.again(), loss)) == []
