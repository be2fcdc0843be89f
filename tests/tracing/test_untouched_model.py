from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stabkit.errors import TraceError
from stabkit.tracing import trace
from stabkit.tracing.recording.untouched_model import unchanged
from stabkit.tracing.recording.wrappers import unwrap


def snapshot(model: nn.Module) -> list[Any]:
    """Everything that must come back, as plain comparable data."""
    found: list[Any] = [torch.get_rng_state().tolist(), torch.is_grad_enabled()]
    for path, module in model.named_modules():
        attributes = {k: id(v) for k, v in vars(module).items() if not isinstance(v, bool)}
        hooks = {k: list(v) for k, v in vars(module).items() if k.endswith("_hooks")}
        found.append((path, module.training, attributes, hooks))
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        grad = None if tensor.grad is None else (id(tensor.grad), tensor.grad.tolist())
        found.append((name, id(tensor), tensor.requires_grad, tensor.detach().tolist(), grad))
    return found


class Restless(nn.Module):
    """Changes everything about itself that a forward pass can change."""

    def __init__(self, fails: bool = False) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.norm = nn.BatchNorm1d(3)
        self.dropout = nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros(()))
        self.hidden: Tensor | None = None
        self.history: list[float] = []
        self.fails = fails

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.hidden = x
        self.eval().train()
        self.extra = nn.Linear(3, 3)
        self.register_buffer("late", torch.ones(1))
        with torch.no_grad():
            self.layer.bias.requires_grad_(False)
            self.layer.weight.grad = torch.zeros_like(self.layer.weight)
        x = self.dropout(self.norm(self.layer(x)))
        if self.fails:
            raise ValueError("on purpose")
        return x


@pytest.mark.parametrize("fails", [False, True])
def test_a_model_comes_back_bit_for_bit_also_after_an_exception(fails):
    model = Restless(fails)
    model.layer.weight.grad = torch.ones(3, 3)
    model.layer.bias.grad = torch.full((3,), 2.0)
    model.norm.bias.requires_grad_(False)
    model.dropout.register_forward_hook(lambda *_: None)
    before = snapshot(model)
    x = torch.randn(4, 3, requires_grad=True, generator=torch.Generator().manual_seed(0))
    if fails:
        with pytest.raises(TraceError, match="on purpose"):
            trace(model, x)
    else:
        trace(model, x)
    assert snapshot(model) == before
    assert x.grad is None


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_products_change_nothing_either(rate):
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(rate), nn.Linear(3, 2))
    model[0].weight.grad = torch.ones(3, 3)
    before = snapshot(model)
    flow = trace(model, torch.randn(4, 3, generator=torch.Generator().manual_seed(0)))
    flow.jacobian().dense()
    flow.steps[0].vjp([torch.ones(4, 3)])
    assert snapshot(model) == before


@pytest.mark.parametrize("write", [lambda w: w.mul_(2), lambda w: w.data.add_(1), lambda w: w.detach()[1:].zero_()])
def test_a_model_that_writes_to_its_weights_is_traced_as_it_runs_and_gets_them_back(write):
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                write(self.weight)
            return (x * self.weight).sin()

    model = nn.Sequential(Counting())
    version = model[0].weight._version
    flow = trace(model, torch.zeros(2, 3))
    assert model[0].weight.tolist() == [1, 1, 1]
    assert model[0].weight._version == version  # a graph of the user's that saved it can still be walked
    written = torch.ones(3)
    write(written)
    torch.testing.assert_close(flow.jacobian().dense(), torch.diag(written).expand(2, 3, 3))
    assert model[0].weight.requires_grad


def test_inputs_that_a_model_writes_to_come_back():
    def forward(x: Tensor, tokens: Tensor) -> Tensor:
        x.mul_(2)
        tokens.add_(1)
        return x.sin() * tokens

    x, tokens = torch.ones(2, 3), torch.ones(2, 1, dtype=torch.long)
    flow = trace(forward, x, tokens)
    assert (x.tolist(), tokens.tolist()) == ([[1.0] * 3] * 2, [[1]] * 2)
    torch.testing.assert_close(flow.states[-1].tensors[0], 2 * torch.full((2, 3), 2.0).sin())


def test_a_container_attribute_that_the_model_fills_is_left_as_it_was():
    class Logging(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.activations: list[Tensor] = []
            self.cache: dict[str, Tensor] = {}

        def forward(self, x: Tensor) -> Tensor:
            self.activations.append(x.sin())
            self.cache["last"] = x
            return x.cos()

    model = Logging()
    trace(model, torch.ones(2, 3))
    assert model.activations == []
    assert model.cache == {}


def test_plain_tensor_attributes_come_back():
    class Memory(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.memory = torch.zeros(3)  # no buffer

        def forward(self, x: Tensor) -> Tensor:
            self.memory += x.detach().mean(0)
            return (x + self.memory).sin()

    model = Memory()
    trace(model, torch.ones(2, 3))
    assert model.memory.tolist() == [0, 0, 0]


class Policy:
    """No module, but holds one."""

    def __init__(self, net: nn.Module) -> None:
        self.net = net

    def __call__(self, x: Tensor) -> Tensor:
        return self.net(x)


@pytest.mark.parametrize(
    "wrap",
    [lambda net: lambda x: net(x), lambda net: net.forward, functools.partial, Policy],
    ids=["closure", "bound method", "partial", "object"],
)
def test_models_behind_callables_come_back_too(wrap):
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 2))
    before = snapshot(net)
    flow = trace(wrap(net), torch.randn(4, 3, generator=torch.Generator().manual_seed(0)))
    flow.jacobian() @ torch.ones(1, 12)
    assert snapshot(net) == before
    assert len(flow) >= 2  # the modules are seen


def test_global_state_comes_back_after_an_exception():
    def fails(x: Tensor) -> Tensor:
        torch.manual_seed(5)
        raise RuntimeError("on purpose")

    before = (
        torch.utils.checkpoint.CheckpointFunction,
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.mkldnn.enabled,
        torch.is_grad_enabled(),
        torch.get_rng_state().tolist(),
        len(nn.modules.module._global_forward_hooks),
        len(nn.modules.module._global_forward_pre_hooks),
    )
    with pytest.raises(TraceError), torch.no_grad():
        trace(fails, torch.ones(2))
    after = (
        torch.utils.checkpoint.CheckpointFunction,
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.mkldnn.enabled,
        torch.is_grad_enabled(),
        torch.get_rng_state().tolist(),
        len(nn.modules.module._global_forward_hooks),
        len(nn.modules.module._global_forward_pre_hooks),
    )
    assert after == before


def test_buffers_that_hold_nan_do_not_count_as_changed():
    model = nn.BatchNorm1d(2).eval()
    model.running_mean.fill_(float("nan"))
    version = model.running_mean._version
    with unchanged(model):
        pass
    assert model.running_mean._version == version


def test_wrappers_that_distribute_or_compile_are_taken_off():
    inner = nn.Linear(2, 2)
    assert unwrap(nn.DataParallel(inner)) is inner
    assert unwrap(torch.compile(inner)) is inner
    assert unwrap(inner) is inner
