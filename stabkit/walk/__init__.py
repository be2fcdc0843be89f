"""The one walk of cotangents back through a flow, with observers."""

from __future__ import annotations

from stabkit.walk.cotangents import PROBE, Cotangents, balanced, drawn, probe_seeds, stacked, wide
from stabkit.walk.walk import Observer, Passage, Walk, walk_back

__all__ = [
    "PROBE",
    "Cotangents",
    "Observer",
    "Passage",
    "Walk",
    "balanced",
    "drawn",
    "probe_seeds",
    "stacked",
    "walk_back",
    "wide",
]
