"""Running statistics that never caught up with the weights, so that training and evaluation disagree."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import stabkit
from stabkit.diagnosis import Finding, examine, treat
from stabkit.diagnosis.states.running_statistics import statistics_findings
from tests.diagnosis.soundness import unsound


def trained(momentum: float, batches: int = 40) -> tuple[nn.Module, Tensor, Callable[[Tensor], Tensor]]:
    """Classes that are told apart by inputs far from zero, with norms of this momentum."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    x, y = 3 * torch.randn(128, 8, generator=generator) + 4, torch.randint(0, 4, (128,), generator=generator)
    x[:, :4] += 8 * nn.functional.one_hot(y, 4)
    layers = [nn.Linear(8, 16), nn.BatchNorm1d(16, momentum=momentum), nn.ReLU(), nn.Linear(16, 4)]
    model = nn.Sequential(*layers)
    optimizer = torch.optim.SGD(model.parameters(), 0.2)
    for _ in range(batches):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval(), x, lambda out: nn.functional.cross_entropy(out, y)


def said(model: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor] | None) -> list[Finding]:
    return statistics_findings(stabkit.trace(model, x, check=False), loss)


@pytest.mark.parametrize("with_loss", [True, False])
def test_a_momentum_that_is_too_small_for_the_steps_taken(with_loss):
    model, x, loss = trained(0.001)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    (found,) = said(model, x, loss if with_loss else None)
    assert (found.kind, found.severity, found.module_path, found.steps) == ("stale_statistics", "warning", "1", (1,))
    assert "96% of what the running statistics hold is still what they were made with" in found.evidence
    assert found.numbers["as_made"] == pytest.approx(0.999**40)
    assert "update_bn" in found.remedy
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("with_loss", [True, False])
def test_what_is_told_holds_numbers_alone(with_loss):
    model, x, loss = trained(0.001)
    told = examine(stabkit.trace(model, x, check=False), loss if with_loss else None)
    assert "stale_statistics" in {found.kind for found in told.findings}
    assert unsound(told) == []


def test_the_treated_copy_has_the_statistics_of_the_data():
    model, x, loss = trained(0.001)
    done = treat(model, x, loss=loss)
    assert [found.kind for found in done.applied] == ["stale_statistics"]
    assert done.silent
    assert loss(done.model(x)) < 0.8 * loss(model(x))
    assert torch.allclose(done.model[1].running_mean, model[0](x).mean(0), atol=1e-4)
    assert model[1].momentum == 0.001


def test_statistics_that_the_weights_ran_away_from():
    model, x, loss = trained(0.1)
    assert said(model, x, loss) == []
    with torch.no_grad():
        model[0].bias.add_(100.0 * torch.randn(16, generator=torch.Generator().manual_seed(1)))
    (found,) = said(model, x, loss)
    assert "the running statistics are not those of this batch" in found.evidence
    assert "this batch is unlike" in found.remedy


def test_a_loss_that_is_nearly_gone_may_differ_by_a_factor():
    model, x, loss = trained(0.1, 400)
    with torch.no_grad():
        model[3].weight.mul_(3.0)  # sure of every sample
        model[3].bias.mul_(3.0)
        model[1].running_mean.add_(1.0)
    with torch.no_grad():
        before, after = float(loss(model(x))), float(loss(copy.deepcopy(model).train()(x)))
    assert before < 0.05
    assert after < 0.5 * before
    assert said(model, x, loss) == []


def test_what_is_not_known_to_be_stale_needs_a_loss():
    model, x, loss = trained(0.1)
    assert said(model, x - 3.0, None) == []  # other data, as noise given to a trained network
    model[1].running_var.fill_(0.5)  # a variance that began with something else than 1
    model[1].num_batches_tracked.fill_(1)
    assert said(model, x, None) == []
    assert said(model.train(), x, loss) == []


@pytest.mark.parametrize("momentum", [0.0, 0.1, None])
def test_a_momentum_of_zero_is_told_before_training(momentum):
    x = 3 * torch.randn(64, 8, generator=torch.Generator().manual_seed(0)) + 4
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(16, momentum=momentum)
    model = nn.Sequential(nn.Linear(8, 16), norm, nn.ReLU(), nn.Linear(16, 4))
    told = said(model, x, None)
    assert [(f.kind, f.severity, f.module_path) for f in told] == [("stale_statistics", "warning", "1")] * (
        momentum == 0
    )
    assert all("momentum=0.1" in f.remedy for f in told)
    with torch.no_grad():  # statistics that were loaded may be meant to stay
        norm.running_mean.fill_(1.0)
    assert said(model, x, None) == []


@pytest.mark.parametrize("gain", [1.0, 8.0])
def test_statistics_that_were_averaged_plainly_hold_nothing_of_their_start(gain):
    """``update_bn`` puts the momentum back, whatever it is: of three batches .01 would leave 97 % of the start."""
    torch.manual_seed(0)
    layers = [nn.Linear(8, 16), nn.BatchNorm1d(16, momentum=0.01), nn.ReLU(), nn.Linear(16, 4)]
    model = nn.Sequential(*layers)
    with torch.no_grad():
        model[0].weight.mul_(gain)  # variances below 1, or all above it
        model[0].bias.add_(gain)
    batches = [torch.randn(16, 8) for _ in range(3)]
    torch.optim.swa_utils.update_bn(batches, model)
    model.eval()
    assert model[1].momentum == 0.01
    x = torch.randn(16, 8)
    assert said(model, x, None) == []
    assert said(model, x, lambda out: out.square().mean()) == []
