"""Stock models as they are made, and networks that learned, raise nothing; what is said of them holds no nonsense."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import stabkit
from stabkit.diagnosis import examine
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
    _, score, *said = trained(task)
    assert score >= task.least
    for diagnosis in said:
        assert not [f for f in diagnosis.findings if serious(f)]
        assert not unsound(diagnosis)


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


def test_an_activation_of_one_number_is_read():
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
    assert {a.operation for step in examine(flow).measurement.steps for a in step.activities} == {"Tanh"}
