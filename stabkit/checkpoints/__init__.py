"""Any saved file or model name -> a model and an input for it, safely."""

from __future__ import annotations

from stabkit.checkpoints.load import Loaded, load
from stabkit.checkpoints.opening import ArchitectureMissingError, StoredWeights

__all__ = ["ArchitectureMissingError", "Loaded", "StoredWeights", "load"]
