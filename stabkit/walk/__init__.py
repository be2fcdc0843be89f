"""The one walk of cotangents back through a flow, with observers."""

from __future__ import annotations

from stabkit.walk.arrivals import SMALL, Arrivals, Pulled
from stabkit.walk.backwards import (
    Observer,
    Passage,
    Walk,
    joined,
    loss_columns,
    random_columns,
    space_at,
    walk_back,
)
from stabkit.walk.cotangents import PROBE, Cotangents, balanced, drawn, norms, probe_seeds, wide

__all__ = [
    "PROBE",
    "SMALL",
    "Arrivals",
    "Cotangents",
    "Observer",
    "Passage",
    "Pulled",
    "Walk",
    "balanced",
    "drawn",
    "joined",
    "loss_columns",
    "norms",
    "probe_seeds",
    "random_columns",
    "space_at",
    "walk_back",
    "wide",
]
