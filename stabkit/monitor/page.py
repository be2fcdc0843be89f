"""A training run as one HTML page: what was found, the run in pictures, and the newest record."""

from __future__ import annotations

import base64
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

from stabkit._version import __version__
from stabkit.errors import ArgumentError
from stabkit.report.formats import figures
from stabkit.report.page.rendering import rendered, typeset

_TOTALS = (("loss", "loss"), ("gradient_norm", "norm of all gradients"))
_QUANTITIES = (
    "loss",
    "growth",
    "gradient_norm",
    "activation_norm",
    "update_ratio",
    "sharpness_ratio",
    "attention_logit",
    "attention_entropy",
    "log_z",
)
_COLUMNS = {
    "growth": "growth (nats)",
    "activation_norm": "output norm",
    "gradient_norm": "gradient norm",
    "parameter_norm": "weights",
    "update_ratio": "update over weights",
}
_INSIDE = {  # shown where there is attention, or an epsilon
    "attention_logit": "largest attention logit",
    "attention_entropy": "entropy of attention",
    "epsilon_share": "below epsilon",
}
_KEPT = 400  # records that are drawn
_LOOKS = 100  # records within which there is one of each look inside


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
    columns = {**_COLUMNS, **{key: title for key, title in _INSIDE.items() if _is_known(records, key)}}
    blocks = [
        (str(block["name"]) or "model", [typeset(figures(_newest(records, place, key))) for key in columns])
        for place, block in enumerate(newest.get("blocks", ()))
    ]
    thinned = records[:: -(-len(records) // _KEPT)] if records else records
    return rendered(
        "run.html",
        name=name,
        records=records,
        findings=list(reversed(findings)),
        run_facts=_facts(records) if records else [],
        pictures=_pictures(thinned) if records else [],
        titles=list(columns.values()),
        blocks=blocks,
        version=__version__,
    )


def _newest(records: Sequence[Mapping[str, Any]], place: int, key: str) -> float:
    """A number of a block of the newest record, or of one of those before where it is not measured in each."""
    name, found = records[-1]["blocks"][place]["name"], math.nan
    for record in reversed(records[-_LOOKS:] if key in _INSIDE else records[-1:]):
        found = next((float(b.get(key, math.nan)) for b in record["blocks"] if b["name"] == name), math.nan)
        if not math.isnan(found):
            break
    return found


def _is_known(records: Sequence[Mapping[str, Any]], key: str) -> bool:
    """Whether the newest records hold a number of some block."""
    newest = (block for record in records[-_LOOKS:] for block in record["blocks"])
    return any(not math.isnan(float(block.get(key, math.nan))) for block in newest)


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
        if quantity in _INSIDE and not _is_known(records, quantity):
            continue
        try:
            ax = plotting.training(records, quantity=quantity)
        except ArgumentError:  # a run without a loss, or without a closure
            continue
        drawn.append(
            (ax.get_title() or quantity, base64.b64encode(plotting.render(plotting.figure_of(ax), "png")).decode())
        )
    return drawn
