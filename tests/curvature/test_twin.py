"""Real updates of copies: the model, graphs that hold its weights, and the optimizer stay as they are."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from stabkit.curvature import critical_rate, sharpness
from stabkit.curvature.batches import Batches
from stabkit.curvature.hessian import Hessian
from stabkit.curvature.twin import Twin
from stabkit.errors import StabkitError


def made():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    x, y = torch.randn(8, 4, dtype=torch.float64), torch.randint(2, (8,))
    return model, x, lambda out: functional.cross_entropy(out, y)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "rate as a tensor": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.01)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_twin_makes_the_updates_that_training_makes(name):
    model, x, loss = made()
    optimizer = OPTIMIZERS[name](model.parameters())
    loss(model(x)).backward()
    optimizer.step()
    twin = Twin(Hessian(model, list(model.parameters()), Batches((x,), None, loss, None), 0), optimizer)
    foretold = twin.losses(5)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        value = loss(model(x))
        losses.append(float(value.detach()))
        value.backward()
        optimizer.step()
    assert foretold == pytest.approx([*losses, float(loss(model(x)).detach())], rel=1e-12)


def test_graphs_that_hold_the_weights_stay_whole():
    model, x, loss = made()
    x.requires_grad_()
    scalar = loss(model(x))
    critical_rate(model, x, loss=loss, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    (slope,) = torch.autograd.grad(scalar, x)
    assert torch.equal(slope, torch.autograd.grad(loss(model(x)), x)[0])


def test_an_optimizer_with_a_schedule_and_hooks_stays_as_it_is():
    model, x, loss = made()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    called = []
    optimizer.register_step_post_hook(lambda *_: called.append(1))
    before = [p.detach().clone() for p in model.parameters()]
    critical_rate(model, x, loss=loss, optimizer=optimizer)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert (called, optimizer.param_groups[0]["lr"], schedule.last_epoch) == ([], 0.1, 0)


class Signs(torch.optim.Optimizer):
    """Moves by the sign, with a setting that stands in no group."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr})
        self.scale = 2.0

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad.sign(), alpha=self.scale * group["lr"])


def test_an_optimizer_of_ones_own_is_copied_with_what_it_keeps():
    model, x, loss = made()
    found = critical_rate(model, x, loss=loss, optimizer=Signs(model.parameters(), 1e-3))
    assert found.loss_after < found.loss


def test_parameters_without_a_gradient_are_not_moved():
    model, x, loss = made()
    model.register_parameter("spare", nn.Parameter(torch.ones(3)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=1.0)
    twin = Twin(Hessian(model, list(model.parameters()), Batches((x,), None, loss, None), 0), optimizer)
    twin.step()
    moved = [not torch.equal(v, p) for v, p in zip(twin.values(), model.parameters(), strict=True)]
    assert moved == [name != "spare" for name, _ in model.named_parameters()]


def test_an_update_of_zero_has_no_direction():
    model, x, loss = made()
    with pytest.raises(StabkitError, match="update of optimizer SGD is zero"):
        critical_rate(model, x, loss=loss, optimizer=torch.optim.SGD(model.parameters(), lr=0.0))


def test_a_loss_that_is_not_finite_is_refused():
    model, x, loss = made()
    with pytest.raises(StabkitError, match="not finite"):
        sharpness(model, x, loss=lambda out: loss(out) * torch.nan)


def test_what_lies_in_no_block_goes_by_the_module_that_holds_it():
    model, x, loss = made()
    found = sharpness(model, x, loss=loss, blocks=["2"], own=0)
    assert {block.name for block in found.by_block} == {"0", "2"}
    assert [block.name for block in sharpness(model, x, loss=loss, blocks=[""], own=0).by_block] == [""]


class Once(torch.autograd.Function):
    """A sine whose gradient cannot be differentiated again."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return g * ctx.saved_tensors[0].cos()


def test_a_backward_that_is_once_differentiable_is_no_curvature_of_zero():
    model, x, loss = made()
    with pytest.raises(StabkitError, match="marked once_differentiable"):
        sharpness(model, x, loss=lambda out: loss(Once.apply(out)))
