"""Attention logits, the logits of the loss, and Adam's epsilon: what is recorded of them, and what is told."""

from __future__ import annotations

import logging
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from stabkit.monitor import Monitor
from stabkit.monitor.growing import Growing, Runaway
from stabkit.monitor.logit_weights import LogitWeights
from stabkit.monitor.record import Array
from tests.monitor.networks import hooks_of

F = nn.functional
WIDTH, HEADS, LENGTH = 12, 3, 7


class Block(nn.Module):
    """One attention in one of the ways in which it is written."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.project = nn.Linear(WIDTH, 3 * WIDTH)
        self.inner = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
        if self.how == "module":
            return x + self.inner(x, x, x, attn_mask=causal)[0]
        q, k, v = self.split(x)
        if self.how == "fused":
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(causal, torch.finfo(q.dtype).min)
            y = F.dropout(F.softmax(scores, -1), 0.1, self.training) @ v
        return x + y.transpose(1, 2).flatten(2)

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        if self.how == "module":
            made = F.linear(x, self.inner.in_proj_weight, self.inner.in_proj_bias)
        else:
            made = self.project(x)
        return tuple(part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in made.chunk(3, -1))


class Classifier(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Block(how) for _ in range(2)])
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def trained(model: nn.Module, steps: int, watch: bool) -> tuple[list[Tensor], Monitor | None]:
    torch.manual_seed(1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    monitor = Monitor(model, 1, optimizer=optimizer) if watch else None
    for _ in range(steps):
        x, y = torch.randn(4, LENGTH, WIDTH), torch.randint(5, (4, LENGTH))
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        loss.backward()
        if monitor is not None:
            monitor.step(loss)
        optimizer.step()
    if monitor is not None:
        monitor.close()
    return [p.detach().clone() for p in model.parameters()], monitor


@pytest.mark.parametrize("how", ["fused", "module", "written"])
def test_logits_and_entropy_are_those_of_the_softmax_and_training_is_as_without(how):
    plain, _ = trained(Classifier(how), 12, watch=False)
    model = Classifier(how)
    torch.manual_seed(1)
    x = torch.randn(4, LENGTH, WIDTH)
    q, k, _ = model.blocks[0].split(x)
    scores = (q @ k.mT / math.sqrt(q.shape[-1])).double()
    seen = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    p = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    largest, entropies = [], []
    for row in range(2, LENGTH):  # that see three keys or more
        own = scores[..., row, : row + 1]
        largest.append((own.amax(-1) - own.mean(-1)).amax().item())
        entropies.append((torch.special.entr(p[..., row, :]).sum(-1) / math.log(row + 1)).mean().item())
    weights, monitor = trained(model, 12, watch=True)
    block = monitor.records[0].blocks[0]
    assert block.attention_logit == pytest.approx(max(largest), rel=1e-5)
    assert block.attention_entropy == pytest.approx(np.mean(entropies), rel=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(plain, weights, strict=True))
    assert math.isnan(monitor.records[5].blocks[0].attention_logit)  # looked at every 10 steps
    assert not math.isnan(monitor.records[10].blocks[1].attention_logit)
    assert hooks_of(model) == 0


@pytest.mark.parametrize("where", ["model", "loop"])
def test_the_normaliser_is_that_of_the_logits_of_the_loss(where):
    class Model(nn.Sequential):
        def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
            logits = super().forward(x)
            return logits if y is None else F.cross_entropy(logits[:, :-1].flatten(0, 1), y[:, 1:].flatten())

    torch.manual_seed(0)
    model = Model(nn.Linear(6, 6), nn.Linear(6, 5))
    x, y = torch.randn(3, 4, 6), torch.randint(5, (3, 4))
    monitor = Monitor(model, 1)
    if where == "model":
        loss = model(x, y)
        logits = model(x)[:, :-1]
    else:
        logits = model(x)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), y.flatten()) / 2
    loss.backward()
    monitor.step(loss)
    monitor.close()
    record = monitor.records[0]
    assert record.log_z == pytest.approx(logits.logsumexp(-1).mean().item(), rel=1e-5)
    assert record.output_logit == pytest.approx(logits.abs().max().item(), rel=1e-5)
    assert {"log_z", "output_logit"} <= record.scalars().keys()


def test_a_mode_of_others_stays_and_an_error_in_the_model_leaves_none_behind():
    from torch.overrides import TorchFunctionMode, _get_current_function_mode

    class Other(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    model = Classifier("fused")
    monitor = Monitor(model, 1)
    with Other() as other:
        model(torch.randn(2, LENGTH, WIDTH)).sum().backward()
        assert _get_current_function_mode() is other
    assert _get_current_function_mode() is None
    monitor.step()
    monitor.attach()
    with pytest.raises(RuntimeError):
        model(torch.randn(2, LENGTH, WIDTH + 1))
    assert _get_current_function_mode() is None
    monitor.close()


def looks(
    logits: list[float], entropies: list[float], losses: list[float], log_z: float = 3.0, resolution: float = 1e-7
) -> list[str]:
    """What is told of looks ten steps apart at one block, as severities."""
    growing = Growing(("a",), None)
    told = []
    for number, (logit, entropy, loss) in enumerate(zip(logits, entropies, losses, strict=True)):
        for _ in range(10):
            growing.see(loss)
        blocks: Array = np.array([[logit], [entropy], [0.5]])
        told += growing.judge(10 * number, blocks, np.array([abs(log_z), log_z]), resolution)
    return [finding.severity for finding in told]


def test_growing_attention_is_told_once_and_not_where_the_task_is_learnt():
    grows = [2.0, 30.0, 100.0, 250.0, 300.0, 500.0]
    falls = [0.9, 0.6, 0.1, 0.06, 0.05, 0.04]
    assert looks(grows, falls, [4.0] * 6) == ["warning"]
    assert looks(grows, falls, [4.0, 3.0, 1.0, 0.1, 0.1, 0.1]) == []  # looked up, and learnt
    assert looks(grows, [0.9] * 6, [4.0] * 6) == []
    assert looks([400.0] * 6, falls, [4.0] * 6) == []  # by design
    assert looks([2.0, 30.0, 100.0, 2500.0, 3000.0, 5000.0], falls, [4.0, 3.0, 1.0, 0.1, 0.1, 0.1]) == ["critical"]


def test_a_drifting_normaliser_is_told_where_it_is_rounded_or_grows_far():
    def told(sizes: list[float], losses: list[float], resolution: float) -> list[str]:
        growing = Growing(("a",), None)
        found = []
        nothing = np.full((3, 1), math.nan)
        for number, (size, loss) in enumerate(zip(sizes, losses, strict=True)):
            for _ in range(10):
                growing.see(loss)
            found += growing.judge(10 * number, nothing, np.array([abs(size), size]), resolution)
        return [finding.kind for finding in found]

    flat = [3.0] * 6
    assert told([4.0, 5.0, -60.0, -250.0, -300.0, -400.0], flat, 1e-7) == ["diverging_logits"]
    assert told([4.0, 5.0, -30.0, -70.0, -80.0, -90.0], flat, 2**-7) == ["diverging_logits"]  # bfloat16
    assert told([4.0, 5.0, -30.0, -70.0, -80.0, -90.0], flat, 1e-7) == []
    assert told([90.0, 100.0, 110.0, 250.0, 260.0, 270.0], flat, 1e-7) == []  # as at first
    assert told([4.0, 5.0, 60.0, 250.0, 300.0, 400.0], [3.0, 2.0, 0.5, 0.1, 0.01, 0.01], 1e-7) == []  # sure, and right


def run_away(every_look: int, sizes: list[float]) -> list[int]:
    """The places at which sizes are seen to run away, in looks so many training steps apart."""
    seen = Runaway(200.0, math.log(4.0))
    found = [seen.see(every_look * step, np.array([1.0, size])) for step, size in enumerate(sizes)]
    assert all(math.isnan(each[0]) for each in found)
    return [step for step, each in enumerate(found) if each[1] > 1]


def test_what_grows_by_a_factor_at_every_step_is_seen_on_its_way():
    assert run_away(1, [2.0, 2.1, 3.8, 7.0, 13.0, 24.0]) == [4, 5]
    assert run_away(10, [2.0, 2.1, 3.8, 7.0, 13.0, 24.0]) == []  # a network that learns to attend
    assert run_away(1, [0.2, 0.3, 0.6, 1.0, 1.9, 3.5]) == []  # small
    assert run_away(1, [8.0, 12.0, 16.0, 20.0, 24.0, 28.0]) == []  # by so much, and not by a factor
    assert run_away(1, [3.0, 25.0, 24.0, 30.0, 3.0, 31.0]) == []  # batches


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_group_of_weights_that_becomes_longer_at_once_is_seen(dtype):
    torch.manual_seed(0)
    layer, other = nn.Linear(40, 40, dtype=dtype), nn.Linear(4, 4, dtype=dtype)
    seen = LogitWeights(layer.parameters())
    seen.watch([[*layer.parameters(), *other.parameters()]])
    found = []
    with torch.no_grad():
        for step in range(6):
            layer.bias *= 1.5 if step == 2 else 1.0  # a small part of what makes the logits
            layer.weight *= {3: 1.2, 4: 0.5, 5: 1.05}.get(step, 1.0)
            other.weight *= 2.0
            found.append(seen.grew(step))
    assert found == [False, False, False, True, False, False]
    layer.to(torch.float64)
    assert [seen.grew(step) for step in (6, 7)] == [False, False]  # elsewhere, and no longer


@pytest.mark.parametrize("kind", ["fused", "module", "written", "head"])
def test_weights_that_grow_at_once_are_looked_behind(kind):
    """The growth begins at a step that nothing looks at; it is told three steps later, and other looks are as ever."""
    torch.manual_seed(0)
    model = Classifier("fused" if kind == "head" else kind)
    weights = {
        "module": model.blocks[1].inner.in_proj_weight, "head": model.head.bias,
    }.get(kind, model.blocks[1].project.weight)  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    looks = []
    with Monitor(model, 1, optimizer=optimizer) as monitor:
        for step in range(30):
            with torch.no_grad():
                if step >= 24 and kind == "head":
                    weights += 4.0 * 1.8 ** (step - 23)
                elif step >= 24:
                    weights[: 2 * WIDTH] *= 2.0
            optimizer.zero_grad()
            loss = F.cross_entropy(model(torch.randn(4, LENGTH, WIDTH)).flatten(0, 1), torch.randint(5, (4 * LENGTH,)))
            loss.backward()
            monitor.step(loss)
            optimizer.step()
            looks += [step] if not math.isnan(monitor.records[-1].log_z) else []
    told = [finding for finding in monitor.findings if finding.kind == "diverging_logits"]
    assert looks[:4] == [0, 10, 20, 25]
    assert [finding.numbers["training_step"] for finding in told[:1]] == [27]
    assert told[0].module_path == ("" if kind == "head" else "blocks.1")


@pytest.mark.parametrize(("eps", "severity"), [(1e-8, None), (1e-3, "warning"), (3e-5, "info")])
def test_an_epsilon_above_the_gradients_is_told_and_loud_where_nothing_is_learnt(eps, severity, caplog):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, eps=eps)
    x = torch.randn(64, 8)
    y = x[:, :1] + 3.0
    with caplog.at_level(logging.WARNING), Monitor(model, 10, optimizer=optimizer) as monitor:
        for _ in range(30):
            optimizer.zero_grad()
            loss = 1e-6 * F.mse_loss(model(x), y)
            loss.backward()
            monitor.step(loss)
            optimizer.step()
    assert [(f.kind, f.severity) for f in monitor.findings] == [("idle_update", severity)] * (severity is not None)
    assert bool(caplog.records) == (severity == "warning")
    share = monitor.records[2].blocks[0].epsilon_share
    assert share > 0.5 if severity else share < 0.1
