from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from stabkit.tracing import trace


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x).tanh()


class Blocks(nn.Module):
    def __init__(self, run) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = self.run(block, x)
        return x


def assert_same_flow(model, plain, x) -> None:
    """The same steps, states and Jacobians as those of the plain model."""
    found, expected = trace(model, x), trace(plain, x)
    assert [step.operations for step in found.steps] == [step.operations for step in expected.steps]
    torch.testing.assert_close(found.states[-1].tensors[0], plain(x).detach())
    torch.testing.assert_close(found.jacobian().dense(), expected.jacobian().dense())
    assert not any(step.notes for step in found.steps)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpoints_are_opened(reentrant):
    def run(block, x):
        return torch.utils.checkpoint.checkpoint(block, x, use_reentrant=reentrant)

    torch.manual_seed(0)
    plain = Blocks(lambda block, x: block(x))
    model = Blocks(run)
    model.load_state_dict(plain.state_dict())
    assert_same_flow(model, plain, torch.randn(2, 3))
    model(torch.randn(2, 3, requires_grad=True)).sum().backward()  # checkpointing still works afterwards


def test_sequential_checkpoints_are_opened():
    torch.manual_seed(0)
    layers = nn.Sequential(*(Block() for _ in range(4)))

    class Chunked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = layers

        def forward(self, x: Tensor) -> Tensor:
            return torch.utils.checkpoint.checkpoint_sequential(self.layers, 2, x, use_reentrant=False)

    assert_same_flow(Chunked(), layers, torch.randn(2, 3))


def test_compiled_models_run_eagerly():
    torch.manual_seed(0)
    plain = Blocks(lambda block, x: block(x))
    assert_same_flow(torch.compile(plain), plain, torch.randn(2, 3))
    model = Blocks(lambda block, x: block(x))
    model.load_state_dict(plain.state_dict())
    model.compile()
    model.blocks[1].compile()
    assert_same_flow(model, plain, torch.randn(2, 3))


def test_what_is_compiled_during_the_pass_runs_eagerly_too():
    """In a process of its own, where nothing has imported the compiler before."""
    code = """
import torch, stabkit

class Late(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Tanh())

    def forward(self, x):
        if not hasattr(self, "compiled"):
            self.compiled = torch.compile(self.inner, backend=refuse)
        return self.compiled(x)

def refuse(graph, inputs):
    raise AssertionError("compiled")

model = Late()
flow = stabkit.trace(model, torch.ones(2, 3))
before = torch.compile
print(len(flow.steps), torch.compile is before, flow.chain_error < 1e-5)
try:
    model(torch.ones(2, 3))
except Exception as error:
    print("compiled" in str(error))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["2", "True", "True", "True"], done.stdout + done.stderr[-2000:]


@pytest.mark.parametrize("module", [nn.LSTM(3, 4, 2), nn.GRU(3, 4, bidirectional=True), nn.RNN(3, 4)])
def test_fused_recurrent_kernels_have_forward_products(module):
    x = torch.randn(5, 2, 3)
    flow = trace(module, x, batch_dim=1)
    operator = flow.jacobian()
    u = torch.randn(operator.shape[0], operator.shape[2])
    eps = 1e-2
    moved = eps * u.view(2, 5, 3).transpose(0, 1)
    difference = (module(x + moved)[0] - module(x - moved)[0]).detach() / (2 * eps)
    torch.testing.assert_close(operator @ u, difference.transpose(0, 1).flatten(1), rtol=1e-2, atol=1e-3)


def test_fused_attention_has_forward_products():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 5, 6, dtype=torch.float64)

    def attention(v: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(q + v, k * v, v, is_causal=True)

    operator = trace(attention, v).jacobian()
    u = torch.randn(2, 120, dtype=torch.float64)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        truth = torch.autograd.functional.jvp(attention, v, u.view_as(v))[1].flatten(1)
    torch.testing.assert_close(operator @ u, truth, rtol=1e-10, atol=1e-10)


def test_a_forward_without_gradients_is_looked_through():
    class Inference(Blocks):
        @torch.no_grad()
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    torch.manual_seed(0)
    plain = Blocks(lambda block, x: block(x))
    model = Inference(plain.run)
    model.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3)
    flow = trace(model, x)
    assert any("no_grad" in note for note in flow.notes)
    torch.testing.assert_close(flow.jacobian().dense(), trace(plain, x).jacobian().dense())


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_tracing_works_where_gradients_are_off(context):
    x = torch.randn(2, 3)
    with context():
        flow = trace(nn.Linear(3, 3), x)
    assert flow.chain_error < 1e-6


def test_a_model_may_ask_for_a_gradient_of_its_input():
    class Asking(Blocks):
        def forward(self, x: Tensor) -> Tensor:
            x.requires_grad = True  # as Wav2Vec2 does in training, which torch allows of a leaf alone
            return super().forward(x)

    torch.manual_seed(0)
    model = Asking(lambda block, x: block(x))
    plain = Blocks(lambda block, x: block(x))
    plain.load_state_dict(model.state_dict())
    assert_same_flow(model, plain, torch.randn(2, 3))
