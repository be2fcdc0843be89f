"""Every writer's file is opened and read back by the package it is for."""

from __future__ import annotations

import csv
import json
import math
import struct
import time

import pytest
import torch

from stabkit.errors import StabkitError
from stabkit.monitor import Monitor
from stabkit.monitor.charts import QUANTITIES, Charts
from stabkit.monitor.writers import WRITERS, MLflowWriter, WandbWriter
from tests.monitor.networks import mlp, train


def run(**options):
    _, monitor = train(mlp(), lambda: torch.randn(4, 8), 3, lambda m, o: Monitor(m, 1, optimizer=o, **options))
    return monitor


def test_json_lines_are_strict_and_hold_every_number(tmp_path):
    monitor = run(directory=tmp_path)
    lines = (tmp_path / "records.jsonl").read_text().splitlines()
    read = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    assert [r["step"] for r in read] == [0, 1, 2]
    for written, record in zip(read, monitor.records, strict=True):
        for block, truth in zip(written["blocks"], record.to_dict()["blocks"], strict=True):
            assert block.keys() == truth.keys()
            for name in ("activation_norm", "growth", "update_ratio"):
                assert float(block[name]) == pytest.approx(float(truth[name]), nan_ok=True)


def test_csv_has_a_line_for_each_block_and_one_header_also_when_continued(tmp_path):
    path = tmp_path / "run.csv"
    first = run(writers=[path])
    run(writers=[path])
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 3 * 4
    assert float(rows[1]["growth"]) == pytest.approx(first.records[0].blocks[1].growth)
    assert {row["name"] for row in rows} == {"0", "3", "6", "9"}


def test_callables_and_writers_both_take_records():
    kept: list = []
    monitor = run(writers=[kept.append])
    assert kept == list(monitor.records)


def test_a_new_writer_is_one_edit(tmp_path, monkeypatch):
    class Counted:
        def __init__(self, path):
            self.path, self.seen = path, 0

        def write(self, record):
            self.seen += 1

        def close(self):
            self.path.write_text(str(self.seen))

    monkeypatch.setitem(WRITERS, ".count", Counted)
    run(writers=tmp_path / "run.count").close()
    assert (tmp_path / "run.count").read_text() == "3"
    with pytest.raises(StabkitError, match=r"\.count"):
        run(writers="run.txt")


def test_tensorboard_reads_back_what_was_written(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monitor = run(writers="tensorboard", directory=tmp_path)
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    events = board.Scalars("stabkit/growth/largest")
    assert [e.step for e in events] == [0, 1, 2]
    assert [e.value for e in events] == pytest.approx([largest_growth(r) for r in monitor.records])
    (picture,) = board.Images("stabkit/growth")
    assert picture.step == 2
    assert picture.width > 400


def test_every_quantity_that_was_measured_now_and_then_is_drawn_and_long_runs_are_thinned():
    _, monitor = train(mlp(), lambda: torch.randn(4, 8), 25, lambda m, o: Monitor(m, 1, optimizer=o))
    assert math.isnan(monitor.records[-1].blocks[0].update_ratio)
    charts = Charts()
    for record in list(monitor.records) * 40:
        charts.add(record)
    assert len(charts._records) <= 256
    pictures = charts.drawn()
    assert set(pictures) == {quantity for quantity in QUANTITIES if "attention" not in quantity}  # there is none
    assert all(picture.std() > 0 for picture in pictures.values())
    assert charts.drawn() == {}


def largest_growth(record) -> float:
    """Of the blocks that have one before them."""
    return max(block.growth for block in record.blocks if not math.isnan(block.growth))


def chunks(log: bytes):
    """The records of a ``.wandb`` file: LevelDB's log format after a header of seven bytes."""
    position, whole = 7, b""
    while position + 7 <= len(log):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        size, kind = struct.unpack_from("<HB", log, position + 4)
        whole += log[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield whole
            whole = b""


def history(log: bytes) -> list[tuple[int, float]]:
    """Steps and one quantity of what was logged."""
    from wandb.proto import wandb_internal_pb2

    seen = []
    for data in chunks(log):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        items = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
        if "stabkit/growth/largest" in items:
            seen.append((items["stabkit/step"], items["stabkit/growth/largest"]))
    return seen


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of wandb, about itself
def test_wandb_reads_back_an_offline_run(tmp_path):
    wandb = pytest.importorskip("wandb")
    settings = wandb.Settings(mode="offline", silent=True, console="off", x_disable_stats=True)
    with wandb.init(dir=str(tmp_path), settings=settings) as opened:
        monitor = run(writers=[WandbWriter(opened)])
    (path,) = tmp_path.rglob("*.wandb")
    deadline = time.monotonic() + 60  # the file is written by a process of its own, and whole some time after `finish`
    while len(seen := history(path.read_bytes())) < 3 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert seen == [(r.step, pytest.approx(largest_growth(r))) for r in monitor.records]


def test_wandb_without_a_run_says_what_to_do():
    wandb = pytest.importorskip("wandb")
    if wandb.run is None:
        with pytest.raises(ValueError, match=r"wandb\.init"):
            WandbWriter()


@pytest.mark.filterwarnings("ignore")  # of mlflow, about itself
def test_mlflow_reads_back_its_store(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.chdir(tmp_path)  # where it keeps pictures
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    with mlflow.start_run() as opened:
        monitor = run(writers=[MLflowWriter()])
    pictures = mlflow.MlflowClient().list_artifacts(opened.info.run_id, "stabkit")
    assert "stabkit/growth-00000002.png" in [picture.path for picture in pictures]
    history = mlflow.MlflowClient().get_metric_history(opened.info.run_id, "stabkit/growth/largest")
    assert [m.step for m in history] == [0, 1, 2]
    assert [m.value for m in history] == pytest.approx([largest_growth(r) for r in monitor.records])


def test_scalars_leave_out_what_was_not_measured():
    record = run().records[0]
    scalars = record.scalars()
    assert "update_ratio/largest" not in scalars  # there is no optimizer
    assert scalars["growth/largest"] == largest_growth(record)
    assert all(not math.isnan(value) for value in scalars.values())
