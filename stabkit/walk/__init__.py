"""The one walk of cotangents back through a flow, with observers."""

from __future__ import annotations

from stabkit.walk.cotangents import PROBE, Cotangents, balanced, drawn, probe_seeds, stacked, wide
from stabkit.walk.walk import AnyFlow, AnyState, AnyStep, Observer, Passage, Walk, space_at, tangents, walk_back

__all__ = [
    "PROBE",
    "AnyFlow",
    "AnyState",
    "AnyStep",
    "Cotangents",
    "Observer",
    "Passage",
    "Walk",
    "balanced",
    "drawn",
    "probe_seeds",
    "space_at",
    "stacked",
    "tangents",
    "walk_back",
    "wide",
]
