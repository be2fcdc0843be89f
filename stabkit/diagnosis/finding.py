"""One diagnosed fact, with the numbers behind it and what to change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from stabkit.diagnosis.kinds import FINDINGS, SEVERITIES, rank
from stabkit.errors import ArgumentError
from stabkit.results import Result

Action = Mapping[str, Any]


@dataclass(frozen=True)
class Finding(Result):
    """One diagnosed fact.

    Attributes:
        kind: one of `stabkit.diagnosis.FINDINGS`.
        severity: one of `stabkit.diagnosis.SEVERITIES`.
        steps: indices of the steps where it happens.
        module_path: the module at fault, or the one that contributes most.
        confidence: how sure the finding is, 0 to 1.
        evidence: the numbers behind it, in words.
        remedy: what to change.
        reference: where the reasoning comes from.
        numbers: the numbers behind it, by name.
        actions: the remedy as data, each of one of the forms that `stabkit.diagnosis.apply` carries out, such as
            ``{"action": "scale", "parameter": "layers.3.weight", "factor": 0.2}``.

    Raises:
        ArgumentError: ``kind`` or ``severity`` is no word of the diagnosis.
    """

    kind: str
    severity: str
    steps: tuple[int, ...]
    module_path: str
    confidence: float
    evidence: str
    remedy: str
    reference: str
    numbers: Mapping[str, float] = field(default_factory=dict, compare=False)
    actions: tuple[Action, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        for name, value, known in (("kind", self.kind, FINDINGS), ("severity", self.severity, SEVERITIES)):
            if value not in known:
                raise ArgumentError(f"{name}={value!r}; accepted: {', '.join(map(repr, known))}")


def serious(finding: Finding) -> bool:
    """Whether it is a warning or worse."""
    return rank(finding.severity) >= rank("warning")
