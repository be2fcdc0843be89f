"""What a diagnosis costs, in passes and products that are counted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import stabkit
from stabkit.analysis import analysis
from stabkit.diagnosis import causes, examine
from stabkit.diagnosis.remedies import trial
from stabkit.diagnosis.remedies.applying import carried_out
from stabkit.diagnosis.states import collapse
from stabkit.identification import identify
from stabkit.identification.evidence import confirmation
from stabkit.identification.steps import pairs
from stabkit.tracing.derivatives import lost_gradient


def _deep(gain: float = 0.2, depth: int = 12) -> nn.Module:
    layers = [nn.Linear(16, 16, bias=False) for _ in range(depth)]
    for layer in layers:
        nn.init.orthogonal_(layer.weight, gain=gain)
    return nn.Sequential(*layers)


def _counted(monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> list[int]:
    calls: list[int] = []
    original = getattr(module, name)

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(module, name, counting)
    return calls


def test_lost_parameters_are_looked_for_once_however_many_remedies_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    looked, tried = (
        _counted(monkeypatch, module, name)
        for module, name in ((causes, "lost_parameter_findings"), (trial, "suspected"))
    )
    found = examine(stabkit.trace(_deep(), torch.randn(4, 16)))
    assert found.verdict.name == "vanishing"
    assert len(tried) >= 1
    assert len(looked) == 1


def test_what_training_shows_of_a_model_takes_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    made = [_counted(monkeypatch, module, "training_pass") for module in (causes, lost_gradient)]
    model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4)))
    examine(stabkit.trace(model, torch.randn(4, 8)), lambda out: out.square().mean())
    assert [len(calls) for calls in made] == [1, 0]


def test_a_report_asks_for_no_numerical_confirmation_of_a_method(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False).eval()
    x = torch.randn(2, 5, 8)
    made = _counted(monkeypatch, confirmation, "commutator")
    report = stabkit.analyze(model, x, spectrum="none")
    assert not made
    confirmed = identify(stabkit.trace(model, x))
    assert len(made) == len(confirmed) == 6
    assert [step.method for step in report.steps] == [record.name for record in confirmed]
    assert all(record.checks for record in confirmed)


def test_without_checks_a_reading_is_the_same_but_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    class Coupling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f, self.g = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, state: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
            a, b = state
            a = a + torch.tanh(self.f(b))
            return a, b + torch.tanh(self.g(a))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Coupling() for _ in range(3)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            state = x[:, :4], x[:, 4:]
            for block in self.blocks:
                state = block(state)
            return torch.cat(state, 1)

    flow = stabkit.trace(Net().double(), torch.randn(2, 8, dtype=torch.float64))
    determinants = _counted(monkeypatch, pairs, "volume")
    bare = identify(flow, checks=False)
    assert not determinants
    assert [record.name for record in bare] == [record.name for record in identify(flow)]
    assert determinants
    assert confirmation.Check not in {type(check) for record in bare for check in record.checks}


def test_ranks_of_states_are_computed_for_a_collapse_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    computed = _counted(monkeypatch, collapse, "_effective_rank")
    flow = stabkit.trace(_deep(gain=1.0), torch.randn(4, 16))
    examine(flow)
    assert not computed
    ranks = collapse.spread(flow).rank
    assert len(computed) == len(flow.states)
    energy = np.linalg.svd(flow.states[3].flatten().detach().double().numpy(), compute_uv=False) ** 2
    share = energy / energy.sum()
    assert ranks[3] == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-12)


def test_the_verdict_comes_before_methods_are_read_unless_growth_asks_for_a_mechanism(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read = _counted(monkeypatch, analysis, "identify")

    class Listening:
        def __init__(self) -> None:
            self.read: list[int] = []

        def verdict(self, diagnosis: object) -> None:
            self.read.append(len(read))

        def step(self, done: int, total: int, step: object, seconds_left: float) -> None:
            pass

    told = Listening()
    report = stabkit.analyze(_deep(gain=1.0), torch.randn(4, 16), progress=told)
    assert report.verdict == "stable"
    assert told.read == [0]
    assert len(read) == 1
    assert {step.method for step in report.steps} == {"plain"}


def _layers(depth: int) -> nn.Sequential:
    return nn.Sequential(*(nn.Sequential(nn.Linear(3, 3), nn.Tanh()) for _ in range(depth)))


@pytest.fixture
def looked_at(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The modules that were gone through by whoever asked a model for its parameters, buffers or modules."""
    found: list[nn.Module] = []
    original = nn.Module.named_modules

    def named_modules(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        for path, module in original(self, *args, **kwargs):
            found.append(module)
            yield path, module

    monkeypatch.setattr(nn.Module, "named_modules", named_modules)
    return found


def test_no_reading_of_a_step_goes_through_the_whole_model(looked_at: list[nn.Module]) -> None:
    seen = []
    for depth in (8, 32):
        flow = stabkit.trace(_layers(depth), torch.randn(2, 3))
        looked_at.clear()
        identify(flow)
        seen.append(len(looked_at))
    assert seen[1] <= 4.5 * seen[0]


def test_a_change_of_every_parameter_goes_through_the_model_once(looked_at: list[nn.Module]) -> None:
    model = _layers(8)
    tied = model[0][0]
    model[1][0] = tied
    before = dict(model.named_parameters())
    actions = [{"action": "scale", "parameter": name, "factor": 2.0} for name in before]
    looked_at.clear()
    with carried_out(model, [*actions, actions[-1]]):
        assert len(looked_at) <= 3 * len(list(model.modules()))  # each is named by all that it lies in
        assert model[0][0].weight is model[1][0].weight
        assert torch.equal(model[1][0].weight, 2 * before["0.0.weight"])
        assert torch.equal(model[7][0].bias, 4 * before["7.0.bias"])
    assert all(dict(model.named_parameters())[name] is held for name, held in before.items())
