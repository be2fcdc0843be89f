"""One flow, many weights: the same model at several checkpoints."""

from __future__ import annotations

from stabkit.comparison.result import Comparison, Snapshot
from stabkit.comparison.sweep import compare

__all__ = ["Comparison", "Snapshot", "compare"]
