from __future__ import annotations

import json
import math

import pytest
import torch

from stabkit import plotting
from stabkit.errors import ReportError
from stabkit.monitor import Monitor, is_run, read_records
from tests.monitor.networks import mlp, train


def run(folder, steps=3):
    """A run whose last step is not finite, written both ways."""
    batches = iter([torch.ones(4, 8)] * (steps - 1) + [torch.full((4, 8), math.nan)])
    writers = [folder / "records.jsonl", folder / "run.csv"]
    _, monitor = train(mlp(), lambda: next(batches), steps, lambda m, o: Monitor(m, 1, writers=writers, optimizer=o))
    return monitor


def test_both_kinds_of_file_hold_the_records(tmp_path):
    monitor = run(tmp_path)
    lines, rows = read_records(tmp_path), read_records(tmp_path / "run.csv")
    assert lines == read_records(tmp_path / "records.jsonl")
    assert len(lines) == len(rows) == 3
    for line, row, truth in zip(lines, rows, monitor.records, strict=True):
        assert line["findings"] == row["findings"] == list(truth.findings)
        for ours, theirs, block in zip(line["blocks"], row["blocks"], truth.blocks, strict=True):
            assert ours["non_finite"] == theirs["non_finite"] == list(block.non_finite)
            for name in ("growth", "activation_norm", "update_ratio"):
                expected = pytest.approx(getattr(block, name), nan_ok=True)
                assert float(ours[name]) == expected
                assert float(theirs[name]) == expected
    assert lines[-1]["findings"] == ["non_finite"]
    assert plotting.training(rows).get_title() == plotting.training(lines).get_title()


@pytest.mark.parametrize("name", ["records.jsonl", "run.csv"])
@pytest.mark.parametrize("cut", [1, 7, 60])
def test_a_last_line_cut_short_is_left_out_and_goes_when_the_run_is_continued(tmp_path, name, cut):
    run(tmp_path)
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:-cut])
    read = read_records(path)
    assert [int(record["step"]) for record in read][:2] == [0, 1]
    run(tmp_path)
    again = read_records(path)
    assert [int(record["step"]) for record in again][-3:] == [0, 1, 2]
    assert [len(record["blocks"]) for record in again][-3:] == [4, 4, 4]
    assert not path.read_text().startswith("\n")


def test_what_is_no_run_is_said(tmp_path):
    run(tmp_path)
    assert is_run(tmp_path)
    assert not is_run(tmp_path / "missing")
    other = tmp_path / "other.jsonl"
    for content, message in (
        ("", "holds no record"),
        ('{"a": 1}\n', "line 1 is no record"),
        ("[\n", "JSONDecodeError"),
    ):
        other.write_text(content)
        with pytest.raises(ReportError, match=message):
            read_records(other)
    with pytest.raises(ReportError, match="no readable records"):
        read_records(tmp_path / "missing")
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ReportError, match="KeyError"):
        read_records(tmp_path / "other.csv")
    assert json.loads((tmp_path / "records.jsonl").read_text().splitlines()[0])["step"] == 0
