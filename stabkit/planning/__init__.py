"""What an analysis costs, said before it is run."""

from __future__ import annotations

from stabkit.planning.budgeting import Plan, plan
from stabkit.planning.machine import Machine, calibrate
from stabkit.planning.price import Price, Settings

__all__ = ["Machine", "Plan", "Price", "Settings", "calibrate", "plan"]
