"""The monitor in loops of accelerate, and of Keras on torch."""

from __future__ import annotations

import os

import pytest
import torch

from stabkit import Monitor
from tests.monitor.networks import mlp

pytestmark = pytest.mark.filterwarnings("ignore")  # of these packages, about devices


def test_a_loop_of_accelerate_with_accumulated_gradients(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, batches = mlp(), [torch.randn(4, 8) for _ in range(24)]
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with Monitor(model, every=1, optimizer=optimizer, scaler=accelerator.scaler) as monitor:
        for batch in batches:
            with accelerator.accumulate(model):
                loss = model(batch).square().mean()
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    monitor.step(loss)
                optimizer.step()
                optimizer.zero_grad()
    assert [record.step for record in monitor.records] == list(range(12))
    assert [record.blocks[0].calls for record in monitor.records] == [2] * 12
    assert any(record.blocks[0].update_ratio > 0 for record in monitor.records)


def test_a_keras_model_on_torch_in_a_loop_of_its_own():
    os.environ.setdefault("KERAS_BACKEND", "torch")
    keras = pytest.importorskip("keras")
    if keras.backend.backend() != "torch":
        pytest.skip("Keras runs on another backend here")
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(8, activation="tanh"), keras.layers.Dense(2)])
    optimizer = keras.optimizers.SGD(0.1)
    with Monitor(model, every=1) as monitor:
        for _ in range(3):
            model.zero_grad()
            loss = model(torch.randn(4, 8)).square().mean()
            loss.backward()
            monitor.step(loss)
            with torch.no_grad():
                optimizer.apply([v.value.grad for v in model.trainable_weights], model.trainable_weights)
    # Keras keeps its layers where torch does not see them: the whole model is the block
    assert monitor.blocks == ("_functional",)
    assert all(record.blocks[0].parameter_gradient_norm > 0 for record in monitor.records)
