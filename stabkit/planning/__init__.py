"""What an analysis costs, said before it is run."""

from __future__ import annotations

from stabkit.planning.budgeting import Plan, plan
from stabkit.planning.machine_speed import Machine, calibrate
from stabkit.planning.predicted_cost import SPECTRA, Price, Settings

__all__ = ["SPECTRA", "Machine", "Plan", "Price", "Settings", "calibrate", "plan"]
