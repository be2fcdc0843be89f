"""Which remedies are tried for a suspect, the likeliest first."""

from __future__ import annotations

from stabkit.diagnosis.finding import Finding
from stabkit.diagnosis.measurement import AnyFlow, Measurement
from stabkit.diagnosis.remedies import Remedy


def candidates(suspect: Finding, measurement: Measurement, flow: AnyFlow) -> list[Remedy]:
    """Remedies to try, beginning with that of the suspect itself."""
    return [Remedy(suspect.remedy, suspect.actions)]
