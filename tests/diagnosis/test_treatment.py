from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import stabkit
from stabkit.diagnosis import Finding, apply, examine, treat
from stabkit.errors import ArgumentError
from tests.diagnosis.cases import GLOBAL, LOCAL, Case
from tests.diagnosis.confusion import serious

TREATED = [case for case in LOCAL + GLOBAL if "transformer ffn" not in case.name and "torch" not in case.name][::2]


def finding_of(**action: object) -> Finding:
    return Finding("exploding", "warning", (0,), "", 1.0, "", "", "", actions=(action,))


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in TREATED])
def test_what_the_remedy_says_removes_the_finding(case: Case):
    network, _ = case.build(1)
    before = examine(network.flow())
    first = serious(before)[0]
    assert apply(network.model, first) > 0
    after = examine(network.flow())
    assert not serious(after)
    if before.verdict.name != "stable" and math.isfinite(before.verdict.growth):
        assert abs(after.verdict.growth) <= max(abs(before.verdict.growth), 2.31)
    assert after.verdict.name in ("stable", "drift")


def test_the_factor_undoes_the_fault():
    torch.manual_seed(0)
    layers = [nn.Linear(12, 12, bias=False) for _ in range(8)]
    for layer in layers:
        nn.init.orthogonal_(layer.weight)
    layers[5].weight.data.mul_(7.0)
    (found,) = stabkit.diagnose(stabkit.trace(nn.Sequential(*layers), torch.randn(4, 12)))
    assert found.actions[0]["parameter"] == "5.weight"
    assert found.actions[0]["factor"] == pytest.approx(1 / 7, rel=1e-5)


def test_a_stretch_is_told_the_gain_of_a_layer():
    torch.manual_seed(0)
    layers = [nn.Linear(12, 12, bias=False) for _ in range(9)]
    for layer in layers:
        nn.init.orthogonal_(layer.weight, gain=0.2)
    (found,) = stabkit.diagnose(stabkit.trace(nn.Sequential(*layers), torch.randn(4, 12)))
    assert (found.kind, found.steps) == ("vanishing", tuple(range(9)))
    assert [action["factor"] for action in found.actions] == pytest.approx([5.0] * 9, rel=1e-4)


def test_actions_do_what_they_say():
    model = nn.Sequential(nn.Linear(3, 3), nn.Identity(), nn.LayerNorm(3))
    apply(model, finding_of(action="fill", parameter="0.bias", value=2.0))
    assert model[0].bias.tolist() == [2.0] * 3
    apply(model, finding_of(action="redraw", parameter="0.weight", rms=0.0))
    assert model[0].weight.abs().sum() == 0
    apply(model, finding_of(action="insert_norm", module="1", like="2"))
    assert isinstance(model[1], nn.LayerNorm)
    apply(model, finding_of(action="add_skip", module="0"))
    assert model[0](torch.ones(1, 3)).tolist() == [[3.0] * 3]
    apply(model, finding_of(action="convert", dtype="float64"))
    assert next(model.parameters()).dtype == torch.float64
    layer = nn.Linear(3, 3)
    apply(layer, finding_of(action="orthogonalise", parameter="weight", gain=2.0))
    assert torch.allclose(layer.weight @ layer.weight.T, 4 * torch.eye(3), atol=1e-5)


@pytest.mark.parametrize(
    ("action", "message"),
    [
        ({"action": "scale", "parameter": "9.weight", "factor": 1.0}, "no parameter '9.weight'"),
        ({"action": "add_skip", "module": "nowhere"}, "no module 'nowhere'"),
        ({"action": "pray"}, "action 'pray' is unknown"),
    ],
)
def test_actions_on_another_model_are_refused(action, message):
    with pytest.raises(ValueError, match=message):
        apply(nn.Sequential(nn.Linear(2, 2)), finding_of(**action))


class Remembering(nn.Module):
    """Keeps its last state, with the graph, as many models do."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.last = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)), None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.last = self.layers(x)
        return self.last


def test_a_model_that_keeps_its_last_state_is_treated():
    model, x = Remembering(), torch.randn(4, 8)
    kept = model(x)
    done = treat(model, x, loss=lambda out: out.square().mean())
    assert model.last is kept
    assert isinstance(done.model, Remembering)


def test_a_model_that_cannot_be_copied_is_refused_in_words():
    class Locked(nn.Linear):
        def __deepcopy__(self, memo):
            raise RuntimeError("no copies")

    with pytest.raises(ArgumentError, match=r"cannot be copied.*no copies"):
        treat(Locked(4, 4), torch.randn(2, 4))
