from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor, nn

import stabkit
from stabkit.attribution.result import COLUMNS
from stabkit.growth import gradient_profile
from tests.attribution.networks import gaussian, linear_steps, normal_input


class Momentum(nn.Module):
    """(x, v) -> (x + v', v') with v' = 0.5 v + tanh(W x), in one tensor pair."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList([nn.Linear(4, 4, dtype=torch.float64) for _ in range(depth)])

    def forward(self, x: Tensor) -> Tensor:
        v = torch.zeros_like(x) + 0.1 * x
        for branch in self.branches:
            v = 0.5 * v + torch.tanh(branch(x))
            x = x + v
        return x


def conv_net() -> nn.Module:
    torch.manual_seed(0)
    block = lambda: nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU())  # noqa: E731
    return nn.Sequential(nn.Conv2d(1, 3, 3), block(), block(), nn.Flatten(), nn.Linear(48, 5)).double()


MODELS = {
    "momentum": (lambda: Momentum(4), normal_input(3, 4)),
    "convolution": (conv_net, normal_input(2, 36).reshape(2, 1, 6, 6)),
    "shrinking": (lambda: nn.Sequential(*[nn.Linear(9 - i, 8 - i).double() for i in range(6)]), normal_input(2, 9)),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("loss", [None, lambda out: out.square().sum()], ids=["random", "loss"])
def test_growth_is_that_of_the_profile_and_the_terms_add_up(name, loss):
    make, x = MODELS[name]
    torch.manual_seed(0)
    flow = stabkit.trace(make(), x)
    found = stabkit.attribute(flow, loss, seed=3)
    profile = gradient_profile(flow, loss, seed=3, probes=4 if loss is None else 1)
    torch.testing.assert_close(found.growth, profile.log_growth, rtol=1e-12, atol=1e-12)
    parts = [torch.nan_to_num(getattr(found, c)) for c in ("spectral", "non_normal", "alignment", "transition")]
    torch.testing.assert_close(sum(parts), found.growth, rtol=0, atol=1e-12)
    assert found.closing_error.abs().max() < 1e-9
    square = torch.tensor([s.source.sample_shapes == s.target.sample_shapes for s in flow.steps])
    assert bool(found.spectral[square].isfinite().all())
    assert bool((found.transition[square] == 0).all())
    assert bool((found.transition[~square] != 0).all())


def test_the_same_call_gives_the_same_numbers():
    flow = stabkit.trace(conv_net(), MODELS["convolution"][1])
    one, two = (json.dumps(stabkit.attribute(flow, dense_limit=20).to_dict()) for _ in range(2))
    assert one == two


def test_only_some_samples():
    flow = stabkit.trace(linear_steps(normal_input(5, 5), normal_input(5, 5, 2)), normal_input(4, 5))
    every, two = stabkit.attribute(flow), stabkit.attribute(flow, samples=2)
    for column in COLUMNS:
        torch.testing.assert_close(getattr(two, column), getattr(every, column)[:, :2], equal_nan=True)


def test_a_step_that_passes_nothing_back_is_minus_infinity_and_restarts():
    model = linear_steps(0.5 * torch.eye(3), torch.zeros(3, 3), 0.5 * torch.eye(3), a=0.0)
    found = stabkit.attribute(stabkit.trace(model, normal_input(2, 3)))
    assert found.restarts == (1,)
    assert bool(torch.isneginf(found.growth[1]).all())
    assert bool(torch.isneginf(found.spectral[1]).all())
    assert found.non_normal[1].abs().max() == found.alignment[1].abs().max() == 0
    assert found.growth[[0, 2]].flatten().tolist() == pytest.approx([math.log(0.5)] * 4)
    assert found.closing_error.abs().max() < 1e-12
    assert found.totals["growth"] == pytest.approx(2 * math.log(0.5))


def test_one_branch_switched_off_for_one_sample_only():
    class Gate(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(x)

    model = nn.Sequential(Gate(), Gate())
    x = torch.tensor([[1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64)
    found = stabkit.attribute(stabkit.trace(model, x, depth=["0", "1"]), lambda out: out.sum())
    assert found.growth[1].tolist() == [0.0, -math.inf]
    assert bool(found.growth[0, 1].isnan())
    assert found.spectral[:, 0].tolist() == [0.0, 0.0]
    assert bool(torch.isneginf(found.spectral[:, 1]).all())


def test_values_that_are_not_finite_are_said_to_be_so():
    A = torch.eye(3)
    A[0, 0] = math.nan
    found = stabkit.attribute(stabkit.trace(linear_steps(torch.eye(3), A), normal_input(1, 3), check=False))
    assert found.methods == ("dense", "none")
    assert "not finite" in found.notes[1][0]
    assert found.mechanisms[1].energy is None
    assert bool(found.growth[1].isnan().all())


def test_the_first_and_the_second_split_agree():
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.ReLU()) for _ in range(3)]
    found = stabkit.attribute(stabkit.trace(nn.Sequential(*blocks).double(), normal_input(3, 6)))
    split = found.mask + found.norm + found.skip + found.dissipation + found.branch
    torch.testing.assert_close(split, found.isotropic, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.spectral + found.non_normal, found.isotropic, rtol=0, atol=1e-12)
    assert bool((found.mask < 0).all())


def test_tables():
    found = stabkit.attribute(stabkit.trace(conv_net(), MODELS["convolution"][1]))
    frame = found.to_dataframe()
    assert list(frame.columns[:2]) == ["step", "name"]
    assert set(COLUMNS) <= set(frame.columns)
    assert len(frame) == len(found.names)
    assert frame.growth.tolist() == pytest.approx(found.growth.mean(1).tolist())
    long = found.to_dataframe(per_sample=True)
    assert len(long) == 2 * len(frame)
    assert long[long["sample"] == 1].growth.tolist() == found.growth[:, 1].tolist()


def test_sums_over_depth_close():
    A = [0.3 * gaussian("iid", 10, torch.Generator().manual_seed(i)) for i in range(5)]
    found = stabkit.attribute(stabkit.trace(linear_steps(*A), normal_input(3, 10)))
    total = found.totals
    assert total["spectral"] + total["non_normal"] + total["alignment"] == pytest.approx(total["growth"], abs=1e-12)
    assert found.predictions["spectral"].predicted == pytest.approx(total["spectral"])
    assert found.explained == pytest.approx(total["spectral"] / total["growth"])


@pytest.mark.parametrize(
    "arguments", [{"samples": 0}, {"samples": 9}, {"probes": 1}, {"dense_limit": -1}, {"krylov": -1}, {"confidence": 1}]
)
def test_arguments_that_make_no_sense(arguments):
    flow = stabkit.trace(linear_steps(torch.eye(2)), normal_input(1, 2))
    with pytest.raises(ValueError, match=next(iter(arguments))):
        stabkit.attribute(flow, **arguments)


def test_nothing_of_the_model_changes():
    model = conv_net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.random.get_rng_state()
    stabkit.attribute(stabkit.trace(model, MODELS["convolution"][1]), dense_limit=20)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_one_sample_that_is_not_finite_leaves_the_others_alone():
    class Square(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + x * x

    x = torch.tensor([[0.1, 0.2], [math.inf, 0.2]], dtype=torch.float64)
    both = stabkit.attribute(stabkit.trace(nn.Sequential(Square(), Square()), x, check=False), lambda out: out.sum())
    alone = stabkit.attribute(stabkit.trace(nn.Sequential(Square(), Square()), x[:1]), lambda out: out.sum())
    for column in ("growth", "spectral", "alignment"):
        torch.testing.assert_close(getattr(both, column)[:, 0], getattr(alone, column)[:, 0], rtol=0, atol=1e-12)
    assert bool(both.spectral[:, 1].isnan().all())
    assert both.mechanisms[1].energy == alone.mechanisms[1].energy
