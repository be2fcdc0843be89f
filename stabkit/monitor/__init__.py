"""In the training loop: norms for almost nothing, alerts, and a capsule of what went wrong."""

from stabkit.monitor.monitor import Monitor
from stabkit.monitor.reading import is_run, read_findings, read_records
from stabkit.monitor.record import BlockRecord, Blocks, Record
from stabkit.monitor.replay import Replay, replay
from stabkit.monitor.rules import AlertRules

__all__ = [
    "AlertRules",
    "BlockRecord",
    "Blocks",
    "Monitor",
    "Record",
    "Replay",
    "is_run",
    "read_findings",
    "read_records",
    "replay",
]
