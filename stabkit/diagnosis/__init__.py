"""What is wrong, where, how sure that is, and what to change: verdicts, findings, and remedies that can be applied.

Findings and verdicts are data, and need no torch: what measures is imported on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from stabkit.diagnosis.finding import Finding
from stabkit.diagnosis.kinds import FINDINGS, SEVERITIES, VERDICTS
from stabkit.diagnosis.thresholds import Thresholds
from stabkit.diagnosis.verdict import Array, Verdict, factor, judge, stretch_of_blocks

if TYPE_CHECKING:
    from stabkit.diagnosis.examination import diagnose as diagnose
    from stabkit.diagnosis.examination import examine as examine
    from stabkit.diagnosis.measurement import Measurement as Measurement
    from stabkit.diagnosis.measurement import StepMeasurement as StepMeasurement
    from stabkit.diagnosis.measurement import measure as measure
    from stabkit.diagnosis.remedies.treatment import Treatment as Treatment
    from stabkit.diagnosis.remedies.treatment import apply as apply
    from stabkit.diagnosis.remedies.treatment import treat as treat
    from stabkit.diagnosis.suspects import Diagnosis as Diagnosis

# name -> module that defines it
_LAZY = {
    "Diagnosis": "stabkit.diagnosis.suspects",
    "Measurement": "stabkit.diagnosis.measurement",
    "StepMeasurement": "stabkit.diagnosis.measurement",
    "Treatment": "stabkit.diagnosis.remedies.treatment",
    "apply": "stabkit.diagnosis.remedies.treatment",
    "diagnose": "stabkit.diagnosis.examination",
    "examine": "stabkit.diagnosis.examination",
    "measure": "stabkit.diagnosis.measurement",
    "treat": "stabkit.diagnosis.remedies.treatment",
}

__all__ = [
    "FINDINGS",
    "SEVERITIES",
    "VERDICTS",
    "Array",
    "Diagnosis",
    "Finding",
    "Measurement",
    "StepMeasurement",
    "Thresholds",
    "Treatment",
    "Verdict",
    "apply",
    "diagnose",
    "examine",
    "factor",
    "judge",
    "measure",
    "stretch_of_blocks",
    "treat",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'stabkit.diagnosis' has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value
