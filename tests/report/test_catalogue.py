from __future__ import annotations

import io

from rich.console import Console

from stabkit import integrators
from stabkit.report import catalogue


def shown(renderable) -> str:
    console = Console(file=io.StringIO(), width=100)
    console.print(renderable)
    return console.file.getvalue()


def test_every_method_is_listed_with_its_limits():
    rows = {line.split()[0]: line.split()[1:] for line in shown(catalogue.overview()).splitlines() if line.split()}
    assert set(integrators.names()) <= set(rows)
    # Hairer and Wanner II, section IV.2; the imaginary limit is 2 sqrt(2)
    assert rows["rk4"] == ["4", "1", "4", "2.785", "2.828"]
    assert rows["forward_euler"] == ["1", "1", "1", "2", "0"]


def test_a_method_is_shown_with_its_tableau():
    lines = [line.split() for line in shown(catalogue.details(integrators.named("rk4"))).splitlines()]
    assert ["1/6", "1/3", "1/3", "1/6"] in lines
    assert ["order", "4"] in lines
    assert ["A", "stable", "no"] in lines


def test_every_method_can_be_described():
    for name in integrators.names():
        assert "real interval" in shown(catalogue.details(integrators.named(name)))
