"""The page of a training run: what it shows, that it refreshes itself, and to whom it is served."""

from __future__ import annotations

import http.client
import math
import threading
import time

import pytest
import torch

from stabkit.errors import ReportError
from stabkit.monitor import Monitor, read_findings, read_records
from stabkit.monitor.page import run_page
from stabkit.monitor.server import serving
from tests.monitor.networks import mlp
from tests.report.page.browser import browser


def train(directory, steps, broken=-1):
    model = mlp(depth=4)
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with Monitor(model, 1, optimizer=optimizer, directory=directory, capsules=0) as monitor:
        for step in range(steps):
            optimizer.zero_grad()
            x = torch.randn(8, 8) * (math.nan if step == broken else 1.0)
            loss = model(x).square().mean()
            loss.backward()
            if monitor.step(loss).healthy:
                optimizer.step()
    return monitor


@pytest.fixture
def served(tmp_path):
    with serving(tmp_path / "run", 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def asked(server, path, host=None):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=60)
    connection.request("GET", path, headers={} if host is None else {"Host": host})
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def test_findings_are_read_back_with_their_training_step(tmp_path):
    monitor = train(tmp_path / "run", 12, broken=9)
    found = read_findings(tmp_path / "run")
    assert [(f["kind"], f["training_step"]) for f in found] == [("non_finite", 9)]
    assert found[0]["evidence"] == monitor.findings[0].evidence
    with pytest.raises(ReportError, match="no records of a monitor"):
        read_findings(tmp_path)
    with pytest.raises(ReportError, match="nowhere"):
        read_findings(tmp_path / "nowhere")


def test_the_page_shows_findings_pictures_and_the_newest_record(tmp_path):
    train(tmp_path / "run", 12, broken=9)
    page = run_page(read_records(tmp_path / "run"), read_findings(tmp_path / "run"), "a <run>")
    assert "a &lt;run&gt;" in page
    assert "training step 9" in page
    assert "<dt>steps left out</dt><dd>1</dd>" in page
    for title in ("Loss", "Growth of every block", "Update ratio of every block"):
        assert f'<img alt="{title}' in page
    assert len(page) < 1_000_000


def test_only_this_machine_is_answered_by_its_own_name(served):
    assert asked(served, "/")[0] == 200
    assert "No record yet" in asked(served, "/")[1]
    assert asked(served, "/", host="evil.example:80")[0] == 403
    assert asked(served, "/../../etc/passwd")[0] == 404


def test_damaged_records_are_told_on_the_page(served):
    served.run.mkdir()
    (served.run / "records.jsonl").write_text("{}\n")
    assert "no readable records" in asked(served, "/")[1]


def test_a_port_that_is_taken_is_one_line(served):
    with pytest.raises(ReportError, match="--port 0 takes one that is free"), serving(served.run, served.server_port):
        pass


def test_the_page_refreshes_itself_in_a_browser(served, tmp_path):
    with browser(tmp_path / "profile") as driver:
        driver.get(served.address)
        assert "No record yet" in driver.page_source
        deadline = time.monotonic() + 30
        while "watching" not in driver.find_element("id", "state").text and time.monotonic() < deadline:
            time.sleep(0.1)
        train(served.run, 12, broken=9)
        while "non_finite" not in driver.page_source and time.monotonic() < deadline:
            time.sleep(0.2)
        assert "non_finite" in driver.page_source
        assert driver.find_elements("css selector", ".pictures img")
        assert all(i.get_property("naturalWidth") > 100 for i in driver.find_elements("css selector", ".pictures img"))
        assert [
            e["message"] for e in driver.get_log("browser") if e["level"] == "SEVERE" and "favicon" not in e["message"]
        ] == []
