"""The callback in real Lightning runs."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from stabkit.monitor import replay
from tests.monitor.networks import mlp

pl = pytest.importorskip("lightning.pytorch")

pytestmark = pytest.mark.filterwarnings("ignore")  # of lightning, about workers, loggers and devices


class Regression(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def training_step(self, batch, index):
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(tmp_path, callback=None, **options):
    torch.manual_seed(0)
    data = torch.utils.data.TensorDataset(torch.randn(24, 8))
    model = Regression()
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=tmp_path,
        callbacks=[] if callback is None else [callback],
        **{"logger": False, **options},
    )
    trainer.fit(model, torch.utils.data.DataLoader(data, batch_size=4))
    return model


def test_a_run_is_recorded_before_clipping_and_trains_the_same(tmp_path):
    from lightning.pytorch.loggers import CSVLogger

    from stabkit import MonitorCallback

    plain = fit(tmp_path, gradient_clip_val=1e-3)
    callback = MonitorCallback("net", every=1, directory=tmp_path / "watch", capsules=1)
    watched = fit(tmp_path, callback, gradient_clip_val=1e-3, logger=CSVLogger(tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), watched.parameters(), strict=True))
    monitor = callback.monitor
    assert [r.step for r in monitor.records] == list(range(6))
    assert all(r.gradient_norm > 2e-3 and r.loss > 0 for r in monitor.records)
    assert len((tmp_path / "watch" / "records.jsonl").read_text().splitlines()) == 6
    logged = next(tmp_path.rglob("metrics.csv")).read_text()
    assert "stabkit/growth/largest" in logged


def test_accumulated_micro_batches_are_one_step_with_the_mean_loss(tmp_path):
    from stabkit import MonitorCallback

    callback = MonitorCallback(every=1, directory=None)
    fit(tmp_path, callback, accumulate_grad_batches=3)
    records = callback.monitor.records
    assert [r.blocks[0].calls for r in records] == [3, 3]
    torch.manual_seed(0)
    data = torch.randn(24, 8)
    assert records[0].blocks[0].name == "net.0"
    assert records[0].loss == pytest.approx(mlp()(data[:12]).square().mean().item(), rel=0.7)
    assert not math.isnan(records[0].loss)


def test_a_capsule_of_the_network_replays(tmp_path):
    from stabkit import MonitorCallback

    class Planted(MonitorCallback):
        def on_train_batch_start(self, trainer, pl_module, batch, index):
            if index == 3:
                nn.init.constant_(pl_module.net[3].weight, math.nan)

    callback = Planted("net", every=1, directory=tmp_path)
    fit(tmp_path, callback)
    assert callback.monitor.findings[0].module_path == "3"
    assert replay(callback.monitor.capsules[0], mlp).agrees()
