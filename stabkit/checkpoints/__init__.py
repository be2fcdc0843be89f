"""Any saved file or model name -> a model and an input for it, safely."""

from __future__ import annotations

from stabkit.checkpoints.dispatch import ArchitectureMissingError, StoredWeights
from stabkit.checkpoints.load import Loaded, load

__all__ = ["ArchitectureMissingError", "Loaded", "StoredWeights", "load"]
