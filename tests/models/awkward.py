"""Models that change something of theirs, or of the process, whenever they run: what an analysis has to put back.

Every kind is a residual network with a `touch` in its middle. ``CASES`` holds what builds each: the model, what it is
called with, and what else of the user's hangs on it (lists in closures, logs of hooks).
"""

from __future__ import annotations

from . import awkward_attributes as awkward_attributes
from . import awkward_calls as awkward_calls
from . import awkward_parameters as awkward_parameters
from .awkward_kinds import CASES, Awkward

__all__ = ["CASES", "Awkward"]
