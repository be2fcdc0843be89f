"""A training run as one HTML page: what was found, the run in pictures, and the newest record."""

from __future__ import annotations

import base64
import time
from collections.abc import Mapping, Sequence
from typing import Any

from stabkit._version import __version__
from stabkit.errors import ArgumentError
from stabkit.report.formats import figures
from stabkit.report.page.rendering import rendered, typeset

_TOTALS = (("loss", "loss"), ("gradient_norm", "norm of all gradients"))
_QUANTITIES = ("loss", "growth", "gradient_norm", "activation_norm", "update_ratio", "sharpness_ratio")
_COLUMNS = {
    "growth": "growth (nats)",
    "activation_norm": "output norm",
    "gradient_norm": "gradient norm",
    "parameter_norm": "weights",
    "update_ratio": "update over weights",
}
_KEPT = 400  # records that are drawn


def run_page(records: Sequence[Mapping[str, Any]], findings: Sequence[Mapping[str, Any]], name: str) -> str:
    """A run as a self-contained HTML page, that refreshes itself where ``stabkit watch`` serves it.

    Args:
        records: as ``stabkit.monitor.read_records`` gives them; none where there is none yet.
        findings: as ``stabkit.monitor.read_findings`` gives them, the oldest first.
        name: what the run is called.

    Example:
        >>> "No record yet" in run_page([], [], "run")
        True
    """
    newest = records[-1] if records else {}
    blocks = [
        (str(block["name"]) or "model", [typeset(figures(float(block[key]))) for key in _COLUMNS])
        for block in newest.get("blocks", ())
    ]
    thinned = records[:: -(-len(records) // _KEPT)] if records else records
    return rendered(
        "run.html",
        name=name,
        records=records,
        findings=list(reversed(findings)),
        run_facts=_facts(records) if records else [],
        pictures=_pictures(thinned) if records else [],
        titles=list(_COLUMNS.values()),
        blocks=blocks,
        version=__version__,
    )


def _facts(records: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    newest = records[-1]
    told = [("newest training step", str(newest["step"])), ("records", str(len(records)))]
    told += [(title, typeset(figures(float(newest[key])))) for key, title in _TOTALS if key in newest]
    told.append(("steps left out", str(newest.get("skipped", 0))))
    told.append(("written", time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(float(newest["time"])))))
    return told


def _pictures(records: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Those quantities that were measured, as PNG."""
    from stabkit import plotting  # loads matplotlib

    drawn = []
    for quantity in _QUANTITIES:
        try:
            ax = plotting.training(records, quantity=quantity)
        except ArgumentError:  # a run without a loss, or without a closure
            continue
        drawn.append(
            (ax.get_title() or quantity, base64.b64encode(plotting.render(plotting.figure_of(ax), "png")).decode())
        )
    return drawn
