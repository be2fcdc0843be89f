from __future__ import annotations

import csv
import dataclasses
import os
import stat
from pathlib import Path

import pytest

from stabkit.errors import ReportError
from stabkit.report import Report, files
from tests.report.synthetic import FINDING, make_report, make_step

REPORT = make_report(make_step(0), make_step(1, name='a, "b"'), findings=(FINDING,))


def test_json_comes_back(tmp_path):
    path = REPORT.save(tmp_path / "r.JSON")
    assert Report.load(path) == REPORT


def test_csv_has_a_row_per_step(tmp_path):
    with REPORT.save(tmp_path / "r.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["name"] for row in rows] == ["blocks.0", 'a, "b"']
    assert float(rows[1]["growth_high"]) == 0.6
    assert rows[0]["source_shapes"] == "3x4"


@pytest.mark.parametrize(("suffix", "magic"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_pictures_are_what_their_suffix_says(tmp_path, suffix, magic):
    assert REPORT.save(tmp_path / f"a.{suffix}").read_bytes().startswith(magic)


@pytest.mark.parametrize(("name", "message"), [("r.txt", "unknown suffix '.txt'"), ("r", "''")])
def test_other_suffixes_are_refused(tmp_path, name, message):
    with pytest.raises(ReportError, match=message):
        REPORT.save(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_truncated_file_is_never_half_read(tmp_path):
    whole = REPORT.save(tmp_path / "r.json").read_bytes()
    cut = tmp_path / "cut.json"
    for length in range(0, len(whole) - 2, 97):
        cut.write_bytes(whole[:length])
        with pytest.raises(ReportError, match="not a whole JSON file"):
            Report.load(cut)


def test_what_is_not_there_or_not_a_file(tmp_path):
    with pytest.raises(ReportError, match="no such file"):
        Report.load(tmp_path / "r.json")
    with pytest.raises(ReportError, match="cannot be read"):
        Report.load(tmp_path)
    with pytest.raises(ReportError, match="does not exist; create it first"):
        REPORT.save(tmp_path / "no" / "r.json")
    (tmp_path / "d.json").mkdir()
    with pytest.raises(ReportError, match="is a directory"):
        REPORT.save(tmp_path / "d.json")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "r.json"
    path.write_text("old")

    def full(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(ReportError, match="No space left"):
        REPORT.save(path)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]


def test_a_link_stays_a_link_and_the_umask_is_kept(tmp_path):
    (tmp_path / "link.json").symlink_to(tmp_path / "real.json")
    old = os.umask(0o022)
    try:
        REPORT.save(tmp_path / "link.json")
    finally:
        os.umask(old)
    assert (tmp_path / "link.json").is_symlink()
    assert stat.S_IMODE((tmp_path / "real.json").stat().st_mode) == 0o644


def test_a_report_without_eigenvalues_has_no_empty_picture_of_them(tmp_path):
    steps = tuple(dataclasses.replace(step, z=None) for step in REPORT.steps)
    written = files.save_all(dataclasses.replace(REPORT, steps=steps), tmp_path)
    assert sorted(path.name for path in written) == ["gradients.png", "growth.png", "report.html", "report.json"]


def test_save_all_draws_before_it_writes(tmp_path, monkeypatch):
    from stabkit import plotting

    names = sorted(path.name for path in files.save_all(REPORT, tmp_path / "a" / "b"))
    assert names == ["gradients.png", "growth.png", "region.png", "report.html", "report.json"]

    def broken(report):
        raise RuntimeError("no ink")

    broken.__name__ = "gradients"
    monkeypatch.setattr(plotting, "gradients", broken)
    with pytest.raises(RuntimeError):
        files.save_all(REPORT, tmp_path / "c")
    assert not (tmp_path / "c").exists()
