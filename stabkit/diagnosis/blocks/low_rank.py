"""Single matrices that lost their rank: whatever they are given comes out along few directions."""

from __future__ import annotations

import math

from stabkit.diagnosis.blocks.weight_faults import WeightFault, rank_faults
from stabkit.diagnosis.finding import Finding
from stabkit.diagnosis.measurement import Measurement
from stabkit.diagnosis.remedies import computed as remedies
from stabkit.diagnosis.thresholds import Thresholds


def rank_findings(measurement: Measurement, thresholds: Thresholds) -> list[Finding]:
    """Matrices of far lower effective rank than the same matrix of the other blocks, worst first."""
    return [_finding(fault, measurement) for fault in rank_faults(measurement.steps, thresholds)]


def _finding(fault: WeightFault, measurement: Measurement) -> Finding:
    step, weight, far = measurement.steps[fault.step], fault.weight, fault.deviation
    size = math.exp(weight.gains[0]) / weight.unit
    share, typical = math.exp(far.value), math.exp(far.typical)
    return Finding(
        kind="rank_collapse",
        severity="warning",
        steps=(fault.step,),
        module_path=step.home([weight]),
        confidence=1.0 - math.exp(2 * far.size),
        evidence=f"the effective rank of {weight.path} is {share:.2%} of the largest that its shape allows, in "
        f"{far.peers} peers {typical:.0%}: its block writes along few directions only",
        remedy=f"draw {weight.path} anew with standard deviation {size:.3g}, which it has now",
        reference="Roy and Vetterli, The effective rank, 2007; Bell and Dean, 1970 (participation ratio)",
        numbers={"rank_deviation": far.size, "share": share, "peers": float(far.peers)},
        actions=(remedies.redraw(weight.path, size),),
    )
