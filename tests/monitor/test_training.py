"""The monitor under real training: the right numbers, and not one bit of the training changed."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import Tensor, nn

from stabkit.monitor import Monitor
from tests.monitor.networks import InPlace, LastStep, Layers, hooks_of, mlp, train

MODELS = {
    "mlp": (lambda: mlp(dropout=0.3), lambda: torch.randn(4, 8)),
    "in_place": (InPlace, lambda: torch.randn(4, 2, 5, 5)),
    "recurrent": (LastStep, lambda: torch.randn(4, 3, 8)),
    "reentrant": (lambda: Layers("reentrant"), lambda: torch.randn(4, 6, requires_grad=True)),
    "not_reentrant": (lambda: Layers("not_reentrant"), lambda: torch.randn(4, 6)),
}


@pytest.mark.parametrize("preset", ["economy", "standard", "full"])
@pytest.mark.parametrize("name", MODELS)
def test_training_gives_the_same_weights_bit_for_bit(name, preset, tmp_path):
    build, draw = MODELS[name]
    plain, _ = train(build(), draw)
    watched, monitor = train(
        build(), draw, watch=lambda m, o: Monitor(m, 1, preset, optimizer=o, directory=tmp_path, probe_every=3)
    )
    assert len(monitor.records) == 4
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))


def expected(model: nn.Module, names: list[str], x: Tensor) -> dict[str, tuple[float, float]]:
    """Norms of outputs and of their gradients by ``autograd.grad`` on a model that returns them all."""
    kept: dict[str, Tensor] = {}
    handles = [
        model.get_submodule(n).register_forward_hook(lambda _, __, out, n=n: kept.update({n: out})) for n in names
    ]
    loss = model(x).square().mean()
    for handle in handles:
        handle.remove()
    gradients = torch.autograd.grad(loss, [kept[n] for n in names])
    return {n: (kept[n].norm().item(), g.norm().item()) for n, g in zip(names, gradients, strict=True)}


def one_step(model: nn.Module, x: Tensor, **options) -> Monitor:
    monitor = Monitor(model, 1, **options)
    loss = model(x).square().mean()
    loss.backward()
    monitor.step(loss)
    monitor.close()
    return monitor


def test_norms_and_growth_are_those_of_autograd():
    model, x = mlp().double(), torch.randn(5, 8, dtype=torch.float64)
    names = ["0", "3", "6", "9"]
    truth = expected(model, names, x)
    blocks = one_step(model, x).records[0].blocks
    assert [b.name for b in blocks] == names
    for block in blocks:
        assert (block.activation_norm, block.gradient_norm) == pytest.approx(truth[block.name], rel=1e-12)
        layer = model.get_submodule(block.name)
        assert block.parameter_norm == pytest.approx(nn.utils.parameters_to_vector(layer.parameters()).norm().item())
        grads = torch.cat([p.grad.flatten() for p in layer.parameters()])
        assert block.parameter_gradient_norm == pytest.approx(float(grads.norm()), rel=1e-12)
    assert blocks[2].growth == pytest.approx(math.log(truth["3"][1] / truth["6"][1]), rel=1e-9)
    assert math.isnan(blocks[0].growth)


@pytest.mark.parametrize("how", ["reentrant", "not_reentrant"])
def test_checkpointed_blocks_have_the_same_norms(how):
    x = torch.randn(4, 6, requires_grad=True)
    plain, checked = (one_step(Layers(way), x).records[0].blocks for way in ("plain", how))
    assert [b.name for b in plain] == [b.name for b in checked]
    assert checked.norms == pytest.approx(plain.norms, rel=1e-6, nan_ok=True)
    assert checked.calls.tolist() == [1, 1, 1]


@pytest.mark.parametrize("returns", ["tuple", "mapping"])
def test_outputs_in_containers_are_seen(returns):
    x = torch.randn(4, 6)
    plain, packed = (one_step(Layers(returns=way), x).records[0].blocks for way in ("tensor", returns))
    assert packed.norms == pytest.approx(plain.norms, nan_ok=True)


def test_blocks_before_an_operation_in_place_are_measured():
    model, x = InPlace(), torch.randn(4, 2, 5, 5)
    blocks = one_step(model, x).records[0].blocks
    assert [b.name for b in blocks] == ["layers.0", "layers.1", "layers.2", "head"]
    first = model.layers[0]
    first.norm.train()
    assert blocks[0].activation_norm == pytest.approx(first(x).norm().item(), rel=1e-5)
    assert all(b.gradient_norm > 0 for b in blocks)


def test_micro_batches_add_up_to_the_whole_batch():
    x = torch.randn(8, 8, dtype=torch.float64)
    whole = one_step(mlp().double(), x).records[0].blocks
    model = mlp().double()
    monitor = Monitor(model, 1)
    for part in x.split([3, 3, 2]):
        (model(part).square().sum() / 16).backward()
    monitor.step()
    blocks = monitor.records[0].blocks
    assert blocks.calls.tolist() == [3, 3, 3, 3]
    assert blocks.norms == pytest.approx(whole.norms, rel=1e-10, nan_ok=True)


def test_a_block_called_twice_counts_both_calls():
    torch.manual_seed(0)
    layer = nn.Linear(4, 4).double()

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(x))

    x = torch.randn(3, 4, dtype=torch.float64)
    block = one_step(Twice(), x, blocks=["layer"]).records[0].blocks[0]
    inner = layer(x)
    outer = layer(inner)
    gradients = torch.autograd.grad(outer.square().mean(), [inner, outer])
    assert block.calls == 2
    assert block.activation_norm == pytest.approx(math.hypot(inner.norm().item(), outer.norm().item()))
    assert block.gradient_norm == pytest.approx(math.hypot(*(g.norm().item() for g in gradients)))


@pytest.mark.parametrize("unscale", [False, True])
def test_scaled_gradients_are_reported_unscaled(unscale):
    x = torch.randn(4, 8)
    plain = one_step(mlp(), x).records[0]
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    monitor = Monitor(model, 1, scaler=scaler)
    loss = model(x).square().mean()
    scaler.scale(loss).backward()
    if unscale:
        scaler.unscale_(optimizer)
    monitor.step(loss)
    scaler.step(optimizer)
    scaler.update()
    record = monitor.records[0]
    assert record.gradient_norm == pytest.approx(plain.gradient_norm, rel=1e-5)
    assert record.blocks.norms[:4] == pytest.approx(plain.blocks.norms[:4], rel=1e-5, nan_ok=True)


def test_half_precision_outputs_are_summed_in_single():
    model, x = mlp(), torch.randn(4, 8)
    monitor = Monitor(model, 1)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(x).float().square().mean()
    loss.backward()
    monitor.step(loss)
    plain = one_step(mlp(), x).records[0].blocks
    assert monitor.records[0].blocks.norms[:4] == pytest.approx(plain.norms[:4], rel=0.05, nan_ok=True)


@pytest.mark.parametrize("norm_type", [2.0, 1.0, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_clipping_is_torchs_bit_for_bit_and_recorded_before_and_after(norm_type, dtype):
    ours, theirs = mlp().to(dtype), mlp().to(dtype)
    x = torch.randn(4, 8, dtype=dtype)
    monitor = Monitor(ours, 1)
    for model in (ours, theirs):
        model(x).square().mean().backward()
    before = float(torch.stack([p.grad.float().norm() for p in theirs.parameters()]).norm())
    total = monitor.clip_grad_norm_(ours.parameters(), 1e-2, norm_type)
    assert torch.equal(total, nn.utils.clip_grad_norm_(theirs.parameters(), 1e-2, norm_type))
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    after = float(torch.stack([p.grad.float().norm() for p in theirs.parameters()]).norm())
    monitor.step()
    assert monitor.records[0].gradient_norm == pytest.approx(before, rel=1e-4)
    assert monitor.records[0].clipped_norm == pytest.approx(after, rel=1e-2 if dtype == torch.bfloat16 else 1e-4)


def test_clipping_is_torchs_on_steps_that_are_not_recorded_and_with_nothing_to_clip():
    model = mlp()
    monitor = Monitor(model, 10)
    assert float(monitor.clip_grad_norm_(model.parameters(), 1.0)) == 0.0
    monitor.step()
    model(torch.randn(4, 8)).square().mean().backward()
    copy = [p.grad.clone() for p in model.parameters()]
    total = monitor.clip_grad_norm_(model.parameters(), 1e-3)
    assert float(total) == pytest.approx(float(torch.cat([g.flatten() for g in copy]).norm()))


def test_several_optimizers_and_frozen_layers():
    model = mlp()
    for parameter in model[0].parameters():
        parameter.requires_grad_(False)
    optimizers = [torch.optim.SGD(model[3].parameters(), lr=0.5), torch.optim.SGD(model[6].parameters(), lr=0.0)]
    monitor = Monitor(model, 1, optimizer=optimizers)
    before = torch.cat([p.detach().flatten() for p in model[3].parameters()])
    for step in range(11):
        model.zero_grad(set_to_none=True)
        model(torch.ones(4, 8)).square().mean().backward()
        monitor.step()
        if step == 9:
            before = torch.cat([p.detach().flatten() for p in model[3].parameters()])
        if step < 10:
            for optimizer in optimizers:
                optimizer.step()
    frozen, moved, still, loose = monitor.records[-1].blocks
    assert math.isnan(frozen.gradient_norm)
    assert math.isnan(frozen.parameter_gradient_norm)
    assert frozen.parameter_norm > 0
    after = torch.cat([p.detach().flatten() for p in model[3].parameters()])
    assert moved.update_ratio == pytest.approx(float((after - before).norm() / after.norm()), rel=1e-4)
    assert still.update_ratio == 0.0
    assert math.isnan(loose.update_ratio)


def test_batch_sizes_may_change_and_evaluations_between_do_not_count():
    model = mlp()
    monitor = Monitor(model, 1)
    for size in (4, 1, 7):
        model.zero_grad()
        model(torch.randn(size, 8)).square().mean().backward()
        model.eval()
        with torch.no_grad():
            model(torch.randn(50, 8))
        model.train()
        monitor.step()
    assert [r.blocks[0].calls for r in monitor.records] == [1, 1, 1]
    assert [r.blocks.entries[0] for r in monitor.records] == [32, 8, 56]


def test_only_every_so_many_steps_carry_hooks_and_none_stay():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = Monitor(model, 3, optimizer=optimizer)
    carried = []
    for _ in range(7):
        carried.append(hooks_of(model) > 1)  # one knows the batch of the step, should it break
        model(torch.randn(2, 8)).sum().backward()
        monitor.step()
    assert carried == [True, False, False, True, False, False, True]
    assert [r.step for r in monitor.records] == [0, 3, 6]
    monitor.attach()
    monitor.detach()
    assert hooks_of(model) == 0
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    monitor.step()
    assert len(monitor.records) == 3


@pytest.mark.parametrize("where", ["forward", "backward", "optimizer", "step"])
def test_an_error_inside_warns_once_and_the_training_goes_on(where, monkeypatch):
    import stabkit.monitor.measurement as measurement
    import stabkit.monitor.updates as updates

    def fail(*_, **__):
        raise RuntimeError("broken on purpose")

    plain, _ = train(mlp(), lambda: torch.randn(4, 8), 25)
    calls = []
    real = measurement.norm

    def fail_in_backward(tensor, wide):
        calls.append(1)
        return real(tensor, wide) if len(calls) <= 4 else fail()

    def watch(model, optimizer):
        monitor = Monitor(model, 1, optimizer=optimizer)
        if where == "step":
            monkeypatch.setattr(monitor._collector, "collect", fail)
        return monitor

    if where == "optimizer":
        monkeypatch.setattr(updates, "_entries", fail)
    elif where != "step":
        monkeypatch.setattr(measurement, "norm", fail if where == "forward" else fail_in_backward)
    with pytest.warns(RuntimeWarning, match="broken on purpose") as seen:
        watched, monitor = train(mlp(), lambda: torch.randn(4, 8), 25, watch)
    assert len(seen) == 1
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))
    assert len(monitor.records) < 25


def test_a_failing_part_goes_off_alone(tmp_path):
    def fail(_):
        raise OSError("disk full")

    kept = []
    with pytest.warns(RuntimeWarning, match="disk full") as seen:
        _, monitor = train(
            mlp(), lambda: torch.randn(4, 8), watch=lambda m, _: Monitor(m, 1, writers=[fail, kept.append])
        )
    assert len(seen) == 1
    assert len(kept) == len(monitor.records) == 4


def test_gradients_that_are_not_finite_are_data():
    model = mlp()
    monitor = Monitor(model, 1)
    (model(torch.full((2, 8), math.inf)).sum()).backward()
    monitor.step(torch.tensor(math.nan))
    record = monitor.records[0]
    assert record.blocks[0].non_finite[0] == "output"
    assert record.non_finite > 4
    assert monitor.findings[0].kind == "non_finite"


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # of the compiler itself
def test_compiled_blocks_are_measured_without_recompiling():
    torch._dynamo.reset()
    compiled: list[int] = []

    def backend(graph, inputs):
        compiled.append(1)
        return graph

    for in_place in (False, True):
        compiled.clear()
        model, plain = Layers(), Layers()
        for i, layer in enumerate(model.layers):
            if in_place:
                layer.compile(backend=backend)
            else:
                model.layers[i] = torch.compile(layer, backend=backend)
        x = torch.randn(4, 6)
        monitor = Monitor(model, 2)
        for _ in range(5):
            model.zero_grad()
            model(x).square().mean().backward()
            monitor.step()
        monitor.close()
        assert len(compiled) <= 3
        assert len(monitor.records) == 3
        blocks, truth = monitor.records[2].blocks, one_step(plain, x).records[0].blocks
        assert blocks.names == truth.names
        assert blocks.norms == pytest.approx(truth.norms, rel=1e-5, nan_ok=True)


@pytest.mark.parametrize("inner", [False, True])
def test_a_model_compiled_as_one_keeps_its_parameters_in_view(inner):
    torch._dynamo.reset()
    compiled: list[int] = []

    def backend(graph, inputs):
        compiled.append(1)
        return graph

    model = mlp()
    whole = torch.compile(model, backend=backend, fullgraph=True)
    monitor = Monitor(model if inner else whole, 2)
    x = torch.randn(4, 8)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(5):
            model.zero_grad()
            whole(x).square().mean().backward()
            monitor.step()
    assert [w for w in seen if "saw none of the blocks" in str(w.message)]
    assert len(compiled) == (2 if inner else 1)  # once with the hooks of the first step, unless they were left out
    block = monitor.records[-1].blocks[0]
    truth = one_step(mlp(), x).records[0].blocks[0]
    assert block.parameter_gradient_norm == pytest.approx(truth.parameter_gradient_norm, rel=1e-5)
    assert math.isnan(block.activation_norm)


class Replaces(torch.optim.SGD):
    """An optimizer that puts a new tensor in the place of every parameter's, as some do."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data = parameter - group["lr"] * parameter.grad


@pytest.mark.parametrize("kind", [torch.optim.SGD, Replaces])
def test_update_ratios_are_those_of_the_parameters(kind):
    """Small parameters are read whole."""
    model = mlp(width=8, depth=2)
    optimizer = kind(model.parameters(), lr=0.1)
    monitor = Monitor(model, 10, optimizer=optimizer)
    expected = {}
    for step in range(31):
        optimizer.zero_grad()
        loss = model(torch.randn(4, 8)).square().mean()
        loss.backward()
        before = [p.detach().clone() for p in model[0].parameters()]
        monitor.step(loss)
        optimizer.step()
        change = sum((a - b).square().sum() for a, b in zip(before, model[0].parameters(), strict=True)).sqrt()
        expected[step] = (change / sum(p.square().sum() for p in model[0].parameters()).sqrt()).item()
    monitor.close()
    known = {record.step: record.blocks[0].update_ratio for record in monitor.records if record.step % 10 == 0}
    assert math.isnan(known.pop(0))
    if kind is Replaces:
        assert math.isnan(known.pop(10))  # which is not known before
    assert known == pytest.approx({step: expected[step - 1] for step in known}, rel=1e-4)
    assert {20, 30} <= known.keys()
