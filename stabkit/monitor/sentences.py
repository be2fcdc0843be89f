"""A finding, and a whole training, in one line each, for logs and services."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from stabkit.diagnosis import Finding
from stabkit.diagnosis.finding import serious


def line(finding: Finding, step: int) -> str:
    """When, what, where, why, and what to do.

    Example:
        >>> print(line(Finding("exploding", "warning", (1,), "net.3", 1.0, "it grew", "lower the rate", ""), 7))
        stabkit: training step 7: exploding (warning) in net.3: it grew. What to do: lower the rate
    """
    where = f" in {finding.module_path}" if finding.module_path else ""
    told = f"stabkit: training step {step}: {finding.kind} ({finding.severity}){where}: {finding.evidence}"
    return " ".join(f"{told}. What to do: {finding.remedy}".split()) if finding.remedy else told


def summary(steps: int, records: int, findings: Sequence[Finding], capsules: Sequence[Path], left_out: int = 0) -> str:
    """How a training went; empty where no step was seen.

    Args:
        steps: how many training steps there were.
        records: of how many of them there is a record.
        findings: what was found.
        capsules: what was kept.
        left_out: steps that were not healthy.
    """
    if not steps:
        return ""
    counted = Counter(finding.kind for finding in findings if serious(finding))
    kinds = ", ".join(f"{kind} ({count} times)" if count > 1 else kind for kind, count in counted.items())
    where = f"; capsules in {capsules[0].parent}" if capsules else ""
    left = f"; {left_out} steps were not healthy" if left_out else ""
    return f"stabkit: {steps} training steps, {records} recorded: {kinds or 'nothing to warn of'}{left}{where}"
